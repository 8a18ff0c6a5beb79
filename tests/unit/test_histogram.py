"""The latency histogram, against numbers worked by hand."""

import pytest

from mlpstorage.measure.histogram import Histogram, SignedHistogram, bucket_bounds_ns, bucket_of


def filled(*values_ns: int) -> Histogram:
    """A histogram of the given samples."""
    histogram = Histogram()
    for value in values_ns:
        histogram.record(value)
    return histogram


@pytest.mark.parametrize(
    ("value_ns", "bucket", "bounds_ns"),
    [
        (0, 0, (0, 0)),
        (255, 255, (255, 255)),
        (256, 256, (256, 257)),
        (257, 256, (256, 257)),
        (511, 383, (510, 511)),
        (512, 384, (512, 515)),
        # 10^6 lies between 2^19 and 2^20, where a bucket is 2^19 / 128 = 4,096 ns wide: 244 x 4,096 = 999,424.
        (1_000_000, 12 * 128 + 244, (999_424, 1_003_519)),
    ],
)
def test_bucket_of_a_value_and_its_bounds(value_ns: int, bucket: int, bounds_ns: tuple[int, int]) -> None:
    """Values below 256 ns have a bucket each; above, a power of two is cut into 128 equal buckets."""
    assert bucket_of(value_ns) == bucket
    assert bucket_bounds_ns(bucket) == bounds_ns


def test_percentiles_are_nearest_rank() -> None:
    """Of 1 to 200 ns, each once, the 50th percentile is the 100th value and the 95th the 190th."""
    histogram = filled(*range(200, 0, -1))
    assert histogram.percentile_ns(50) == 100
    assert histogram.percentile_ns(95) == 190
    assert histogram.percentile_ns(0) == 1


def test_a_percentile_needs_ten_samples_above_it() -> None:
    """Of 200 samples ten lie above the 95th percentile, but only nine above the 95.5th: that one is not given."""
    histogram = filled(*range(1, 201))
    assert histogram.percentile_ns(95) == 190
    assert histogram.percentile_ns(95.5) is None
    assert filled(*range(1, 200)).percentile_ns(95) is None


def test_p999_needs_ten_thousand_samples() -> None:
    """The fraction of a percentile is not lost: 99.9 of 10,000 samples leaves exactly ten above."""
    assert filled(*[7] * 10_000).percentile_ns(99.9) == 7
    assert filled(*[7] * 9_999).percentile_ns(99.9) is None


def test_a_percentile_never_leaves_the_range_of_the_samples() -> None:
    """A bucket's middle is cut to the smallest and largest sample: equal samples give their own value."""
    assert filled(*[1_000_000] * 50).percentile_ns(50) == 1_000_000
    assert filled(*[1_003_519] * 50).percentile_ns(50) == 1_003_519


def test_sum_mean_and_extremes_are_exact() -> None:
    """Buckets round percentiles only: the mean, the minimum and the maximum are those of the samples."""
    histogram = filled(1_000_001, 3, 2_000_003)
    assert (histogram.count, histogram.sum_ns) == (3, 3_000_007)
    assert (histogram.min_ns, histogram.max_ns) == (3, 2_000_003)
    assert histogram.mean_ns == pytest.approx(1_000_002.333333)


def test_without_samples_there_is_no_number() -> None:
    """What was not measured is None, never 0."""
    empty = Histogram()
    assert empty.count == 0
    assert (empty.mean_ns, empty.min_ns, empty.max_ns, empty.percentile_ns(50)) == (None, None, None, None)


def test_a_clock_that_stepped_back_counts_as_zero() -> None:
    """A negative duration is a sample of 0 ns: it is counted, and does not spoil the sum."""
    histogram = filled(-5, 10)
    assert (histogram.count, histogram.sum_ns, histogram.min_ns, histogram.max_ns) == (2, 10, 0, 10)


def test_adding_pools_the_samples_and_leaves_the_source_alone() -> None:
    """Ranks are merged by adding counts; an empty part changes nothing."""
    part = filled(5, 300)
    total = Histogram.merged([filled(1), Histogram(), part])
    assert (total.count, total.sum_ns, total.min_ns, total.max_ns) == (3, 306, 1, 300)
    assert total.counts == {1: 1, 5: 1, bucket_of(300): 1}
    assert part.count == 2


def test_a_restored_histogram_equals_the_exported_one() -> None:
    """Counts, sum and extremes are all there is to a histogram, and the restored one has counts of its own."""
    histogram = filled(*range(100, 1_000))
    restored = Histogram.restored(histogram.counts, histogram.sum_ns, histogram.min_ns, histogram.max_ns)
    assert restored.percentile_ns(90) == histogram.percentile_ns(90)
    assert restored.mean_ns == pytest.approx(549.5)
    restored.record(1)
    assert histogram.count == 900


# Differences


def signed(*values_ns: int) -> SignedHistogram:
    """A histogram of the given differences."""
    histogram = SignedHistogram()
    for value in values_ns:
        histogram.record(value)
    return histogram


def test_differences_are_ranked_from_the_greatest_loss_to_the_greatest_gain() -> None:
    """Of -100 to -1 and 1 to 100, each once, the 10th percentile is the 20th, the 50th the 100th and so on."""
    histogram = signed(*range(1, 101), *range(-1, -101, -1))
    assert histogram.percentile_ns(10) == -81
    assert histogram.percentile_ns(50) == -1
    assert histogram.percentile_ns(50.5) == 1
    assert histogram.percentile_ns(75) == 50


def test_a_percentile_of_differences_needs_ten_samples_beyond_it_on_its_side() -> None:
    """Of 200: ten lie above the 190th and nine above the 191st; ten below the 11th and nine below the 10th."""
    histogram = signed(*range(1, 101), *range(-1, -101, -1))
    assert histogram.percentile_ns(95) == 90
    assert histogram.percentile_ns(95.5) is None
    assert histogram.percentile_ns(5.5) == -90
    assert histogram.percentile_ns(5) is None


def test_the_middle_of_differences_needs_ten_samples_above_it_and_none_below() -> None:
    """Of 20 the 10th is given, of 19 it is not; just below the middle, nine below are too few."""
    assert signed(*range(-20, 0)).percentile_ns(50) == -11
    assert signed(*range(-19, 0)).percentile_ns(50) is None
    assert signed(*range(-20, 0)).percentile_ns(49) is None


def test_no_difference_is_a_gain_of_nothing() -> None:
    """0 is not a loss: it lies between the losses and the other gains."""
    histogram = signed(*[-5] * 15, *[0] * 10, *[5] * 15)
    assert (histogram.gains.count, histogram.losses.count) == (25, 15)
    assert (histogram.percentile_ns(37), histogram.percentile_ns(50), histogram.percentile_ns(63)) == (-5, 0, 5)


def test_the_mean_of_differences_is_exact() -> None:
    """(3 - 1,000,001 + 7) / 3; of none there is no number."""
    histogram = signed(3, -1_000_001, 7)
    assert histogram.count == 3
    assert histogram.mean_ns == pytest.approx(-333_330.333333)
    assert (signed().count, signed().mean_ns, signed().percentile_ns(50)) == (0, None, None)


def test_differences_of_ranks_are_pooled() -> None:
    """Gains with gains, losses with losses; the parts stay as they are."""
    parts = [signed(1, -2), signed(), signed(-2, 300)]
    total = SignedHistogram.merged(parts)
    assert (total.gains.counts, total.losses.counts) == ({1: 1, bucket_of(300): 1}, {2: 2})
    assert (total.mean_ns, parts[0].count) == (297 / 4, 2)
