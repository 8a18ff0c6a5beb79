"""The shapes of what a rank leaves behind, frozen; unknown keys are refused. `results.summary` has those of a run.

Every number has its unit in its name; what could not be had is None, never 0. `docs/numbers.md` defines each.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from mlpstorage.config import RunStatus
from mlpstorage.measure.histogram import SCHEME, Histogram, SignedHistogram

SCHEMA_VERSION = 3
"""Version of metadata, summary and rank files.

1: first version.
2: layouts, profiles, policies, verification failures, client cost.
3: arrivals, accelerators, what TTFT is made of and what the cache saved, reuse distances, digest of operations, trials.
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
    """When a rank measured. `start_unix_s` is the wall-clock time at which the measured window began.

    `warmup_steady` tells whether the hit ratio was steady when the warm-up ended; None where that was not waited for.
    """

    start_unix_s: float | None
    warmup_s: float
    warmup_steady: bool | None
    measured_s: float
    drain_s: float
    requests_in_flight_at_end: int


class RankClock(Record):
    """This rank's clock and that of rank 0, and how well it kept the common start.

    `offset_ns` is how far rank 0's clock was ahead before the start, `offset_error_ns` the most that it can be wrong.
    `start_late_ns` is how much later than at the agreed moment the rank began.
    """

    offset_ns: int
    offset_error_ns: int
    start_late_ns: int


class RequestCounts(Record):
    """Requests whose answer was complete inside the window, and what was found for them.

    Of those, `loads_skipped` computed what storage held because it was too little, `loads_abandoned` because loading it
    took too long; neither is part of what was found. `cross_rank_tokens` and `cross_rank_blocks` are those of what was
    found on storage that another rank had written.
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
    cross_rank_tokens: int
    cross_rank_blocks: int


class TtftCounts(Record):
    """Sums over the first tokens that came inside the window; see `kvcache.recorder.FirstToken` for the parts.

    `storage_loads` are the requests that used something read from storage; of those alone are `storage_load_tokens`,
    `storage_loads_ns` (the times of their reads), `storage_recompute_ns` (what computing the tokens would have taken)
    and `storage_slower_loads` (where it would have taken less); the last two None where compute is not modelled.
    """

    requests: int
    within_target: int
    client_late_ns: int
    lookup_ns: int
    storage_load_ns: int
    dram_load_ns: int
    prefill_queue_ns: int
    prefill_ns: int
    storage_loads: int
    storage_load_tokens: int
    storage_loads_ns: int
    storage_recompute_ns: int | None
    storage_slower_loads: int | None


class SignedHistogramData(Record):
    """An exported histogram of differences: those from 0 up, and the amounts of the negative ones."""

    gains: HistogramData
    losses: HistogramData

    def restore(self) -> SignedHistogram:
        """The histogram that was exported."""
        return SignedHistogram(self.gains.restore(), self.losses.restore())

    @classmethod
    def of(cls, histogram: SignedHistogram) -> "SignedHistogramData":
        """The export of `histogram`."""
        return cls(gains=HistogramData.of(histogram.gains), losses=HistogramData.of(histogram.losses))


class ReuseDistanceData(Record):
    """How many different blocks lie between two uses of a block; see `measure.reuse`.

    `distances` counts them by bucket (of blocks, in the layout of the histograms), `first_uses` those that were no
    second use; both are estimates where blocks had to be sampled: one of `sample_weight` blocks at the end.
    """

    first_uses: float
    distances: dict[int, float]
    sample_weight: int


class StorageCounts(Record):
    """Storage operations of one phase. Bytes are payload; padding is counted apart, for reads and writes together.

    Operations and bytes are of objects, one a kv rank; `writes_dropped` and `writes_deferred` are blocks.
    `page_cache_bytes` is the part of what was read that can have come from the page cache, padding included; None where
    that is not known of some read. `writes_deferred` were not stored because it was their first use. `exists_ops` are
    objects that were looked for, `reads_gone` and `deletes_gone` those that another rank had deleted meanwhile.
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
    exists_ops: int
    reads_gone: int
    deletes_gone: int


class RankClient(Record):
    """What the client itself used. All times are of the window, the rest is of the whole process.

    `payload_cpu_s` is the part of `cpu_s` that filling, stamping and checking payloads took. `cpu_wait_s` is how long
    threads were ready to run and waited for a processor, summed over threads; None where the kernel does not tell.
    `sampling_cpu_s` is the part of `cpu_s` that the lines of both time series took.
    """

    cpu_s: float
    payload_cpu_s: float
    sampling_cpu_s: float
    cpu_wait_s: float | None
    cores: int
    max_rss_bytes: int
    os_read_bytes: int | None
    os_written_bytes: int | None
    loop_lag: HistogramData


Phase = Literal["warmup", "window", "drain"]


class Sample(Record):
    """One line of the time series: counters since the rank began, taken `t_s` seconds after that."""

    rank: int
    t_s: float
    phase: Phase
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


class CpuShares(Record):
    """Parts of the processor time of all cores since the line before; they add up to 1."""

    user_share: float
    system_share: float
    iowait_share: float
    steal_share: float
    idle_share: float


class HostMemory(Record):
    """Memory of the host at this moment, of /proc/meminfo."""

    available_bytes: int | None
    cached_bytes: int | None
    dirty_bytes: int | None


class VmRates(Record):
    """Of /proc/vmstat: what went to and from block devices and swap since the line before, and pages at this moment."""

    page_in_bytes_per_s: float | None
    page_out_bytes_per_s: float | None
    swap_in_bytes_per_s: float | None
    swap_out_bytes_per_s: float | None
    file_pages_bytes: int | None
    dirty_bytes: int | None
    writeback_bytes: int | None


class DiskRates(Record):
    """One block device since the line before, whoever used it; `in_flight` as of this moment.

    `busy_share` is the part of the time in which any request was in flight.
    """

    reads_per_s: float | None
    read_bytes_per_s: float | None
    read_mean_ms: float | None
    writes_per_s: float | None
    written_bytes_per_s: float | None
    write_mean_ms: float | None
    busy_share: float | None
    queue_mean: float | None
    in_flight: int


class NetRates(Record):
    """One network interface since the line before; `errors` and `drops` of both directions."""

    received_bytes_per_s: float | None
    received_packets_per_s: float | None
    sent_bytes_per_s: float | None
    sent_packets_per_s: float | None
    errors_per_s: float | None
    drops_per_s: float | None


class HostSample(Record):
    """One line of a host's time series, over the `interval_s` seconds that end `t_s` after its first rank began.

    A part is None where the host does not tell; a device or interface, where it has gone or come since the line before.
    """

    host: str
    t_s: float
    interval_s: float
    phase: Phase
    cpu: CpuShares | None
    memory: HostMemory | None
    vm: VmRates | None
    disks: dict[str, DiskRates | None] | None
    networks: dict[str, NetRates | None] | None


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


class IncompleteRank(Record):
    """A rank that left no final result, and when it was last heard of, in seconds since the common start.

    `host` and `last_seen_s` are None where it was never heard of.
    """

    rank: int
    host: str | None
    last_seen_s: float | None


LATENCIES = (
    "ttft",
    "ttft_without_storage",
    "ttft_without_cache",
    "client_late",
    "prefill_queue",
    "request_load",
    "storage_load",
    "lookup",
    "storage_read",
    "storage_write",
    "storage_delete",
    "storage_sync",
    "queue_wait",
    "write_behind",
    "existence_check",
)
"""The latencies that every rank records."""


class RankResult(Record):
    """All that one rank measured. Stored as `ranks/rank_<N>.json`, without the time series.

    `host_samples` are those of its host, which the host's lowest rank takes; the others have none.
    """

    schema_version: int = SCHEMA_VERSION
    run_id: str
    rank: int
    host: str
    status: RunStatus
    error: RankError | None
    workload_digest: str
    operations_digest: str
    clock: RankClock
    window: RankWindow
    requests: RequestCounts
    first_tokens: TtftCounts
    saved: SignedHistogramData
    reuse_distance: ReuseDistanceData
    storage: StorageCounts
    storage_total: StorageCounts
    latency: dict[str, HistogramData]
    client: RankClient
    verify_failures: tuple[str, ...]
    dropped_page_cache_bytes: int | None
    reuse: Reuse | None
    host_facts: dict[str, object]
    samples: tuple[Sample, ...]
    host_samples: tuple[HostSample, ...]
