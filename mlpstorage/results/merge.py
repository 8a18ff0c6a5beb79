"""One summary of all ranks: counts are added, histograms are added, percentiles are never averaged."""

import math
from collections.abc import Iterable, Sequence

from mlpstorage.config import GIB, RunStatus
from mlpstorage.measure.histogram import Histogram, SignedHistogram
from mlpstorage.measure.reuse import percentile_of
from mlpstorage.results.adding import added, added_buckets, joined_digest, ratio, sum_or_none
from mlpstorage.results.devices import device_use
from mlpstorage.results.models import (
    LATENCIES,
    IncompleteRank,
    RankResult,
    Reuse,
    StorageCounts,
    TierCounts,
    TtftCounts,
)
from mlpstorage.results.rank_table import rank_summaries, stragglers
from mlpstorage.results.summary import (
    BreakEven,
    Client,
    Clock,
    HitRatio,
    HostSummary,
    Latency,
    RequestRates,
    ReuseDistance,
    Saved,
    Slo,
    Summary,
    TierRatios,
    Trials,
    TtftParts,
    Window,
    WindowStorage,
)

BOTTLENECK_CPU_SHARE = 0.9
"""The client is the bottleneck where a host's ranks used more than this part of its processor time in the window."""

BOTTLENECK_LOOP_LAG_MS = 20.0
"""The client is the bottleneck where the 99th percentile of the event loops' lag, of all ranks, is above this."""

BOTTLENECK_WAIT_SHARE_OF_STORAGE = 0.25
BOTTLENECK_WAIT_SHARE_OF_WINDOW = 0.1
"""The client is the bottleneck where the threads of a host's ranks waited for a processor for more than the first part
of the time that counts as storage I/O, and for more than the second part of the window: what passes for the storage's
time is then in good part the scheduler's."""

VERIFY_FAILURES_KEPT = 100
"""Messages of verification failures that a summary keeps; their number is in `storage_total.verify_errors`."""

_STORAGE_LATENCIES = ("storage_read", "storage_write", "storage_delete", "storage_sync")

_T_S_ROUNDING_S = 0.0006

_SEVERITY = (RunStatus.COMPLETE, RunStatus.RUNNING, RunStatus.INTERRUPTED, RunStatus.FAILED)
"""A rank's status, the worst last. A rank that left `running` behind never finished, which is worse than complete."""


def merge_ranks(
    ranks: Sequence[RankResult],
    *,
    bytes_per_token: int,
    block_tokens: int,
    ttft_p95_ms_target: float,
    timeseries_interval_s: float,
    trials: Trials | None = None,
    incomplete_ranks: Sequence[IncompleteRank] = (),
) -> Summary:
    """The summary of a run.

    Args:
        ranks: Result of each rank, at least one, in any order; of several trials, those that `pooled` gives.
        bytes_per_token: Bytes of KV cache of one token of the model.
        block_tokens: Tokens of a block.
        ttft_p95_ms_target: Target of the verdict, in ms.
        timeseries_interval_s: Distance of two lines of the time series.
        trials: How much the trials differ; None where there was one.
        incomplete_ranks: Those without a final result; what they told last may be among `ranks`.

    Raises:
        ValueError: `ranks` is empty or mixes runs.
    """
    if len({rank.run_id for rank in ranks}) != 1:
        raise ValueError("ranks of exactly one run can be merged")
    ordered = sorted(ranks, key=lambda rank: rank.rank)
    window = _window(ordered)
    storage = _storage_sum(rank.storage for rank in ordered)
    latency = _latency(ordered)
    tokens = added(TtftCounts, [rank.first_tokens for rank in ordered])
    peak_gib_per_s = _read_peak_gib_per_s(ordered, timeseries_interval_s)
    read_gib_per_s = ratio(storage.read_bytes / GIB, window.measured_s)
    status = max((rank.status for rank in ordered), key=_SEVERITY.index)
    return Summary(
        run_id=ordered[0].run_id,
        status=status,
        error=_error(ordered, status),
        workload_digest=joined_digest([rank.workload_digest for rank in ordered]),
        operations_digest=joined_digest([rank.operations_digest for rank in ordered]),
        trials=trials,
        incomplete_ranks=tuple(incomplete_ranks),
        clock=_clock(ordered),
        window=window,
        requests=_request_rates(ordered, window.measured_s),
        hit_ratio=_hit_ratio(ordered),
        storage=WindowStorage(
            **storage.model_dump(),
            read_gib_per_s=read_gib_per_s,
            write_gib_per_s=ratio(storage.written_bytes / GIB, window.measured_s),
            read_peak_gib_per_s=peak_gib_per_s,
            read_burst_ratio=None if peak_gib_per_s is None or not read_gib_per_s else peak_gib_per_s / read_gib_per_s,
        ),
        storage_total=_storage_sum(rank.storage_total for rank in ordered),
        latency=latency,
        client=_client(ordered, storage),
        ttft_parts=_ttft_parts(tokens),
        saved=Saved.of(SignedHistogram.merged(rank.saved.restore() for rank in ordered)),
        breakeven=_breakeven(tokens, bytes_per_token),
        reuse_distance=_reuse_distance(ordered, bytes_per_token * block_tokens),
        slo=_slo(latency["ttft"], ttft_p95_ms_target, tokens, window.measured_s),
        verify_failures=tuple(one for rank in ordered for one in rank.verify_failures)[:VERIFY_FAILURES_KEPT],
        dropped_page_cache_bytes=sum_or_none(rank.dropped_page_cache_bytes for rank in ordered),
        reuse=_reuse(ordered),
        hosts=_hosts(ordered, window.measured_s),
        devices=device_use(ordered),
        ranks=rank_summaries(ordered, window.measured_s),
        stragglers=stragglers(ordered),
    )


def _clock(ranks: Sequence[RankResult]) -> Clock:
    late_ns = [rank.clock.start_late_ns for rank in ranks]
    return Clock(
        max_offset_error_ms=max(rank.clock.offset_error_ns for rank in ranks) / 1e6,
        start_skew_ms=(max(late_ns) - min(late_ns)) / 1e6,
    )


def _window(ranks: Sequence[RankResult]) -> Window:
    return Window(
        warmup_s=max(rank.window.warmup_s for rank in ranks),
        warmup_steady=_all_steady(rank.window.warmup_steady for rank in ranks),
        measured_s=max(rank.window.measured_s for rank in ranks),
        drain_s=max(rank.window.drain_s for rank in ranks),
        requests_in_flight_at_end=sum(rank.window.requests_in_flight_at_end for rank in ranks),
    )


def _request_rates(ranks: Sequence[RankResult], measured_s: float) -> RequestRates:
    completed = sum(rank.requests.completed for rank in ranks)
    return RequestRates(
        completed=completed,
        failed=sum(rank.requests.failed for rank in ranks),
        loads_skipped=sum(rank.requests.loads_skipped for rank in ranks),
        loads_abandoned=sum(rank.requests.loads_abandoned for rank in ranks),
        rate_per_s=ratio(completed, measured_s),
        prompt_tokens_per_s=ratio(sum(rank.requests.prompt_tokens for rank in ranks), measured_s),
        cached_tokens_per_s=ratio(sum(rank.requests.cached_tokens.total for rank in ranks), measured_s),
        output_tokens_per_s=ratio(sum(rank.requests.output_tokens for rank in ranks), measured_s),
    )


def _hit_ratio(ranks: Sequence[RankResult]) -> HitRatio:
    return HitRatio(
        tokens=_tier_ratios(
            [rank.requests.cached_tokens for rank in ranks],
            sum(rank.requests.prompt_tokens for rank in ranks),
            sum(rank.requests.cross_rank_tokens for rank in ranks),
        ),
        blocks=_tier_ratios(
            [rank.requests.hit_blocks for rank in ranks],
            sum(rank.requests.prompt_blocks for rank in ranks),
            sum(rank.requests.cross_rank_blocks for rank in ranks),
        ),
    )


def _tier_ratios(found: Sequence[TierCounts], whole: int, cross_rank: int) -> TierRatios:
    return TierRatios(
        gpu=ratio(sum(counts.gpu for counts in found), whole),
        cpu=ratio(sum(counts.cpu for counts in found), whole),
        storage=ratio(sum(counts.storage for counts in found), whole),
        total=ratio(sum(counts.total for counts in found), whole),
        cross_rank=ratio(cross_rank, whole),
    )


def _storage_sum(parts: Iterable[StorageCounts]) -> StorageCounts:
    return added(StorageCounts, list(parts))


def _reuse(ranks: Sequence[RankResult]) -> Reuse | None:
    found = [rank.reuse for rank in ranks if rank.reuse is not None]
    if not found:
        return None
    return Reuse(
        objects=sum(one.objects for one in found),
        bytes=sum(one.bytes for one in found),
        damaged_objects=sum(one.damaged_objects for one in found),
        incomplete_blocks=sum(one.incomplete_blocks for one in found),
        foreign_entries=sum(one.foreign_entries for one in found),
        rebuild_s=max(one.rebuild_s for one in found),
    )


def _latency(ranks: Sequence[RankResult]) -> dict[str, Latency]:
    latency: dict[str, Latency] = {}
    for name in dict.fromkeys((*LATENCIES, *(name for rank in ranks for name in rank.latency))):
        of_ranks = {rank.rank: rank.latency[name].restore() for rank in ranks if name in rank.latency}
        # The highest of one rank among several says something even where the others have no samples.
        latency[name] = Latency.of(Histogram.merged(of_ranks.values()), of_ranks if len(ranks) > 1 else None)
    return latency


def _client(ranks: Sequence[RankResult], storage: StorageCounts) -> Client:
    cpu_s = sum(rank.client.cpu_s for rank in ranks)
    payload_cpu_s = sum(rank.client.payload_cpu_s for rank in ranks)
    waits_s = [rank.client.cpu_wait_s for rank in ranks if rank.client.cpu_wait_s is not None]
    moved_bytes = storage.read_bytes + storage.written_bytes + storage.padding_bytes
    lag_p99_ms = Latency.of(Histogram.merged(rank.client.loop_lag.restore() for rank in ranks)).p99_ms
    reason = _bottleneck(ranks, lag_p99_ms)
    return Client(
        cpu_s=cpu_s,
        cpu_ms_per_gib=ratio(cpu_s * 1000, moved_bytes / GIB),
        payload_cpu_s=payload_cpu_s,
        payload_cpu_share=ratio(payload_cpu_s, cpu_s),
        sampling_cpu_s=sum(rank.client.sampling_cpu_s for rank in ranks),
        cpu_wait_s=sum(waits_s) if len(waits_s) == len(ranks) else None,
        max_rss_bytes=max(rank.client.max_rss_bytes for rank in ranks),
        os_read_bytes=sum_or_none(rank.client.os_read_bytes for rank in ranks),
        os_written_bytes=sum_or_none(rank.client.os_written_bytes for rank in ranks),
        loop_lag_p99_ms=lag_p99_ms,
        bottleneck=reason is not None,
        bottleneck_reason=reason,
    )


def _bottleneck(ranks: Sequence[RankResult], lag_p99_ms: float | None) -> str | None:
    """Why the processor, not the storage, may have been the limit; None where no rule says so."""
    for host, on_host in _by_host(ranks).items():
        reason = _saturated(on_host) or _starved(on_host)
        if reason is not None:
            return f"{host}: {reason}"
    if lag_p99_ms is not None and lag_p99_ms > BOTTLENECK_LOOP_LAG_MS:
        return f"the event loop was {lag_p99_ms:.1f} ms late at p99, over {BOTTLENECK_LOOP_LAG_MS:g} ms"
    return None


def _saturated(on_host: Sequence[RankResult]) -> str | None:
    """Whether the ranks of one host used nearly all of its processor time in their window.

    The host's cores are counted once, however many ranks share them.
    """
    cores = max(rank.client.cores for rank in on_host)
    measured_s = max(rank.window.measured_s for rank in on_host)
    share = ratio(sum(rank.client.cpu_s for rank in on_host), measured_s * cores)
    if share is None or share <= BOTTLENECK_CPU_SHARE:
        return None
    return f"the client used {share:.1%} of the processor time of {cores} cores, over {BOTTLENECK_CPU_SHARE:.0%}"


def _starved(on_host: Sequence[RankResult]) -> str | None:
    """Whether the ranks of one host waited for processors so long that it shows in the storage's latencies.

    A rank whose wait is not known counts on neither side: its latencies would make the others' wait look small.
    """
    measured_s = max(rank.window.measured_s for rank in on_host)
    wait_s, storage_s = 0.0, 0.0
    for rank in on_host:
        if rank.client.cpu_wait_s is not None:
            wait_s += rank.client.cpu_wait_s
            storage_s += sum(rank.latency[name].sum_ns for name in _STORAGE_LATENCIES) / 1e9
    if wait_s <= BOTTLENECK_WAIT_SHARE_OF_WINDOW * measured_s:
        return None
    if wait_s <= BOTTLENECK_WAIT_SHARE_OF_STORAGE * storage_s:
        return None
    return (
        f"the client's threads waited {wait_s:.1f} s for a processor, over {BOTTLENECK_WAIT_SHARE_OF_STORAGE:.0%} of "
        f"the {storage_s:.1f} s that count as storage I/O"
    )


def _ttft_parts(tokens: TtftCounts) -> TtftParts:
    parts_ns = (
        tokens.client_late_ns,
        tokens.lookup_ns,
        tokens.storage_load_ns,
        tokens.dram_load_ns,
        tokens.prefill_queue_ns,
        tokens.prefill_ns,
    )
    late, lookup, storage, dram, queue, prefill = (ratio(part_ns / 1e6, tokens.requests) for part_ns in parts_ns)
    return TtftParts(
        client_late_mean_ms=late,
        lookup_mean_ms=lookup,
        storage_load_mean_ms=storage,
        dram_load_mean_ms=dram,
        prefill_queue_mean_ms=queue,
        prefill_mean_ms=prefill,
        storage_share=ratio(tokens.storage_load_ns, sum(parts_ns)),
    )


def _breakeven(tokens: TtftCounts, bytes_per_token: int) -> BreakEven:
    recompute_ns = tokens.storage_recompute_ns
    loaded_gib = tokens.storage_load_tokens * bytes_per_token / GIB
    return BreakEven(
        prefill_tokens_per_s=None if recompute_ns is None else ratio(tokens.storage_load_tokens * 1e9, recompute_ns),
        read_gib_per_s_needed=None if recompute_ns is None else ratio(loaded_gib * 1e9, recompute_ns),
        load_gib_per_s=ratio(loaded_gib * 1e9, tokens.storage_loads_ns),
        storage_loads=tokens.storage_loads,
        storage_slower_loads=tokens.storage_slower_loads,
        storage_saved_mean_ms=None
        if recompute_ns is None
        else ratio((recompute_ns - tokens.storage_loads_ns) / 1e6, tokens.storage_loads),
    )


def _reuse_distance(ranks: Sequence[RankResult], block_bytes: int) -> ReuseDistance:
    distances = added_buckets([rank.reuse_distance.distances for rank in ranks])
    sample_weight = max(rank.reuse_distance.sample_weight for rank in ranks)
    first_uses = sum(rank.reuse_distance.first_uses for rank in ranks)

    def gib(percent: float) -> float | None:
        blocks = percentile_of(distances, percent, sample_weight)
        return None if blocks is None else blocks * block_bytes / GIB

    return ReuseDistance(
        first_use_share=ratio(first_uses, first_uses + sum(distances.values())),
        p50_gib=gib(50),
        p90_gib=gib(90),
        p99_gib=gib(99),
    )


def _slo(ttft: Latency, target_ms: float, tokens: TtftCounts, measured_s: float) -> Slo:
    return Slo(
        ttft_p95_ms_target=target_ms,
        met=None if ttft.p95_ms is None else ttft.p95_ms <= target_ms,
        within_target=ratio(tokens.within_target, tokens.requests),
        goodput_per_s=ratio(tokens.within_target, measured_s),
    )


def _read_peak_gib_per_s(ranks: Sequence[RankResult], interval_s: float) -> float | None:
    """Most that all ranks together read in an interval of the window: their samples' rates added, line by line.

    A line is never early, and one that is a whole interval late is left out, so that a rank has one line at most in
    each; `t_s` is rounded to milliseconds.
    """
    of_line: dict[int, float] = {}
    for rank in ranks:
        for sample in rank.samples:
            if sample.phase == "window":
                line = math.floor((sample.t_s + _T_S_ROUNDING_S) / interval_s)
                of_line[line] = of_line.get(line, 0.0) + sample.read_gib_per_s
    return max(of_line.values(), default=None)


def _all_steady(steady: Iterable[bool | None]) -> bool | None:
    known = [one for one in steady if one is not None]
    return all(known) if known else None


def _by_host(ranks: Sequence[RankResult]) -> dict[str, list[RankResult]]:
    hosts: dict[str, list[RankResult]] = {}
    for rank in ranks:
        hosts.setdefault(rank.host, []).append(rank)
    return hosts


def _hosts(ranks: Sequence[RankResult], measured_s: float) -> tuple[HostSummary, ...]:
    """Each host's share, in order of its first rank. Rates divide by the run's window, so that they add up.

    All warm-ups began at the same moment: what follows on a rank counts from there, and so can be compared.
    """
    summaries = []
    window_s = min(rank.window.warmup_s for rank in ranks)
    for host, on_host in _by_host(ranks).items():
        done_s = [rank.window.warmup_s + rank.window.measured_s + rank.window.drain_s - window_s for rank in on_host]
        storage = _storage_sum(rank.storage for rank in on_host)
        summaries.append(
            HostSummary(
                host=host,
                ranks=len(on_host),
                first_done_s=min(done_s),
                last_done_s=max(done_s),
                read_gib_per_s=ratio(storage.read_bytes / GIB, measured_s),
                write_gib_per_s=ratio(storage.written_bytes / GIB, measured_s),
            )
        )
    return tuple(summaries)


def _error(ranks: Sequence[RankResult], status: RunStatus) -> str | None:
    """The first error of a rank that gave the run its status: where one rank fails, the others are only interrupted."""
    with_error = [rank for rank in ranks if rank.error is not None]
    first = next((rank for rank in with_error if rank.status is status), next(iter(with_error), None))
    if first is None or first.error is None:
        return None
    where = f"rank {first.rank} on {first.host}: " if len(ranks) > 1 else ""
    return where + first.error.message
