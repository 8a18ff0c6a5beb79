"""The shapes of what a run leaves behind, frozen; unknown keys are refused.

Every number has its unit in its name; what could not be had is None, never 0. `docs/numbers.md` defines each.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from mlpstorage.config import BENCHMARK_TYPES, RunStatus
from mlpstorage.measure.histogram import SCHEME, Histogram

SCHEMA_VERSION = 2
"""Version of metadata, summary and rank files.

1: first version.
2: layouts, profiles, policies, verification failures, client cost.
"""


class Record(BaseModel):
    """Base of all result models."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HistogramData(Record):
    """An exported histogram: bucket number to count, in the layout named by `scheme`."""

    scheme: Literal["log-linear-7"] = SCHEME
    counts: dict[int, int]
    sum_ns: int
    min_ns: int | None
    max_ns: int | None

    @classmethod
    def of(cls, histogram: Histogram) -> "HistogramData":
        """The export of `histogram`."""
        return cls(
            counts=dict(sorted(histogram.counts.items())),
            sum_ns=histogram.sum_ns,
            min_ns=histogram.min_ns,
            max_ns=histogram.max_ns,
        )

    def restore(self) -> Histogram:
        """The histogram that was exported."""
        return Histogram.restored(self.counts, self.sum_ns, self.min_ns, self.max_ns)


class TierCounts(Record):
    """A count for each tier in which something was found."""

    gpu: int
    cpu: int
    storage: int

    @property
    def total(self) -> int:
        """Sum over the tiers."""
        return self.gpu + self.cpu + self.storage


class RankWindow(Record):
    """When a rank measured. `start_unix_s` is the wall-clock time at which the measured window began."""

    start_unix_s: float | None
    warmup_s: float
    measured_s: float
    drain_s: float
    requests_in_flight_at_end: int


class RequestCounts(Record):
    """Requests whose answer was complete inside the window, and what was found for them.

    Of those, `loads_skipped` computed what storage held because it was too little, `loads_abandoned` because loading it
    took too long; neither is part of what was found.
    """

    completed: int
    failed: int
    loads_skipped: int
    loads_abandoned: int
    prompt_tokens: int
    output_tokens: int
    prompt_blocks: int
    cached_tokens: TierCounts
    hit_blocks: TierCounts
    ttft_saved_ns: int
    ttft_saved_requests: int


class StorageCounts(Record):
    """Storage operations of one phase. Bytes are payload; padding is counted apart, for reads and writes together.

    Operations and bytes are of objects, one a kv rank; `writes_dropped` and `writes_deferred` are blocks.
    `page_cache_bytes` is the part of what was read that can have come from the page cache, padding included; None where
    that is not known of some read. `writes_deferred` were not stored because it was their first use.
    """

    read_bytes: int
    written_bytes: int
    padding_bytes: int
    deleted_bytes: int
    read_ops: int
    write_ops: int
    delete_ops: int
    sync_ops: int
    retries: int
    direct_files: int
    buffered_files: int
    page_cache_bytes: int | None
    io_errors: int
    verify_errors: int
    verified_bytes: int
    writes_dropped: int
    writes_deferred: int
    dedup_skipped_bytes: int


class RankClient(Record):
    """What the client itself used. All times are of the window, the rest is of the whole process.

    `payload_cpu_s` is the part of `cpu_s` that filling, stamping and checking payloads took. `cpu_wait_s` is how long
    threads were ready to run and waited for a processor, summed over threads; None where the kernel does not tell.
    """

    cpu_s: float
    payload_cpu_s: float
    cpu_wait_s: float | None
    cores: int
    max_rss_bytes: int
    os_read_bytes: int | None
    os_written_bytes: int | None
    loop_lag: HistogramData


class Sample(Record):
    """One line of the time series: counters since the rank began, taken `t_s` seconds after that."""

    rank: int
    t_s: float
    phase: Literal["warmup", "window", "drain"]
    requests_completed: int
    requests_in_flight: int
    prompt_tokens: int
    cached_tokens: int
    read_bytes: int
    written_bytes: int
    deleted_bytes: int
    read_gib_per_s: float
    write_gib_per_s: float
    storage_used_bytes: int
    cpu_used_bytes: int
    write_queue_blocks: int


class Reuse(Record):
    """What a run with `--reuse-cache` found in its place. Sums over ranks, but for `rebuild_s`, the longest of any."""

    objects: int
    bytes: int
    damaged_objects: int
    incomplete_blocks: int
    foreign_entries: int
    rebuild_s: float


class RankError(Record):
    """Why a rank did not complete."""

    exit_code: int
    message: str


LATENCIES = (
    "ttft",
    "request_load",
    "lookup",
    "storage_read",
    "storage_write",
    "storage_delete",
    "storage_sync",
    "queue_wait",
    "write_behind",
)
"""The latencies that every rank records."""


class RankResult(Record):
    """All that one rank measured. Stored as `ranks/rank_<N>.json`, without the time series."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    rank: int
    host: str
    status: RunStatus
    error: RankError | None
    workload_digest: str
    window: RankWindow
    requests: RequestCounts
    storage: StorageCounts
    storage_total: StorageCounts
    latency: dict[str, HistogramData]
    client: RankClient
    verify_failures: tuple[str, ...]
    dropped_page_cache_bytes: int | None
    reuse: Reuse | None
    host_facts: dict[str, object]
    samples: tuple[Sample, ...]


class Latency(Record):
    """A latency in milliseconds. A percentile is None where fewer than ten samples lie above it."""

    count: int
    mean_ms: float | None
    min_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None
    histogram: HistogramData

    @classmethod
    def of(cls, histogram: Histogram) -> "Latency":
        """The figures of `histogram`."""

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
            histogram=HistogramData.of(histogram),
        )


class Window(Record):
    """The phases of the run, in seconds; of several ranks, the longest of each."""

    warmup_s: float
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
    """Part of the prompt that each tier held, 0 to 1."""

    gpu: float | None
    cpu: float | None
    storage: float | None
    total: float | None


class HitRatio(Record):
    """Part of the prompt that was found in the cache, by tokens and by full blocks."""

    tokens: TierRatios
    blocks: TierRatios


class WindowStorage(StorageCounts):
    """Storage operations that completed inside the window, and their rates."""

    read_gib_per_s: float | None
    write_gib_per_s: float | None


class Client(Record):
    """What the client cost, and whether it, not the storage, was the limit."""

    cpu_s: float
    cpu_ms_per_gib: float | None
    payload_cpu_s: float
    payload_cpu_share: float | None
    cpu_wait_s: float | None
    max_rss_bytes: int
    os_read_bytes: int | None
    os_written_bytes: int | None
    loop_lag_p99_ms: float | None
    bottleneck: bool
    bottleneck_reason: str | None


class BreakEven(Record):
    """When reading a cached token beats computing it again."""

    prefill_tokens_per_s: float | None
    read_gib_per_s_needed: float | None
    ttft_saved_mean_ms: float | None


class Slo(Record):
    """The verdict: None where too few requests completed to tell."""

    ttft_p95_ms_target: float
    met: bool | None


class HostSummary(Record):
    """One host's share. Times count from the start of its ranks' measured window."""

    host: str
    ranks: int
    first_done_s: float
    last_done_s: float
    read_gib_per_s: float | None
    write_gib_per_s: float | None


class Summary(Record):
    """`summary.json` of a KV-cache run."""

    schema_version: int = SCHEMA_VERSION
    benchmark_type: BENCHMARK_TYPES = BENCHMARK_TYPES.kv_cache
    run_id: str
    status: RunStatus
    error: str | None
    workload_digest: str
    window: Window
    requests: RequestRates
    hit_ratio: HitRatio
    storage: WindowStorage
    storage_total: StorageCounts
    latency: dict[str, Latency]
    client: Client
    breakeven: BreakEven
    slo: Slo
    verify_failures: tuple[str, ...]
    dropped_page_cache_bytes: int | None
    reuse: Reuse | None
    hosts: tuple[HostSummary, ...]
