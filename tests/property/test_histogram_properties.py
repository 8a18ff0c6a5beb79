"""The latency histogram against exact statistics of the samples."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.measure.histogram import Histogram, SignedHistogram, bucket_bounds_ns, bucket_of

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=300)

# Powers of two spread the samples over all sizes of buckets; plain integers would nearly all be huge.
VALUES_NS = st.integers(0, 44).flatmap(lambda bits: st.integers(0, 1 << bits))
SAMPLES = st.lists(VALUES_NS, min_size=1, max_size=120)
THOUSANDTHS = st.integers(0, 100_000)
DIFFERENCES = st.lists(st.tuples(VALUES_NS, st.sampled_from([-1, 1])).map(math.prod), max_size=120)


def histogram_of(samples: list[int]) -> Histogram:
    """A histogram of the samples."""
    histogram = Histogram()
    for sample in samples:
        histogram.record(sample)
    return histogram


@deterministic
@given(value=VALUES_NS)
def test_a_value_lies_within_the_bounds_of_its_bucket(value: int) -> None:
    """A bucket holds its values, and is at most 1/128 of them wide."""
    low, high = bucket_bounds_ns(bucket_of(value))
    assert low <= value <= high
    assert (high - low) * 128 <= low


@deterministic
@given(bucket=st.integers(0, 5_000))
def test_buckets_partition_the_integers(bucket: int) -> None:
    """Each bucket begins where the one before it ends, the first at 0; both bounds fall into it."""
    low, high = bucket_bounds_ns(bucket)
    assert low == (bucket_bounds_ns(bucket - 1)[1] + 1 if bucket else 0)
    assert bucket_of(low) == bucket_of(high) == bucket


@deterministic
@given(samples=SAMPLES, thousandths=THOUSANDTHS)
def test_percentiles_are_the_nearest_rank_to_a_bucket(samples: list[int], thousandths: int) -> None:
    """A percentile lies in the bucket of the exact one; it is None exactly where fewer than ten samples lie above."""
    rank = max(-(-len(samples) * thousandths // 100_000), 1)
    found = histogram_of(samples).percentile_ns(thousandths / 1000)
    if len(samples) - rank < 10:
        assert found is None
    else:
        assert found is not None
        assert bucket_of(found) == bucket_of(sorted(samples)[rank - 1])


@deterministic
@given(parts=st.lists(DIFFERENCES, max_size=5))
def test_many_samples_count_as_each_of_them(parts: list[list[int]]) -> None:
    """Counting lists of samples, empty ones too, is counting each; a clock that stepped back counts as 0."""
    together = Histogram()
    for part in parts:
        together.record_all(part)
    one_by_one = histogram_of([sample for part in parts for sample in part])
    assert together.counts == one_by_one.counts
    assert (together.sum_ns, together.min_ns, together.max_ns) == (
        one_by_one.sum_ns,
        one_by_one.min_ns,
        one_by_one.max_ns,
    )


@deterministic
@given(parts=st.lists(SAMPLES, min_size=1, max_size=5))
def test_merging_equals_pooling(parts: list[list[int]]) -> None:
    """The merged histogram of several ranks is that of all their samples, in every figure."""
    merged = Histogram.merged(histogram_of(part) for part in parts)
    pooled = [sample for part in parts for sample in part]
    assert merged.counts == histogram_of(pooled).counts
    assert (merged.count, merged.sum_ns) == (len(pooled), sum(pooled))
    assert (merged.min_ns, merged.max_ns) == (min(pooled), max(pooled))


def signed_of(samples: list[int]) -> SignedHistogram:
    """A histogram of differences."""
    histogram = SignedHistogram()
    for sample in samples:
        histogram.record(sample)
    return histogram


@deterministic
@given(samples=DIFFERENCES, thousandths=THOUSANDTHS)
def test_percentiles_of_differences_are_the_nearest_rank_to_a_bucket(samples: list[int], thousandths: int) -> None:
    """Of the sorted differences the one of that rank, sign and bucket; the rule of ten holds at the end that is nearer.

    From the middle up ten must lie above; below the middle, below.
    """
    rank = max(-(-len(samples) * thousandths // 100_000), 1)
    found = signed_of(samples).percentile_ns(thousandths / 1000)
    beyond = rank - 1 if thousandths < 50_000 else len(samples) - rank
    if beyond < 10:
        assert found is None
    else:
        assert found is not None
        exact = sorted(samples)[rank - 1]
        assert (found < 0, bucket_of(abs(found))) == (exact < 0, bucket_of(abs(exact)))


@deterministic
@given(parts=st.lists(DIFFERENCES, max_size=5))
def test_merging_differences_equals_pooling(parts: list[list[int]]) -> None:
    """In count, in the exact mean, and in every bucket."""
    merged = SignedHistogram.merged(signed_of(part) for part in parts)
    pooled = [sample for part in parts for sample in part]
    assert merged.count == len(pooled)
    assert merged.mean_ns == (sum(pooled) / len(pooled) if pooled else None)
    assert merged.gains.counts == signed_of(pooled).gains.counts
    assert merged.losses.counts == signed_of(pooled).losses.counts
