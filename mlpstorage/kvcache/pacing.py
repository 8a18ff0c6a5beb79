"""How long the modelled accelerators take: constant rates, and what of it is really waited for."""

from dataclasses import dataclass

from mlpstorage.config import GenerationMode

SCALE = {GenerationMode.NONE: 0.0, GenerationMode.FAST: 0.1, GenerationMode.REALISTIC: 1.0}
"""Part of the modelled compute and think time that is waited for."""

NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """Compute and think times of a request, in nanoseconds.

    Attributes:
        mode: How much of them is waited for.
        prefill_tokens_per_s: Prompt tokens computed a second, for one request.
        decode_tokens_per_s: Output tokens generated a second, for one request.
    """

    mode: GenerationMode
    prefill_tokens_per_s: float
    decode_tokens_per_s: float

    def prefill_ns(self, tokens: int) -> int:
        """Wait for the prefill of `tokens` tokens that were not cached."""
        return round(tokens / self.prefill_tokens_per_s * NS * SCALE[self.mode])

    def decode_ns(self, tokens: int) -> int:
        """Wait for the tokens after the first of an answer of `tokens` tokens."""
        return round(max(tokens - 1, 0) / self.decode_tokens_per_s * NS * SCALE[self.mode])

    def think_ns(self, think_s: float) -> int:
        """Wait of a user who thinks for `think_s`."""
        return round(think_s * NS * SCALE[self.mode])

    def recompute_ns(self, tokens: int) -> int:
        """Time that `tokens` cached tokens would take to compute, whatever the mode waits for."""
        return round(tokens / self.prefill_tokens_per_s * NS)
