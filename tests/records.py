"""Results of ranks in which nothing happened, to be changed by tests, and their merge."""

from collections.abc import Iterable, Mapping, Sequence

from mlpstorage.config import RunStatus
from mlpstorage.measure.histogram import Histogram, SignedHistogram
from mlpstorage.results.merge import merge_ranks
from mlpstorage.results.models import (
    LATENCIES,
    HistogramData,
    IncompleteRank,
    RankClient,
    RankClock,
    RankResult,
    RankWindow,
    RequestCounts,
    ReuseDistanceData,
    SignedHistogramData,
    StorageCounts,
    TierCounts,
    TtftCounts,
)
from mlpstorage.results.summary import Summary, Trials

NO_TIERS = TierCounts(gpu=0, cpu=0, storage=0)
NO_REQUESTS = RequestCounts(
    completed=0,
    failed=0,
    loads_skipped=0,
    loads_abandoned=0,
    prompt_tokens=0,
    output_tokens=0,
    prompt_blocks=0,
    cached_tokens=NO_TIERS,
    hit_blocks=NO_TIERS,
    cross_rank_tokens=0,
    cross_rank_blocks=0,
)
NO_TOKENS = TtftCounts(**dict.fromkeys(TtftCounts.model_fields, 0))
NO_STORAGE = StorageCounts(**dict.fromkeys(StorageCounts.model_fields, 0))


def exported(samples_ns: Iterable[int] = ()) -> HistogramData:
    """The export of a histogram of the samples."""
    histogram = Histogram()
    for sample_ns in samples_ns:
        histogram.record(sample_ns)
    return HistogramData.of(histogram)


def saved(differences_ns: Iterable[int] = ()) -> SignedHistogramData:
    """The export of a histogram of these savings; negative ones are losses."""
    histogram = SignedHistogram()
    for difference_ns in differences_ns:
        histogram.record(difference_ns)
    return SignedHistogramData.of(histogram)


def reused(first_uses: float = 0, distances: Mapping[int, float] | None = None, weight: int = 1) -> ReuseDistanceData:
    """So many first uses, and so many others at each distance (below 256 blocks, where a bucket is a distance)."""
    return ReuseDistanceData(first_uses=first_uses, distances=dict(distances or {}), sample_weight=weight)


def window(measured_s: float, warmup_s: float = 0, drain_s: float = 0, in_flight: int = 0) -> RankWindow:
    """A window of that length."""
    return RankWindow(
        start_unix_s=None,
        warmup_s=warmup_s,
        warmup_steady=None,
        measured_s=measured_s,
        drain_s=drain_s,
        requests_in_flight_at_end=in_flight,
    )


def client(cpu_s: float = 0, cores: int = 4, rss_bytes: int = 1, os_bytes: int | None = 0) -> RankClient:
    """A client that never lagged or waited, filled no payload and asked the system for `os_bytes` each way."""
    return RankClient(
        cpu_s=cpu_s,
        payload_cpu_s=0,
        sampling_cpu_s=0,
        cpu_wait_s=0,
        cores=cores,
        max_rss_bytes=rss_bytes,
        os_read_bytes=os_bytes,
        os_written_bytes=os_bytes,
        loop_lag=exported(),
    )


def costing(cpu_s: float = 0, payload_cpu_s: float = 0, cpu_wait_s: float | None = 0) -> RankClient:
    """A client of four cores with those costs."""
    return client(cpu_s).model_copy(update={"payload_cpu_s": payload_cpu_s, "cpu_wait_s": cpu_wait_s})


def storage_times(**sums_s: float) -> dict[str, HistogramData]:
    """Latencies of a rank of which the named ones have one sample each, of so many seconds."""
    samples = {name: exported([round(sum_s * 1e9)]) for name, sum_s in sums_s.items()}
    return {name: exported() for name in LATENCIES} | samples


IDLE = RankResult(
    run_id="20261123_093000-0a1b2c",
    rank=0,
    host="h1",
    status=RunStatus.COMPLETE,
    error=None,
    workload_digest="aa",
    operations_digest="bb",
    clock=RankClock(offset_ns=0, offset_error_ns=0, start_late_ns=0),
    window=window(10.0),
    requests=NO_REQUESTS,
    first_tokens=NO_TOKENS,
    saved=saved(),
    reuse_distance=reused(),
    storage=NO_STORAGE,
    storage_total=NO_STORAGE,
    latency={name: exported() for name in LATENCIES},
    client=client(),
    verify_failures=(),
    dropped_page_cache_bytes=0,
    reuse=None,
    host_facts={},
    samples=(),
    host_samples=(),
)
"""A rank that measured for ten seconds, in which nothing happened."""


def rank(number: int = 0, base: RankResult = IDLE, **changes: object) -> RankResult:
    """Rank `number`, as `base` but for the changes."""
    return base.model_copy(update={"rank": number, **changes})


def merge(
    *ranks: RankResult,
    ttft_p95_ms_target: float = 450.0,
    trials: Trials | None = None,
    incomplete: Sequence[IncompleteRank] = (),
) -> Summary:
    """The summary of a model with 131,072 bytes a token, in blocks of 256 tokens: 32 MiB."""
    return merge_ranks(
        ranks,
        bytes_per_token=131_072,
        block_tokens=256,
        ttft_p95_ms_target=ttft_p95_ms_target,
        timeseries_interval_s=1.0,
        trials=trials,
        incomplete_ranks=incomplete,
    )
