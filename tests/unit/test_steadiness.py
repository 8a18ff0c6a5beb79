"""When a hit ratio is steady, span by span, worked by hand on virtual time."""

import asyncio
from collections.abc import Sequence

import pytest

from mlpstorage.config import Tier
from mlpstorage.kvcache.recorder import Answered, Recorder
from mlpstorage.kvcache.steadiness import SPAN_S, SPANS, TOLERANCE, Steadiness
from mlpstorage.kvcache.together import alone
from mlpstorage.measure.clock import NS
from mlpstorage.testing.engine_bench import now_ns
from mlpstorage.testing.virtual import VirtualClock, run_virtual


def test_three_spans_of_five_seconds_must_agree_within_two_points() -> None:
    """The numbers that the cases below are worked with."""
    assert (SPAN_S, SPANS, TOLERANCE) == (5, 3, 0.02)


def answer(recorder: Recorder, prompt_tokens: int, cached_tokens: tuple[int, int, int]) -> None:
    """A request was answered now."""
    recorder.answered(
        Answered(
            done_ns=now_ns(),
            prompt_tokens=prompt_tokens,
            output_tokens=1,
            prompt_blocks=0,
            cached_tokens=dict(zip(Tier, cached_tokens, strict=True)),
            hit_blocks=dict.fromkeys(Tier, 0),
            load_skipped=False,
            load_abandoned=False,
        )
    )


def watched(cached: Sequence[int | None], *, most_s: float = 60.0, asked: int = 1000) -> tuple[float, bool]:
    """When the watch ended, and whether it was steady; a request of 1,000 tokens is answered amid every span.

    Args:
        cached: Tokens of it that were found, span by span; None for a span without a request.
        most_s: Length of the warm-up.
        asked: Tokens of a prompt.
    """
    recorder = Recorder(object_bytes=1, stored_bytes=1, ttft_target_ns=1)
    steady = Steadiness()

    async def feed() -> None:
        for number, tokens in enumerate(cached):
            await VirtualClock().sleep_until(100 * NS + (number * SPAN_S + 2) * NS)
            if tokens is not None:
                answer(recorder, asked, (0, 0, tokens))

    async def play() -> float:
        await VirtualClock().sleep_until(100 * NS)
        feeding = asyncio.create_task(feed())
        await steady.reached(recorder, VirtualClock(), 100 * NS, 100 * NS + round(most_s * NS), alone(VirtualClock()))
        feeding.cancel()
        return now_ns() / NS - 100

    return run_virtual(play()), steady.seen


@pytest.mark.parametrize(
    ("cached", "ended_s"),
    [
        ([500, 500, 500], 15),
        # Nothing is ever found: that is steady too.
        ([0, 0, 0], 15),
        # Two points apart, and a tenth of a point more.
        ([0, 10, 20, 900], 15),
        ([0, 10, 21, 21], 20),
        # It climbs, and then no more. Over all requests so far it would still climb at 30 s.
        ([100, 300, 500, 600, 610, 605], 30),
        # It falls as steadily as it climbs.
        ([900, 500, 100, 100, 100], 25),
        # The first span that agrees again must be one of three.
        ([500, 500, 900, 500, 500, 500], 30),
    ],
)
def test_a_hit_ratio_is_steady_after_three_spans_that_agree(cached: list[int], ended_s: int) -> None:
    """It ends at the end of the third of them."""
    assert watched(cached) == (ended_s, True)


def test_a_span_without_an_answer_agrees_with_none() -> None:
    """Nothing was learnt in it: three spans after it must agree."""
    assert watched([500, 500, None, 500, 500, 500]) == (30, True)


def test_what_never_becomes_steady_ends_with_the_warm_up() -> None:
    """At 32 s, in the middle of a span."""
    assert watched([0, 500] * 10, most_s=32.0) == (32, False)


def test_without_any_answer_nothing_is_steady() -> None:
    """No ratio is not a ratio of 0."""
    assert watched([], most_s=40.0) == (40, False)


def test_a_warm_up_of_two_spans_is_never_steady() -> None:
    """10 s hold two; of 14.5 s the last part counts as a span: three ratios, and they agree."""
    assert watched([500] * 3, most_s=10.0) == (10, False)
    assert watched([500] * 3, most_s=14.5) == (14.5, True)
    assert watched([500] * 3, most_s=0.0) == (0, False)


def test_all_tiers_count() -> None:
    """Found on the GPU, in DRAM or on storage: 300 of 1,000 tokens in each of three spans."""
    recorder = Recorder(object_bytes=1, stored_bytes=1, ttft_target_ns=1)
    steady = Steadiness()

    async def play() -> None:
        watching = asyncio.create_task(steady.reached(recorder, VirtualClock(), 0, 60 * NS, alone(VirtualClock())))
        for number, cached in enumerate([(300, 0, 0), (0, 300, 0), (100, 100, 100)]):
            await VirtualClock().sleep_until((number * SPAN_S + 1) * NS)
            answer(recorder, 1000, cached)
        await watching
        assert now_ns() == 15 * NS

    run_virtual(play())
    assert steady.seen


def test_a_ratio_is_of_tokens_and_not_of_requests() -> None:
    """Ten small requests that find nothing beside one of 10,000 tokens that finds half: one ratio of about a half."""
    recorder = Recorder(object_bytes=1, stored_bytes=1, ttft_target_ns=1)
    steady = Steadiness()

    async def play() -> None:
        watching = asyncio.create_task(steady.reached(recorder, VirtualClock(), 0, 60 * NS, alone(VirtualClock())))
        for number in range(3):
            await VirtualClock().sleep_until((number * SPAN_S + 1) * NS)
            answer(recorder, 10_000, (0, 0, 5000))
            for _ in range(10 * number):
                answer(recorder, 10, (0, 0, 0))
        await watching
        # 0.500, 0.495 and 0.490.
        assert now_ns() == 15 * NS

    run_virtual(play())
    assert steady.seen
