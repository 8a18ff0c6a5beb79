"""Modelled compute times, worked by hand."""

from dataclasses import replace

import pytest

from mlpstorage.config import GenerationMode
from mlpstorage.kvcache.pacing import Pacing

MS = 1_000_000
REALISTIC = Pacing(mode=GenerationMode.REALISTIC, prefill_tokens_per_s=20_000.0, decode_tokens_per_s=50.0)


@pytest.mark.parametrize(
    ("mode", "prefill_ns", "decode_ns", "think_ns"),
    [
        (GenerationMode.REALISTIC, 50 * MS, 200 * MS, 1500 * MS),
        (GenerationMode.FAST, 5 * MS, 20 * MS, 150 * MS),
        (GenerationMode.NONE, 0, 0, 0),
    ],
)
def test_modes_scale_what_is_waited_for(mode: GenerationMode, prefill_ns: int, decode_ns: int, think_ns: int) -> None:
    """1,000 tokens at 20,000 a second; the 10 tokens after the first at 50 a second; 1.5 s of thought."""
    pacing = replace(REALISTIC, mode=mode)
    assert pacing.prefill_ns(1000) == prefill_ns
    assert pacing.decode_ns(11) == decode_ns
    assert pacing.think_ns(1.5) == think_ns


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_time_that_a_hit_saves_does_not_hang_on_the_mode(mode: GenerationMode) -> None:
    """Storage is compared with real computing, also where nothing is waited for."""
    assert replace(REALISTIC, mode=mode).recompute_ns(1000) == 50 * MS


def test_prefill_gives_the_first_token() -> None:
    """An answer of one token, or none, needs no decode step."""
    assert REALISTIC.decode_ns(1) == REALISTIC.decode_ns(0) == 0
    assert REALISTIC.decode_ns(2) == 20 * MS
    assert REALISTIC.prefill_ns(0) == 0
    assert REALISTIC.prefill_ns(1) == 50_000
