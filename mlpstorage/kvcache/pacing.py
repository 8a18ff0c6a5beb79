"""How much of the modelled time of computation and thought is really waited for."""

from dataclasses import dataclass

from mlpstorage.config import GenerationMode
from mlpstorage.kvcache.accelerators import WAITED_PART
from mlpstorage.measure.clock import NS
from mlpstorage.plan.compute import ComputeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """Compute and think times.

    Attributes:
        mode: How much of them is waited for.
        compute: The times of computation.
    """

    mode: GenerationMode
    compute: ComputeModel

    @property
    def waits_in_full(self) -> bool:
        """Whether all of the modelled time is waited for, so that what is measured can be compared with it."""
        return self.mode is GenerationMode.REALISTIC

    def think_ns(self, think_s: float) -> int:
        """Wait, in nanoseconds, of a user who thinks for `think_s`."""
        return round(think_s * NS * WAITED_PART[self.mode])
