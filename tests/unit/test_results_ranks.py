"""Ranks beside each other: the worst percentile of any, rows of a table, stragglers, and the cost of merging."""

import random
import sys
from collections.abc import Sequence

import pytest

from mlpstorage.config import GIB
from mlpstorage.results.models import LATENCIES, RankClock, RankResult
from mlpstorage.results.summary import RankPercentile
from tests.records import IDLE, NO_REQUESTS, NO_STORAGE, exported, merge, rank


def reading(number: int, samples_ns: Sequence[int], **counts: int) -> RankResult:
    """A rank with those times of reads and those counts."""
    storage = NO_STORAGE.model_copy(update=counts)
    return rank(number, storage=storage, latency={**IDLE.latency, "storage_read": exported(samples_ns)})


def test_beside_a_pooled_percentile_stands_the_highest_of_any_rank() -> None:
    """Of sorted samples: 1 % of a rank of 3,000 is slow, which the pool of 30,000 does not show at p99."""
    draws = random.Random(5)  # noqa: S311 - no secret
    of_rank = {number: [draws.randrange(100, 200) for _ in range(3_000)] for number in range(10)}
    of_rank[7] = [200 if index < 40 else sample for index, sample in enumerate(of_rank[7])]
    latency = merge(*(reading(number, samples) for number, samples in of_rank.items())).latency["storage_read"]
    pooled = sorted(sample for samples in of_rank.values() for sample in samples)
    assert latency.p99_ms == pooled[29_700 - 1] / 1e6 < 200 / 1e6
    assert latency.highest_of_ranks is not None
    assert latency.highest_of_ranks.p99_ms == RankPercentile(rank=7, ms=200 / 1e6)
    medians = {number: sorted(samples)[1_500 - 1] for number, samples in of_rank.items()}
    highest = latency.highest_of_ranks.p50_ms
    assert highest is not None
    assert highest.ms == max(medians.values()) / 1e6
    assert highest.rank == min(number for number, median in medians.items() if median == max(medians.values()))
    assert latency.highest_of_ranks.p999_ms is None


def test_one_rank_is_not_compared_with_itself() -> None:
    """There is no highest of ranks, no straggler and no skew; the row is there."""
    summary = merge(reading(0, [1_000] * 30))
    assert summary.latency["storage_read"].highest_of_ranks is None
    assert summary.stragglers == ()
    assert summary.clock.start_skew_ms == 0
    assert [row.rank for row in summary.ranks] == [0]


def test_a_row_has_the_rank_s_own_numbers() -> None:
    """Shares of the run's window of 10 s; the rows' rates add up to the run's."""
    found = NO_REQUESTS.model_copy(
        update={
            "completed": 6,
            "prompt_tokens": 200,
            "cached_tokens": NO_REQUESTS.cached_tokens.model_copy(update={"storage": 50}),
        }
    )
    first = reading(0, [100] * 20, read_bytes=5 * GIB).model_copy(update={"requests": found})
    second = reading(1, [], read_bytes=15 * GIB, written_bytes=10 * GIB)
    summary = merge(second, first)
    row, other = summary.ranks
    assert (row.rank, row.requests_completed, row.hit_ratio_tokens, row.read_gib_per_s) == (0, 6, 0.25, 0.5)
    assert (row.storage_read_p50_ms, row.ttft_p95_ms) == (100 / 1e6, None)
    assert (other.rank, other.hit_ratio_tokens, other.read_gib_per_s, other.write_gib_per_s) == (1, None, 1.5, 1.0)
    assert summary.storage.read_gib_per_s == 2.0


@pytest.mark.parametrize(
    ("medians_ns", "named"),
    [
        # The others' median is 100: more than 200 is far from it.
        ((100, 100, 201), [2]),
        ((100, 100, 200), []),
        # Of two ranks each is the other's measure.
        ((100, 220), [1]),
        # (100 + 120) / 2 = 110 for the last; the median of the others of the third is 120.
        ((100, 120, 110, 230), [3]),
        ((250, 100, 100, 250), [0, 3]),
    ],
)
def test_a_rank_that_reads_twice_as_slowly_as_the_others_is_a_straggler(
    medians_ns: Sequence[int], named: Sequence[int]
) -> None:
    """The rule is of medians: more than twice the median of the other ranks' medians."""
    summary = merge(*(reading(number, [median] * 20) for number, median in enumerate(medians_ns)))
    assert [one.rank for one in summary.stragglers] == list(named)


def test_too_few_reads_name_nobody() -> None:
    """19 reads have no median, so that rank is none, and no measure for the others either."""
    assert merge(reading(0, [100] * 19), reading(1, [900] * 19), reading(2, [100] * 19)).stragglers == ()
    assert merge(reading(0, [100] * 20), reading(1, [900] * 19), reading(2, [100] * 20)).stragglers == ()


def test_a_rank_that_moves_less_than_half_is_a_straggler_and_the_reason_has_figures() -> None:
    """The others moved 4 GiB each with 20 operations; one of them fewer, and bytes would say nothing."""
    starved = reading(1, [], read_bytes=GIB, written_bytes=GIB // 2, read_ops=15)
    others = [reading(number, [], read_bytes=3 * GIB, written_bytes=GIB, read_ops=20) for number in (0, 2)]
    (straggler,) = merge(starved, *others).stragglers
    assert (straggler.rank, straggler.host) == (1, "h1")
    assert straggler.reason == "it moved 1.50 GiB, the others 4.00 GiB each"
    few = [reading(number, [], read_bytes=3 * GIB, written_bytes=GIB, read_ops=19) for number in (0, 2)]
    assert merge(starved, *few).stragglers == ()


def test_the_skew_is_from_the_first_rank_that_began_to_the_last() -> None:
    """Late by 1, 4 and 2.5 ms: 3 ms apart; the worst bound of a clock is that of the run."""
    clocks = ((1_000_000, 0), (4_000_000, 70_000), (2_500_000, 20_000))
    ranks = [
        rank(number, clock=RankClock(offset_ns=5 * number, offset_error_ns=error_ns, start_late_ns=late_ns))
        for number, (late_ns, error_ns) in enumerate(clocks)
    ]
    assert merge(*ranks).clock.start_skew_ms == 3.0
    assert merge(*ranks).clock.max_offset_error_ms == 0.07


def test_the_work_of_a_merge_grows_as_the_ranks_do() -> None:
    """Calls of functions, counted: four times the ranks take at most four and a half times as many."""

    def calls(ranks: int) -> int:
        latency = {name: exported(range(1_000, 100_000, 1_000)) for name in LATENCIES}
        results = [rank(number, latency=latency) for number in range(ranks)]
        counted = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal counted
            counted += event in {"call", "c_call"}

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            merge(*results)
        finally:
            sys.setprofile(before)
        return counted

    few, many = calls(16), calls(64)
    assert few > 1_000
    assert many <= 4.5 * few
