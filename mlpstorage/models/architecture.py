"""A model's published dimensions, and the shape that follows from them: weights are counted, not looked up."""

from dataclasses import dataclass

from mlpstorage.models.shape import BITS_PER_VALUE, ModelShape

MLP_MATRICES = 3
"""Of a gated MLP: gate, up and down. All models here, and all that derive from Llama, have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Dimensions of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        kv_lora_rank: Values of the latent vector that keys and values are made of; it is what is cached.
        rope_dim: Values of a key that carry the position, one set for all heads; cached beside the latent vector.
        nope_dim: Values of a head's key that do not.
        v_dim: Values of a head's value.
        q_lora_rank: Values of the latent vector that queries are made of; None where they are made of the hidden state.
    """

    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    q_lora_rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a mixture-of-experts model.

    Attributes:
        count: Routed experts of a layer.
        per_token: How many of them a token goes through.
        intermediate: Inner width of one.
        layers: Layers that have them; the others have a dense MLP.
        shared_intermediate: Inner width of the experts that every token goes through, together; 0 without.
    """

    count: int
    per_token: int
    intermediate: int
    layers: int
    shared_intermediate: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The dimensions of a decoder-only transformer.

    Attributes:
        name: The name used on the command line.
        hidden: Width of the hidden state.
        vocab: Tokens of the vocabulary.
        layers: Layers, those with a sliding window included.
        heads: Query heads.
        kv_heads: Key/value heads; not used under MLA.
        head_dim: Values of a head; not used under MLA. Not hidden size over heads for Qwen3, gpt-oss and Gemma.
        intermediate: Inner width of the dense MLP.
        window_layers: Layers with a sliding window.
        window_tokens: Its tokens; 0 without such layers.
        latent: Multi-head latent attention, in the place of `kv_heads` and `head_dim`.
        experts: Routed experts; None for dense models.
        tied: Whether the input embedding is the output head too.
        dense_bits: Bits of one weight outside of routed experts, as the model ships.
        expert_bits: Bits of one expert's weight, scales included.
    """

    name: str
    hidden: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int
    window_layers: int = 0
    window_tokens: int = 0
    latent: LatentAttention | None = None
    experts: Experts | None = None
    tied: bool = False
    dense_bits: float = BITS_PER_VALUE
    expert_bits: float = BITS_PER_VALUE

    def shape(self) -> ModelShape:
        """What decides the size of the cache and the time to compute.

        Biases, and the norms inside the attention that some models have, are not counted: below 0.1 % of the weights.
        """
        latent, experts = self.latent, self.experts
        embedding = self.vocab * self.hidden
        norms = (2 * self.layers + 1) * self.hidden
        return ModelShape(
            name=self.name,
            layers=self.layers - self.window_layers,
            kv_heads=0 if latent else self.kv_heads,
            head_dim=0 if latent else self.head_dim,
            mla_values=latent.kv_lora_rank + latent.rope_dim if latent else 0,
            window_layers=self.window_layers,
            window_tokens=self.window_tokens,
            attention_width=self._attention_width(),
            dense_weights=self.layers * self._attention_weights() + self._dense_mlp_weights() + norms + embedding,
            expert_weights=experts.layers * experts.count * self._mlp_weights(experts.intermediate) if experts else 0,
            experts=experts.count if experts else 0,
            experts_per_token=experts.per_token if experts else 0,
            embedding_weights=0 if self.tied else embedding,
            dense_bits=self.dense_bits,
            expert_bits=self.expert_bits,
        )

    def _attention_width(self) -> int:
        """d, such that a layer takes 4 d operations for a query and a key that it sees.

        A query and a key of dimension a, and a value of dimension b, take 2 a + 2 b for each head. Under MLA, engines
        rebuild the heads' keys and values for prefill (the compute-friendly form: vLLM, v1/attention/backends/mla/
        common.py): a = nope + rope, b = v.
        """
        if self.latent is None:
            return self.heads * self.head_dim
        return self.heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.v_dim) // 2

    def _attention_weights(self) -> int:
        """Of one layer: the projections to queries, keys and values, and the one back."""
        hidden, heads, latent = self.hidden, self.heads, self.latent
        if latent is None:
            return 2 * hidden * self.head_dim * (heads + self.kv_heads)
        query_dim = latent.nope_dim + latent.rope_dim
        if latent.q_lora_rank is None:
            queries = hidden * heads * query_dim
        else:
            queries = latent.q_lora_rank * (hidden + heads * query_dim)
        keys_and_values = hidden * (latent.kv_lora_rank + latent.rope_dim)
        keys_and_values += latent.kv_lora_rank * heads * (latent.nope_dim + latent.v_dim)
        return queries + keys_and_values + heads * latent.v_dim * hidden

    def _dense_mlp_weights(self) -> int:
        """Of all layers: dense MLPs, shared experts and routers."""
        experts = self.experts
        if experts is None:
            return self.layers * self._mlp_weights(self.intermediate)
        with_experts = self._mlp_weights(experts.shared_intermediate) + self.hidden * experts.count
        return (self.layers - experts.layers) * self._mlp_weights(self.intermediate) + experts.layers * with_experts

    def _mlp_weights(self, intermediate: int) -> int:
        return MLP_MATRICES * self.hidden * intermediate
