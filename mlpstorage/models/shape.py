"""What of a model decides the size of its KV cache and the time it takes to compute, and what follows from it."""

from dataclasses import dataclass

BYTES_PER_VALUE = 2
"""Keys and values are kept in bfloat16."""

BITS_PER_VALUE = 8 * BYTES_PER_VALUE
"""Weights are read in bfloat16, unless a model ships in another precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model decides the size of its KV cache and the time it takes to compute.

    `models.architecture` makes it of a model's published configuration.

    Attributes:
        name: The name used on the command line.
        layers: Attention layers that keep every token.
        kv_heads: Key/value heads of a layer (grouped-query or multi-head attention); 0 for MLA.
        head_dim: Values of one key (or value) head; 0 for MLA.
        mla_values: Values a layer keeps of a token under multi-head latent attention: `kv_lora_rank + rope_dim`;
            0 for the others.
        window_layers: Sliding-window layers, which keep the last `window_tokens` tokens only.
        window_tokens: Tokens of a sliding window; 0 without such layers.
        attention_width: d of the attention's operations: query heads x head dim; under MLA query heads x the mean of
            a query's and a value's dimension.
        dense_weights: Weights that every token is multiplied by: attention, dense and shared MLPs, routers, norms and
            the output head.
        expert_weights: Weights of all routed experts of all layers; 0 for dense models.
        experts: Routed experts of a layer; 0 for dense models.
        experts_per_token: How many of them a token goes through.
        embedding_weights: The input embedding, of which a token looks up one row; 0 where it is the output head too.
        dense_bits: Bits of one dense weight, as the model ships.
        expert_bits: Bits of one expert's weight, scales included.
    """

    name: str
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    mla_values: int = 0
    window_layers: int = 0
    window_tokens: int = 0
    attention_width: int
    dense_weights: int
    expert_weights: int = 0
    experts: int = 0
    experts_per_token: int = 0
    embedding_weights: int = 0
    dense_bits: float = BITS_PER_VALUE
    expert_bits: float = BITS_PER_VALUE

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds to the cache of a long sequence.

        GQA and MHA: `2 x layers x kv_heads x head_dim x 2 bytes`. MLA: `layers x (kv_lora_rank + rope_dim) x 2 bytes`.
        Sliding-window layers add nothing per token; see `window_bytes_per_sequence`.
        """
        return self.layers * self._bytes_per_token_and_layer

    @property
    def window_bytes_per_token(self) -> int:
        """Bytes that the sliding-window layers keep of one token inside their window; 0 without such layers."""
        return self.window_layers * self._bytes_per_token_and_layer

    @property
    def window_bytes_per_sequence(self) -> int:
        """Bytes that the sliding-window layers keep of one sequence, however long; 0 without such layers."""
        return self.window_tokens * self.window_bytes_per_token

    @property
    def weights(self) -> int:
        """All weights of the model."""
        return self.embedding_weights + self.dense_weights + self.expert_weights

    @property
    def active_weights(self) -> int:
        """Weights that one token is multiplied by: P of the formulas.

        Without the input embedding, of which one row is looked up: so do DeepSeek and OpenAI count their models' active
        parameters (README_WEIGHTS.md of DeepSeek-V3; model card of gpt-oss, arXiv 2508.10925, table 1).
        """
        routed = self.expert_weights * self.experts_per_token // self.experts if self.experts else 0
        return self.dense_weights + routed

    def step_weight_bytes(self, batch: int) -> float:
        """Bytes of weights that one decode step reads for `batch` tokens.

        The dense weights, and the experts that at least one token goes to: of E experts with k a token, `1 - (1 -
        k/E)^batch` on average, where tokens choose at random and alike. It is the active weights for one token and
        nearly all of them for a large batch. Real routers prefer some experts, and read fewer.
        """
        read = self.dense_weights * self.dense_bits
        if self.experts:
            touched = 1 - (1 - self.experts_per_token / self.experts) ** batch
            read += self.expert_weights * self.expert_bits * touched
        return read / 8

    def splits_over(self, tensor_parallel: int) -> bool:
        """Whether the cache can be divided among so many ranks of an inference engine.

        That is where each gets an equal number of whole heads, or where each gets one head and every head is kept by
        equally many. Latent attention has nothing to divide: every rank needs all of it, and one keeps it.
        """
        if self.mla_values:
            return True
        return self.kv_heads % tensor_parallel == 0 or tensor_parallel % self.kv_heads == 0

    def kv_ranks(self, tensor_parallel: int) -> int:
        """Parts, of equal size, in which a block is kept: one under latent attention, else one a rank."""
        return 1 if self.mla_values else tensor_parallel

    def kv_rank_bytes_per_token(self, tensor_parallel: int) -> int:
        """Bytes of a token in one of the `kv_ranks` parts: `ceil(kv_heads / tensor_parallel)` heads, or all of MLA.

        The parts together are `bytes_per_token`, and more where there are fewer heads than ranks.
        """
        if self.mla_values:
            return self.bytes_per_token
        heads = -(-self.kv_heads // tensor_parallel)
        return self.bytes_per_token // self.kv_heads * heads

    @property
    def _bytes_per_token_and_layer(self) -> int:
        if self.mla_values:
            return self.mla_values * BYTES_PER_VALUE
        return 2 * self.kv_heads * self.head_dim * BYTES_PER_VALUE
