"""How long the modelled accelerators take: constant rates, and what of it is really waited for."""

import math
from dataclasses import dataclass

from mlpstorage.config import GenerationMode
from mlpstorage.kvcache.accelerators import WAITED_PART as SCALE
from mlpstorage.plan.compute import compute_model, prefill_tokens_per_s
from mlpstorage.spec.compute import ComputeSpec

NS = 1_000_000_000

REFERENCE_TOKENS = 2048
"""Length of the context at which formulas give their rates."""


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


def pacing_of(spec: ComputeSpec) -> Pacing:
    """The rates of the spec's compute model at `REFERENCE_TOKENS`; infinite where nothing is modelled."""
    compute = compute_model(spec)
    step_s = compute.decode_step_s(1, REFERENCE_TOKENS)
    return Pacing(
        mode=spec.generation_mode,
        prefill_tokens_per_s=prefill_tokens_per_s(compute, REFERENCE_TOKENS) or math.inf,
        decode_tokens_per_s=math.inf if step_s is None else 1 / step_s,
    )
