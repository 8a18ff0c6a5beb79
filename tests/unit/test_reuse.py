"""Reuse distances: cases worked by hand, the bound on memory, and how far a sample may be off."""

import math
import random
import sys
import tracemalloc
from collections import Counter

import pytest

from mlpstorage.measure.histogram import bucket_of
from mlpstorage.measure.reuse import ReuseDistance, percentile_of


def skewed(uses: int, blocks: int, seed: int) -> list[int]:
    """Uses of blocks, the first of which are used most often: about one over the rank."""
    chance = random.Random(seed)  # noqa: S311 - data, no secret
    return [int(blocks ** chance.random()) * 7_919 for _ in range(uses)]


def exact_distances(uses: list[int]) -> list[int]:
    """The distances of all reuses, in a list of blocks by their last use."""
    recent: list[int] = []
    distances: list[int] = []
    for block_id in uses:
        if block_id in recent:
            distances.append(len(recent) - 1 - recent.index(block_id))
            recent.remove(block_id)
        recent.append(block_id)
    return distances


def test_distances_worked_by_hand() -> None:
    """Of 1 2 3 1 1 2: the second 1 comes after 2 and 3, the third after nothing, the second 2 after 3 and 1."""
    reuse = ReuseDistance()
    reuse.touch([1, 2, 3, 1, 1, 2])
    assert reuse.distances == {2: 2, 0: 1}
    assert (reuse.uses, reuse.first_uses, reuse.reuses, reuse.sample_weight) == (6, 3, 3, 1)


def test_calls_are_one_stream() -> None:
    """It makes no difference how uses are spread over calls, nor what kind of iterable brings them."""
    uses = skewed(500, 100, 1)
    whole, parts = ReuseDistance(), ReuseDistance()
    whole.touch(uses)
    for start in range(0, 500, 7):
        parts.touch(iter(uses[start : start + 7]))
    assert whole.distances == parts.distances
    assert (whole.uses, whole.first_uses) == (parts.uses, parts.first_uses)


def test_a_cache_of_more_blocks_than_the_distance_hits() -> None:
    """A chain of 300 that is used again and again: each use comes after the 299 others."""
    reuse = ReuseDistance()
    for _ in range(4):
        reuse.touch(range(300))
    assert reuse.distances == {bucket_of(299): 900}
    assert reuse.percentile(50) == 298  # the bucket of 298 and 299


def test_percentiles_are_those_of_the_sorted_distances() -> None:
    """Nearest rank, to the width of a bucket."""
    uses = skewed(4_000, 2_000, 2)
    reuse = ReuseDistance()
    reuse.touch(uses)
    distances = sorted(exact_distances(uses))
    assert len(distances) > 1_000
    for percent in (1, 25, 50, 90, 99):
        wanted = distances[max(0, -(-len(distances) * percent // 100) - 1)]
        assert reuse.percentile(percent) == pytest.approx(wanted, rel=0.008, abs=0.5)


def test_a_percentile_of_few_reuses_is_not_given() -> None:
    """Ten samples must lie above it, as for every percentile of this program."""
    reuse = ReuseDistance()
    assert reuse.percentile(50) is None
    reuse.touch([5] * 20)
    assert (reuse.reuses, reuse.percentile(50), reuse.percentile(40)) == (19, None, 0)
    reuse.touch([5])
    assert reuse.percentile(50) == 0


def test_percentiles_of_several_streams_are_those_of_their_sum() -> None:
    """Weights are added; a sample that stands for four blocks counts as one sample."""
    assert percentile_of(Counter({3: 30.0}) + Counter({9: 10.0}), 75) == 3
    assert percentile_of({3: 30.0, 9: 10.0}, 75, 4.0) is None
    assert percentile_of({3: 300.0, 9: 100.0}, 75, 4.0) == 3
    assert percentile_of({}, 50) is None


def three_errors(distance: int | None, sample_weight: int) -> float:
    """Three times the stated relative standard error of a sampled distance: 1 / sqrt(tracked blocks within it)."""
    assert distance is not None
    return 3 / math.sqrt(distance / sample_weight)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_sample_is_as_near_to_the_truth_as_stated(seed: int) -> None:
    """2,048 tracked blocks of some 20,000: first uses and percentiles are within three standard errors."""
    uses = skewed(60_000, 300_000, seed)
    exact, sampled = ReuseDistance(1 << 20), ReuseDistance(2_048)
    exact.touch(uses)
    sampled.touch(uses)
    assert exact.sample_weight == 1
    assert sampled.sample_weight >= 8
    assert sampled.uses == exact.uses == 60_000
    assert sampled.first_uses == pytest.approx(exact.first_uses, rel=3 / 1_024**0.5)
    assert sum(sampled.distances.values()) == pytest.approx(sampled.reuses)
    for percent in (75, 90, 95):
        wanted = exact.percentile(percent)
        allowed = three_errors(wanted, sampled.sample_weight)
        assert sampled.percentile(percent) == pytest.approx(wanted, rel=allowed)
        assert percent < 95 or allowed < 0.2


def test_one_block_that_is_used_all_the_time_does_not_distort_the_rest() -> None:
    """Every request begins with a hot block, which the sample counts many times or not at all.

    The share of uses that caches of three sizes would find is within 0.05 of the truth all the same.
    """
    chance = random.Random(6)  # noqa: S311 - data, no secret
    for hot in range(8):
        sampled, exact = ReuseDistance(4_096), ReuseDistance(1 << 20)
        for _ in range(6_000):
            request = [hot, *(1_000 + int(20_000 * chance.random() ** 2) for _ in range(3))]
            sampled.touch(request)
            exact.touch(request)
        assert sampled.sample_weight >= 4
        assert sampled.reuses == pytest.approx(exact.reuses, rel=3 / 2_048**0.5)
        for capacity_blocks in (1_000, 4_000, 8_000):
            shares = [
                sum(weight for bucket, weight in one.distances.items() if bucket < bucket_of(capacity_blocks))
                / one.uses
                for one in (sampled, exact)
            ]
            assert shares[1] > 0.25
            assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_memory_is_bounded() -> None:
    """200,000 blocks take no more than 1,024 tracked ones do: under a megabyte, where a set of all takes ten."""
    reuse = ReuseDistance(1_024)
    tracemalloc.start()
    try:
        for start in range(0, 200_000, 100):
            reuse.touch(range(start, start + 100))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reuse.first_uses == pytest.approx(200_000, rel=3 / 512**0.5)
    assert peak_bytes < 1_000_000 < sys.getsizeof(set(range(200_000)))
