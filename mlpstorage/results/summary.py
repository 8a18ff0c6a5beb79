"""The shapes of `summary.json`, frozen; unknown keys are refused. `docs/numbers.md` defines each number."""

from collections.abc import Mapping

from mlpstorage.config import BENCHMARK_TYPES, RunStatus
from mlpstorage.measure.histogram import Histogram, SignedHistogram
from mlpstorage.results.models import (
    SCHEMA_VERSION,
    HistogramData,
    IncompleteRank,
    Record,
    Reuse,
    SignedHistogramData,
    StorageCounts,
)


class RankPercentile(Record):
    """A percentile of one rank's samples."""

    rank: int
    ms: float


class HighestOfRanks(Record):
    """The highest percentile of any one rank, and whose; None where no rank has samples enough for it."""

    p50_ms: RankPercentile | None
    p90_ms: RankPercentile | None
    p95_ms: RankPercentile | None
    p99_ms: RankPercentile | None
    p999_ms: RankPercentile | None

    @classmethod
    def of(cls, histograms: Mapping[int, Histogram]) -> "HighestOfRanks":
        """The highest among the histograms of ranks."""

        def highest(percent: float) -> RankPercentile | None:
            values = {rank: histogram.percentile_ns(percent) for rank, histogram in histograms.items()}
            known = [(value_ns, -rank) for rank, value_ns in values.items() if value_ns is not None]
            if not known:
                return None
            value_ns, negative_rank = max(known)
            return RankPercentile(rank=-negative_rank, ms=round(value_ns / 1e6, 6))

        return cls(
            p50_ms=highest(50), p90_ms=highest(90), p95_ms=highest(95), p99_ms=highest(99), p999_ms=highest(99.9)
        )


class Latency(Record):
    """A latency in milliseconds. A percentile is None where fewer than ten samples lie above it.

    The percentiles are of the samples of all ranks together; `highest_of_ranks` is None with a single rank.
    """

    count: int
    mean_ms: float | None
    min_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None
    highest_of_ranks: HighestOfRanks | None
    histogram: HistogramData

    @classmethod
    def of(cls, histogram: Histogram, of_ranks: Mapping[int, Histogram] | None = None) -> "Latency":
        """The figures of `histogram`, which pools those of the ranks."""

        def ms(value_ns: float | None) -> float | None:
            return None if value_ns is None else round(value_ns / 1e6, 6)

        return cls(
            count=histogram.count,
            mean_ms=ms(histogram.mean_ns),
            min_ms=ms(histogram.min_ns),
            p50_ms=ms(histogram.percentile_ns(50)),
            p90_ms=ms(histogram.percentile_ns(90)),
            p95_ms=ms(histogram.percentile_ns(95)),
            p99_ms=ms(histogram.percentile_ns(99)),
            p999_ms=ms(histogram.percentile_ns(99.9)),
            max_ms=ms(histogram.max_ns),
            highest_of_ranks=None if of_ranks is None or len(of_ranks) == 1 else HighestOfRanks.of(of_ranks),
            histogram=HistogramData.of(histogram),
        )


class Window(Record):
    """The phases of the run, in seconds; of several ranks, the longest of each.

    `warmup_steady` is false where any rank's hit ratio was not steady when its warm-up ended.
    """

    warmup_s: float
    warmup_steady: bool | None
    measured_s: float
    drain_s: float
    requests_in_flight_at_end: int


class RequestRates(Record):
    """Requests completed inside the window, and tokens of theirs a second."""

    completed: int
    failed: int
    loads_skipped: int
    loads_abandoned: int
    rate_per_s: float | None
    prompt_tokens_per_s: float | None
    cached_tokens_per_s: float | None
    output_tokens_per_s: float | None


class TierRatios(Record):
    """Part of the prompt that each tier held, 0 to 1; `cross_rank` is that of `storage` which another rank wrote."""

    gpu: float | None
    cpu: float | None
    storage: float | None
    total: float | None
    cross_rank: float | None


class HitRatio(Record):
    """Part of the prompt that was found in the cache, by tokens and by full blocks."""

    tokens: TierRatios
    blocks: TierRatios


class WindowStorage(StorageCounts):
    """Storage operations that completed inside the window, and their rates.

    `read_peak_gib_per_s` is the rate of the second in which all ranks together read most, `read_burst_ratio` that over
    the mean.
    """

    read_gib_per_s: float | None
    write_gib_per_s: float | None
    read_peak_gib_per_s: float | None
    read_burst_ratio: float | None


class Client(Record):
    """What the client cost, and whether it, not the storage, was the limit."""

    cpu_s: float
    cpu_ms_per_gib: float | None
    payload_cpu_s: float
    payload_cpu_share: float | None
    sampling_cpu_s: float
    cpu_wait_s: float | None
    max_rss_bytes: int
    os_read_bytes: int | None
    os_written_bytes: int | None
    loop_lag_p99_ms: float | None
    bottleneck: bool
    bottleneck_reason: str | None


class TtftParts(Record):
    """What the mean TTFT is made of, part after part, and the part of all that reading from storage took."""

    client_late_mean_ms: float | None
    lookup_mean_ms: float | None
    storage_load_mean_ms: float | None
    dram_load_mean_ms: float | None
    prefill_queue_mean_ms: float | None
    prefill_mean_ms: float | None
    storage_share: float | None


class BreakEven(Record):
    """Whether reading cached tokens from storage beat computing them, over the requests that read any.

    `prefill_tokens_per_s` is the rate at which their tokens would have been computed, `read_gib_per_s_needed` the
    bandwidth at which reading takes as long, `load_gib_per_s` what the loads got.
    """

    prefill_tokens_per_s: float | None
    read_gib_per_s_needed: float | None
    load_gib_per_s: float | None
    storage_loads: int
    storage_slower_loads: int | None
    storage_saved_mean_ms: float | None


class Saved(Record):
    """What all tiers together saved of the TTFT of each request, in full compute times; may be negative."""

    requests: int
    slower_requests: int
    mean_ms: float | None
    p5_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    histogram: SignedHistogramData

    @classmethod
    def of(cls, saved: SignedHistogram) -> "Saved":
        """The figures of a histogram of savings."""

        def ms(value_ns: float | None) -> float | None:
            return None if value_ns is None else round(value_ns / 1e6, 6)

        return cls(
            requests=saved.count,
            slower_requests=saved.losses.count,
            mean_ms=ms(saved.mean_ns),
            p5_ms=ms(saved.percentile_ns(5)),
            p50_ms=ms(saved.percentile_ns(50)),
            p95_ms=ms(saved.percentile_ns(95)),
            histogram=SignedHistogramData.of(saved),
        )


class ReuseDistance(Record):
    """Size of the different blocks that lie between two uses of a block: an LRU cache that large would just keep it."""

    first_use_share: float | None
    p50_gib: float | None
    p90_gib: float | None
    p99_gib: float | None


class Slo(Record):
    """The verdict, None where too few requests completed to tell, and how many requests a second met the target."""

    ttft_p95_ms_target: float
    met: bool | None
    within_target: float | None
    goodput_per_s: float | None


class Spread(Record):
    """A number over the trials; `stdev` is the sample's, `cv` it over the mean; None with less than two trials."""

    values: tuple[float, ...]
    mean: float
    min: float
    max: float
    stdev: float | None
    cv: float | None


class Trials(Record):
    """How much the trials differ; a number is None where a trial did not have it."""

    count: int
    storage_gib_per_s: Spread | None
    read_gib_per_s: Spread | None
    write_gib_per_s: Spread | None
    requests_per_s: Spread | None
    hit_ratio_tokens: Spread | None
    ttft_p50_ms: Spread | None
    ttft_p95_ms: Spread | None


class Clock(Record):
    """How common the common start was: most that a rank's clock may be off, and how far apart ranks really began."""

    max_offset_error_ms: float
    start_skew_ms: float


class RankSummary(Record):
    """One rank's share, for a table; its rates divide by the run's window, so that they add up."""

    rank: int
    host: str
    status: RunStatus
    requests_completed: int
    hit_ratio_tokens: float | None
    read_gib_per_s: float | None
    write_gib_per_s: float | None
    ttft_p95_ms: float | None
    storage_read_p50_ms: float | None


class Straggler(Record):
    """A rank that is far from the others, and in what."""

    rank: int
    host: str
    reason: str


class HostSummary(Record):
    """One host's share. Times count from the start of the common window, by the clock of rank 0."""

    host: str
    ranks: int
    first_done_s: float
    last_done_s: float
    read_gib_per_s: float | None
    write_gib_per_s: float | None


class DeviceUse(Record):
    """The block device below a host's cache directory inside the window, whoever used it; see `results.devices`."""

    host: str
    device: str
    covered_s: float
    read_gib_per_s: float
    write_gib_per_s: float
    busy_share: float


class Summary(Record):
    """`summary.json` of a KV-cache run."""

    schema_version: int = SCHEMA_VERSION
    benchmark_type: BENCHMARK_TYPES = BENCHMARK_TYPES.kv_cache
    run_id: str
    status: RunStatus
    error: str | None
    workload_digest: str
    operations_digest: str
    trials: Trials | None
    incomplete_ranks: tuple[IncompleteRank, ...]
    clock: Clock
    window: Window
    requests: RequestRates
    hit_ratio: HitRatio
    storage: WindowStorage
    storage_total: StorageCounts
    latency: dict[str, Latency]
    client: Client
    ttft_parts: TtftParts
    saved: Saved
    breakeven: BreakEven
    reuse_distance: ReuseDistance
    slo: Slo
    verify_failures: tuple[str, ...]
    dropped_page_cache_bytes: int | None
    reuse: Reuse | None
    hosts: tuple[HostSummary, ...]
    devices: tuple[DeviceUse, ...]
    ranks: tuple[RankSummary, ...]
    stragglers: tuple[Straggler, ...]
