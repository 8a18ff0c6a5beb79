"""How far back the last use of a block lies, counted in other blocks: the reuse distance.

The distance of a use is the number of distinct blocks that were used since the last use of the same block (Mattson's
LRU stack distance): a least-recently-used cache of more blocks than that still holds it. A first use has none.

Memory is bounded by sampling blocks by their ids (SHARDS: Waldspurger and others, FAST'15). All blocks are tracked
while they are few, and all numbers are then exact. When they become too many, those whose id hashes into the upper
half are forgotten and never tracked again, so that half of all blocks stand for the rest: their distances, counted in
tracked blocks, are doubled, and each counts twice. That goes on as often as it has to.

The relative standard error of a sampled distance is about 1 / sqrt(tracked blocks within it): 3 % where 1,000 tracked
blocks lie within. How often blocks are reused is known better than the sample tells it, since the number of all uses is
known: a block that is used all the time is either missing in the sample or counts several times. As the uses of such
blocks are the near ones, the difference is added to or taken from the shortest distances (the paper's SHARDS-adj).
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from mlpstorage.measure.histogram import MIN_SAMPLES_ABOVE, bucket_bounds_ns, bucket_of

_BITS = 64
_MASK = (1 << _BITS) - 1
_SALT = 0x5851F42D4C957F2D
_ODD_1 = 0x9E3779B97F4A7C15
_ODD_2 = 0xD1B54A32D192ED03


class ReuseDistance:
    """Reuse distances of a stream of block ids.

    Args:
        max_tracked: Most blocks that are tracked at a time; each takes about 150 bytes.

    Attributes:
        uses: All uses so far.
        first_uses: Those of blocks that had not been used before; an estimate once blocks are sampled.
        sample_weight: For how many blocks a tracked one stands: 1 while all are tracked.
    """

    __slots__ = (
        "_last",
        "_max_tracked",
        "_now",
        "_sampled",
        "_threshold",
        "_tracked_uses",
        "first_uses",
        "sample_weight",
        "uses",
    )

    def __init__(self, max_tracked: int = 16_384) -> None:
        self.uses = 0
        self.first_uses = 0.0
        self.sample_weight = 1
        self._sampled: dict[int, float] = {}
        self._max_tracked = max_tracked
        self._threshold = 1 << _BITS
        self._now = 0
        self._last: dict[int, int] = {}  # tracked block -> number of its last use
        self._tracked_uses: list[int] = []  # those numbers in ascending order

    @property
    def reuses(self) -> float:
        """Uses of blocks that had been used before; an estimate once blocks are sampled."""
        return max(0.0, self.uses - self.first_uses)

    @property
    def distances(self) -> dict[int, float]:
        """Weight of the reuses at each distance, by bucket of `measure.histogram`, `reuses` in all.

        A bucket is one distance below 256 blocks, and at most 0.8 % of it above. Those of several streams may be added.
        """
        distances = dict(self._sampled)
        excess = sum(distances.values()) - self.reuses
        if excess < 0:
            distances[0] = distances.get(0, 0.0) - excess
        for bucket in sorted(distances):
            if excess <= 0:
                break
            taken = min(excess, distances[bucket])
            distances[bucket] -= taken
            excess -= taken
        return {bucket: weight for bucket, weight in distances.items() if weight}

    def touch(self, block_ids: Iterable[int]) -> None:
        """Count one use of each block, in this order."""
        ids: Sequence[int] = tuple(block_ids)
        self.uses += len(ids)
        threshold = self._threshold
        if threshold <= _MASK:
            ids = [one for one in ids if _mixed(one) < threshold]
        for block_id in ids:
            self._use(block_id)

    def percentile(self, percent: float) -> int | None:
        """The distance that `percent` of the reuses do not exceed; see `percentile_of`."""
        return percentile_of(self.distances, percent, self.sample_weight)

    def _use(self, block_id: int) -> None:
        uses, weight = self._tracked_uses, self.sample_weight
        last = self._last.get(block_id)
        if last is None:
            self._first_use(block_id)
            return
        self._now += 1
        self._last[block_id] = self._now
        place = bisect_right(uses, last)
        bucket = bucket_of((len(uses) - place) * weight)
        self._sampled[bucket] = self._sampled.get(bucket, 0.0) + weight
        del uses[place - 1]
        uses.append(self._now)

    def _first_use(self, block_id: int) -> None:
        if _mixed(block_id) >= self._threshold:  # it has sunk since `touch` looked at it
            return
        self.first_uses += self.sample_weight
        self._now += 1
        self._last[block_id] = self._now
        self._tracked_uses.append(self._now)
        while len(self._last) > self._max_tracked:
            self._threshold >>= 1
            self.sample_weight *= 2
            self._last = {one: last for one, last in self._last.items() if _mixed(one) < self._threshold}
            self._tracked_uses = sorted(self._last.values())


def percentile_of(distances: Mapping[int, float], percent: float, sample_weight: float = 1.0) -> int | None:
    """The distance that `percent` of the reuses do not exceed (nearest rank), to the width of its bucket.

    None where fewer than ten samples lie above it: such a percentile would be the report of a few outliers.

    Args:
        distances: `ReuseDistance.distances`, or the sum of several.
        percent: From 0 to 100.
        sample_weight: The largest `sample_weight` of the streams.
    """
    total = sum(distances.values())
    rank = total * percent / 100
    if total - rank < MIN_SAMPLES_ABOVE * sample_weight:
        return None
    seen = 0.0
    for bucket in sorted(distances):
        seen += distances[bucket]
        if seen >= rank:
            low, high = bucket_bounds_ns(bucket)
            return (low + high) // 2
    raise AssertionError("a rank within the total lies in some bucket")


def _mixed(block_id: int) -> int:
    """A 64-bit hash of an id: ids that count up or share bits are spread evenly."""
    mixed = ((block_id ^ _SALT) * _ODD_1) & _MASK
    mixed ^= mixed >> 32
    return (mixed * _ODD_2) & _MASK
