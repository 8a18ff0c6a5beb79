"""What of the modelled time is waited for, worked by hand."""

import pytest

from mlpstorage.config import GenerationMode
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.plan.compute import ConstantCompute

MS = 1_000_000
COMPUTE = ConstantCompute(prefill_tokens_per_s=20_000.0, decode_tokens_per_s=50.0)


@pytest.mark.parametrize(
    ("mode", "think_ns"),
    [(GenerationMode.REALISTIC, 1500 * MS), (GenerationMode.FAST, 150 * MS), (GenerationMode.NONE, 0)],
)
def test_modes_scale_thought(mode: GenerationMode, think_ns: int) -> None:
    """1.5 s of thought, a tenth of it, nothing; no thought takes no time."""
    pacing = Pacing(mode=mode, compute=COMPUTE)
    assert pacing.think_ns(1.5) == think_ns
    assert pacing.think_ns(0.0) == 0


@pytest.mark.parametrize("mode", GenerationMode)
def test_only_realistic_time_is_waited_for_in_full(mode: GenerationMode) -> None:
    """So that only there a TTFT can be compared with one without a cache."""
    assert Pacing(mode=mode, compute=COMPUTE).waits_in_full is (mode is GenerationMode.REALISTIC)
