"""Merging ranks: how long the launcher takes from the ranks' results, as they arrive, to the files, and how it grows.

    python bench/merge.py

Every rank has 60 lines of time series and, in each latency, 20,000 samples over four decades: more buckets than a run
on one kind of storage fills. Exit code 1 where 64 ranks take 2 s or more, or where they take more than 1.5 times as
long per rank as 16.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from mlpstorage.benchmarks.kvcache import write_results
from mlpstorage.kvcache.events import Finished, parse_event
from mlpstorage.measure.histogram import Histogram, bucket_of
from mlpstorage.results.merge import merge_ranks
from mlpstorage.results.models import LATENCIES, HistogramData, RankResult, Sample

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.records import IDLE  # noqa: E402 - beside the package, not in it

SAMPLES, EQUAL_SAMPLES = 20_000, 10
LINES = 60
LIMIT_S = 2.0
GROWTH_LIMIT = 1.5
SMALL, LARGE = 16, 64


def result_of(rank: int) -> RankResult:
    """A rank that has measured."""
    draws = random.Random(rank)  # noqa: S311 - no secret
    latency = {}
    for name in LATENCIES:
        # The buckets of that many samples, without drawing each.
        histogram = Histogram()
        for _ in range(SAMPLES // EQUAL_SAMPLES):
            value_ns = round(10 ** draws.uniform(4, 8))
            bucket = bucket_of(value_ns)
            histogram.record(value_ns)
            histogram.counts[bucket] += EQUAL_SAMPLES - 1
        latency[name] = HistogramData.of(histogram)
    line = Sample(**{name: 1 for name in Sample.model_fields if name != "phase"}, phase="window")
    samples = tuple(line.model_copy(update={"rank": rank, "t_s": float(second)}) for second in range(LINES))
    return IDLE.model_copy(update={"rank": rank, "latency": latency, "samples": samples})


def merge_s(ranks: int, place: Path) -> float:
    """Seconds from the line with the results of so many ranks to the files."""
    line = Finished(ranks=tuple(map(result_of, range(ranks)))).model_dump_json().encode()
    start_s = time.perf_counter()
    event = parse_event(line)
    assert isinstance(event, Finished)
    summary = merge_ranks(
        event.ranks, bytes_per_token=131_072, block_tokens=256, ttft_p95_ms_target=450.0, timeseries_interval_s=1.0
    )
    write_results(place, summary, event.ranks)
    return time.perf_counter() - start_s


def main() -> int:
    """Measure and print; returns the exit code."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "ranks").mkdir()
        small_s, large_s = (min(merge_s(ranks, Path(place)) for _ in range(3)) for ranks in (SMALL, LARGE))
    growth = large_s / LARGE / (small_s / SMALL)
    print(f"{SMALL} ranks: {small_s:.3f} s; {LARGE} ranks: {large_s:.3f} s; per rank {growth:.2f} times as long")
    return int(large_s >= LIMIT_S or growth > GROWTH_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
