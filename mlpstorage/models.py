"""The shapes of the models whose KV cache can be played, and the bytes that follow from a shape.

Sources: the models' published `config.json` files. `head_dim` is stated, never derived: it is not hidden size over
heads for Qwen3, gpt-oss and Gemma.
"""

from dataclasses import dataclass
from types import MappingProxyType

BYTES_PER_VALUE = 2
"""Keys and values are kept in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model decides the size of its KV cache.

    Attributes:
        name: The name used on the command line.
        layers: Attention layers that keep every token.
        kv_heads: Key/value heads of a layer (grouped-query or multi-head attention); 0 for MLA.
        head_dim: Values of one key (or value) head; 0 for MLA.
        mla_values: Values a layer keeps of a token under multi-head latent attention: `kv_lora_rank + rope_dim`;
            0 for the others.
        window_layers: Sliding-window layers, which keep the last `window_tokens` tokens only.
        window_tokens: Tokens of a sliding window; 0 without such layers.
    """

    name: str
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    mla_values: int = 0
    window_layers: int = 0
    window_tokens: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds to the cache of a long sequence.

        GQA and MHA: `2 x layers x kv_heads x head_dim x 2 bytes`. MLA: `layers x (kv_lora_rank + rope_dim) x 2 bytes`.
        Sliding-window layers add nothing per token; see `window_bytes_per_sequence`.
        """
        return self.layers * self._bytes_per_token_and_layer

    @property
    def window_bytes_per_sequence(self) -> int:
        """Bytes that the sliding-window layers keep of one sequence, however long; 0 without such layers."""
        return self.window_layers * self.window_tokens * self._bytes_per_token_and_layer

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


def _table(*shapes: ModelShape) -> MappingProxyType[str, ModelShape]:
    return MappingProxyType({shape.name: shape for shape in shapes})


MODELS = _table(
    ModelShape(name="tiny-1b", layers=12, kv_heads=4, head_dim=128),
    ModelShape(name="mistral-7b", layers=32, kv_heads=8, head_dim=128),
    ModelShape(name="llama2-7b", layers=32, kv_heads=32, head_dim=128),
    ModelShape(name="llama3.1-8b", layers=32, kv_heads=8, head_dim=128),
    ModelShape(name="llama3.1-70b-instruct", layers=80, kv_heads=8, head_dim=128),
    ModelShape(name="llama3.1-405b", layers=126, kv_heads=8, head_dim=128),
    ModelShape(name="qwen3-8b", layers=36, kv_heads=8, head_dim=128),
    ModelShape(name="qwen3-32b", layers=64, kv_heads=8, head_dim=128),
    ModelShape(name="qwen3-235b-a22b", layers=94, kv_heads=4, head_dim=128),
    ModelShape(name="deepseek-v3", layers=61, mla_values=512 + 64),
    ModelShape(name="gpt-oss-20b", layers=12, kv_heads=8, head_dim=64, window_layers=12, window_tokens=128),
    ModelShape(name="gpt-oss-120b", layers=18, kv_heads=8, head_dim=64, window_layers=18, window_tokens=128),
    ModelShape(name="gemma-3-27b", layers=10, kv_heads=16, head_dim=128, window_layers=52, window_tokens=1024),
)
"""Every model by name. `tiny-1b` is made up, for small machines and tests."""
