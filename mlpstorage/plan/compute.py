"""How long the modelled accelerators take: prefill and decode by formula, or by rates that were measured elsewhere.

Pure arithmetic: nothing waits here. Who waits for whom is in `kvcache.accelerators`; what the formulas leave out stands
in docs/compute.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from mlpstorage.config import Accelerator
from mlpstorage.models import ModelShape
from mlpstorage.spec.compute import ComputeSpec

MEMORY_PART = 0.8
"""Part of the memory bandwidth that a decode step reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What an accelerator's data sheet promises.

    Attributes:
        flop_per_s: Operations a second with bfloat16, dense: without structured sparsity.
        memory_bytes_per_s: Bytes a second from its memory.
    """

    flop_per_s: float
    memory_bytes_per_s: float


PEAKS: Mapping[Accelerator, Peak] = MappingProxyType(
    {
        # NVIDIA A100 data sheet, 80 GB SXM: 312 TFLOPS, 2,039 GB/s.
        Accelerator.A100: Peak(flop_per_s=312e12, memory_bytes_per_s=2.039e12),
        # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity, half of it without; 3.35 TB/s.
        Accelerator.H100: Peak(flop_per_s=989e12, memory_bytes_per_s=3.35e12),
        # NVIDIA H200 data sheet, SXM: likewise; 4.8 TB/s.
        Accelerator.H200: Peak(flop_per_s=989e12, memory_bytes_per_s=4.8e12),
        # NVIDIA Blackwell data sheet, HGX B200: 4.5 PFLOPS with sparsity, half of it without; 7.7 TB/s.
        Accelerator.B200: Peak(flop_per_s=2250e12, memory_bytes_per_s=7.7e12),
        # AMD Instinct MI355X data sheet: 2.5 PFLOPS without sparsity (256 units x 4,096 x 2.4 GHz); 8 TB/s.
        Accelerator.MI355X: Peak(flop_per_s=2516.6e12, memory_bytes_per_s=8e12),
    }
)


class ComputeModel(Protocol):
    """Times of an inference engine, in seconds; None where they are not modelled."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float | None:
        """Prefill of `new_tokens` that follow `cached_tokens`, alone on the accelerators."""
        ...

    def decode_step_s(self, batch: int, context_tokens: float) -> float | None:
        """One step, which gives each of `batch` sequences a token; `context_tokens` is the sum of their contexts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FormulaCompute:
    """Accelerators that compute a model together.

    Attributes:
        shape: The model.
        peak: Of one accelerator.
        accelerators: N, how many work together.
        mfu: Part of their peak that they reach.
    """

    shape: ModelShape
    peak: Peak
    accelerators: int
    mfu: float

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """`[2 P n + 4 L d (n p + n^2/2)] / (N F MFU)`, for n new tokens after p cached ones.

        P are the active weights, L the layers, d the width of their attention. Where a layer has a window of w tokens,
        `n p + n^2/2`, which is the sum of the tokens that each new one sees, is bounded by it: `A(p + n) - A(p)` with
        `A(x) = m^2/2 + w (x - m)`, `m = min(x, w)`.
        """
        shape = self.shape
        pairs = shape.layers * new_tokens * (cached_tokens + new_tokens / 2)
        if shape.window_layers:
            end = _seen_in_window(cached_tokens + new_tokens, shape.window_tokens)
            pairs += shape.window_layers * (end - _seen_in_window(cached_tokens, shape.window_tokens))
        flop = 2 * shape.active_weights * new_tokens + 4 * shape.attention_width * pairs
        return flop / self._flop_per_s

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """`max((weight bytes + context x bytes per token) / (N BW 0.8), 2 P batch / (N F MFU))`.

        The weights are those that a batch of that size reads (`ModelShape.step_weight_bytes`). Of a layer with a window
        a sequence reads at most the window.
        """
        shape = self.shape
        in_windows = min(context_tokens, batch * shape.window_tokens) * shape.window_bytes_per_token
        read_bytes = shape.step_weight_bytes(batch) + context_tokens * shape.bytes_per_token + in_windows
        memory_s = read_bytes / (self.accelerators * self.peak.memory_bytes_per_s * MEMORY_PART)
        return max(memory_s, 2 * shape.active_weights * batch / self._flop_per_s)

    @property
    def _flop_per_s(self) -> float:
        return self.accelerators * self.peak.flop_per_s * self.mfu


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantCompute:
    """Rates that do not depend on length or batch; None for what is not modelled.

    Attributes:
        prefill_tokens_per_s: Prompt tokens that the engine computes a second.
        decode_tokens_per_s: Output tokens that it generates a second, for each request.
    """

    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float | None:  # noqa: ARG002 - of the protocol
        """New tokens over the rate."""
        return None if self.prefill_tokens_per_s is None else new_tokens / self.prefill_tokens_per_s

    def decode_step_s(self, batch: int, context_tokens: float) -> float | None:  # noqa: ARG002 - of the protocol
        """One token over the rate."""
        return None if self.decode_tokens_per_s is None else 1 / self.decode_tokens_per_s


def compute_model(spec: ComputeSpec) -> ComputeModel:
    """The formulas of the spec's accelerators, or its rates."""
    if spec.accelerator is Accelerator.NONE:
        return ConstantCompute(
            prefill_tokens_per_s=spec.prefill_tokens_per_s, decode_tokens_per_s=spec.decode_tokens_per_s
        )
    return FormulaCompute(
        shape=spec.shape, peak=PEAKS[spec.accelerator], accelerators=spec.num_accelerators, mfu=spec.mfu
    )


def prefill_tokens_per_s(compute: ComputeModel, context_tokens: int) -> float | None:
    """Tokens that are computed a second, on average over a context of that length; None where not modelled."""
    prefill_s = compute.prefill_s(context_tokens, 0)
    return None if prefill_s is None else context_tokens / prefill_s


def break_even_bytes_per_s(compute: ComputeModel, *, bytes_per_token: int, context_tokens: int) -> float | None:
    """Bandwidth above which reading a whole context takes less time than computing it; None where not modelled.

    Bytes of the context over the time of its prefill, of one request that has the accelerators and the storage to
    itself. With the prefill's operations as the Mooncake paper counts them (FAST '25, equation 1), it is that paper's
    equation 2: `2 d s G / (gqa (a p d + b d^2))` is `2 l d s p / gqa` bytes over `l (a p^2 d + b p d^2) / G` seconds.
    """
    tokens_per_s = prefill_tokens_per_s(compute, context_tokens)
    return None if tokens_per_s is None else tokens_per_s * bytes_per_token


def _seen_in_window(tokens: int, window_tokens: int) -> float:
    """Sum of the tokens that each of a sequence's first `tokens` sees through a window."""
    ramp = min(tokens, window_tokens)
    return ramp * ramp / 2 + window_tokens * (tokens - ramp)
