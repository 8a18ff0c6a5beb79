"""A log-linear histogram of latencies.

Buckets are exact below 256 ns; above, each power of two is cut into 128 equal buckets, so that a bucket's width is at
most 1/128 of its values and a percentile is off by less than 0.8 %. Merging adds counts, so that percentiles of many
ranks are those of the pooled samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

_SUB_BITS = 7
_EXACT_BELOW = 2 << _SUB_BITS
SCHEME: Final = "log-linear-7"
"""Name of the bucket layout, stored with every exported histogram."""

MIDDLE_PERCENT = 50

MIN_SAMPLES_ABOVE = 10
"""A percentile is given only where at least this many samples lie above it."""


def bucket_of(value_ns: int) -> int:
    """Number of the bucket that holds `value_ns` (0 or more)."""
    if value_ns < _EXACT_BELOW:
        return value_ns
    shift = value_ns.bit_length() - _SUB_BITS - 1
    return (shift << _SUB_BITS) + (value_ns >> shift)


def bucket_bounds_ns(bucket: int) -> tuple[int, int]:
    """Lowest and highest value, both included, that fall into `bucket`."""
    if bucket < _EXACT_BELOW:
        return bucket, bucket
    shift = (bucket >> _SUB_BITS) - 1
    low = (bucket - (shift << _SUB_BITS)) << shift
    return low, low + (1 << shift) - 1


class Histogram:
    """Counts of latencies in nanoseconds, with their exact sum, minimum and maximum."""

    __slots__ = ("counts", "max_ns", "min_ns", "sum_ns")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.sum_ns = 0
        self.min_ns: int | None = None
        self.max_ns: int | None = None

    def record(self, value_ns: int) -> None:
        """Count one sample; a clock that stepped back counts as 0."""
        value = max(value_ns, 0)
        bucket = bucket_of(value)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.sum_ns += value
        if self.min_ns is None or value < self.min_ns:
            self.min_ns = value
        if self.max_ns is None or value > self.max_ns:
            self.max_ns = value

    def record_all(self, values_ns: Sequence[int]) -> None:
        """Count many samples, as `record` does each, in two thirds of the time."""
        if not values_ns:
            return
        low = min(values_ns)
        if low < 0:
            low, values_ns = 0, [max(value, 0) for value in values_ns]
        high = max(values_ns)
        counts = self.counts
        for bucket in map(bucket_of, values_ns):
            counts[bucket] = counts.get(bucket, 0) + 1
        self.sum_ns += sum(values_ns)
        self.min_ns = low if self.min_ns is None or low < self.min_ns else self.min_ns
        self.max_ns = high if self.max_ns is None or high > self.max_ns else self.max_ns

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(self.counts.values())

    @property
    def mean_ns(self) -> float | None:
        """Exact mean; None without samples."""
        count = self.count
        return self.sum_ns / count if count else None

    def percentile_ns(self, percent: float) -> int | None:
        """The value that `percent` of the samples do not exceed (nearest rank), to the width of its bucket.

        None where fewer than ten samples lie above it: such a percentile would be the report of a few outliers.
        """
        total = self.count
        rank = _nearest_rank(total, percent)
        return None if total - rank < MIN_SAMPLES_ABOVE else self._of_rank(rank)

    def _of_rank(self, rank: int) -> int:
        """The value of the sample that is number `rank` (from 1) in rising order, to the width of its bucket."""
        assert self.min_ns is not None, "a histogram with samples has a least one"
        assert self.max_ns is not None, "a histogram with samples has a greatest one"
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                low, high = bucket_bounds_ns(bucket)
                return min(max((low + high) // 2, self.min_ns), self.max_ns)
        raise AssertionError("a rank within the count lies in some bucket")

    def add(self, other: "Histogram") -> None:
        """Add the samples of `other`."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.sum_ns += other.sum_ns
        lows = [value for value in (self.min_ns, other.min_ns) if value is not None]
        highs = [value for value in (self.max_ns, other.max_ns) if value is not None]
        self.min_ns = min(lows, default=None)
        self.max_ns = max(highs, default=None)

    @classmethod
    def merged(cls, parts: Iterable["Histogram"]) -> "Histogram":
        """A new histogram that holds the samples of all `parts`."""
        total = cls()
        for part in parts:
            total.add(part)
        return total

    @classmethod
    def restored(cls, counts: Mapping[int, int], sum_ns: int, min_ns: int | None, max_ns: int | None) -> "Histogram":
        """A histogram from exported values."""
        histogram = cls()
        histogram.counts = dict(counts)
        histogram.sum_ns = sum_ns
        histogram.min_ns = min_ns
        histogram.max_ns = max_ns
        return histogram


class SignedHistogram:
    """Counts of differences of times, which may be negative: one histogram of those from 0 up, one of the others.

    Attributes:
        gains: The differences that are not negative.
        losses: The amounts of those that are.
    """

    __slots__ = ("gains", "losses")

    def __init__(self, gains: Histogram | None = None, losses: Histogram | None = None) -> None:
        self.gains = Histogram() if gains is None else gains
        self.losses = Histogram() if losses is None else losses

    def record(self, value_ns: int) -> None:
        """Count one difference."""
        if value_ns < 0:
            self.losses.record(-value_ns)
        else:
            self.gains.record(value_ns)

    @classmethod
    def merged(cls, parts: Iterable["SignedHistogram"]) -> "SignedHistogram":
        """A new one that holds the differences of all `parts`."""
        total = cls()
        for part in parts:
            total.gains.add(part.gains)
            total.losses.add(part.losses)
        return total

    @property
    def count(self) -> int:
        """Number of differences."""
        return self.gains.count + self.losses.count

    @property
    def mean_ns(self) -> float | None:
        """Exact mean; None without any."""
        count = self.count
        return (self.gains.sum_ns - self.losses.sum_ns) / count if count else None

    def percentile_ns(self, percent: float) -> int | None:
        """As of `Histogram`; for those below the middle, ten samples must lie below in the place of above."""
        total, lost = self.count, self.losses.count
        rank = _nearest_rank(total, percent)
        if min(total - rank, rank - 1 if percent < MIDDLE_PERCENT else total) < MIN_SAMPLES_ABOVE:
            return None
        # The least of all is the greatest loss.
        return -self.losses._of_rank(lost - rank + 1) if rank <= lost else self.gains._of_rank(rank - lost)  # noqa: SLF001 - its own kind


def _nearest_rank(total: int, percent: float) -> int:
    return max(1, -(-total * round(percent * 1000) // 100_000))
