"""One summary of all ranks: counts are added, histograms are added, percentiles are never averaged."""

import hashlib
from collections.abc import Iterable, Sequence

from mlpstorage.config import GIB, RunStatus
from mlpstorage.measure.histogram import Histogram
from mlpstorage.results.models import (
    LATENCIES,
    BreakEven,
    Client,
    HitRatio,
    HostSummary,
    Latency,
    RankResult,
    RequestRates,
    Slo,
    StorageCounts,
    Summary,
    TierCounts,
    TierRatios,
    Window,
    WindowStorage,
)

BOTTLENECK_CPU_SHARE = 0.9
"""The client is the bottleneck where a host's ranks used more than this part of its processor time in the window."""

BOTTLENECK_LOOP_LAG_MS = 20.0
"""The client is the bottleneck where the 99th percentile of the event loops' lag, of all ranks, is above this."""

_SEVERITY = (RunStatus.COMPLETE, RunStatus.RUNNING, RunStatus.INTERRUPTED, RunStatus.FAILED)
"""A rank's status, the worst last. A rank that left `running` behind never finished, which is worse than complete."""


def merge_ranks(
    ranks: Sequence[RankResult], *, prefill_tokens_per_s: float, bytes_per_token: int, ttft_p95_ms_target: float
) -> Summary:
    """The summary of a run.

    Args:
        ranks: Result of each rank, at least one, in any order.
        prefill_tokens_per_s: Tokens that one engine of the pacing model computes in a second.
        bytes_per_token: Bytes of KV cache of one token of the model.
        ttft_p95_ms_target: Target of the verdict, in ms.

    Raises:
        ValueError: `ranks` is empty or mixes runs.
    """
    if len({rank.run_id for rank in ranks}) != 1:
        raise ValueError("ranks of exactly one run can be merged")
    ordered = sorted(ranks, key=lambda rank: rank.rank)
    window = _window(ordered)
    storage = _storage_sum(rank.storage for rank in ordered)
    latency = _latency(ordered)
    status = max((rank.status for rank in ordered), key=_SEVERITY.index)
    return Summary(
        run_id=ordered[0].run_id,
        status=status,
        error=_error(ordered, status),
        workload_digest=_workload_digest(ordered),
        window=window,
        requests=_request_rates(ordered, window.measured_s),
        hit_ratio=_hit_ratio(ordered),
        storage=WindowStorage(
            **storage.model_dump(),
            read_gib_per_s=_ratio(storage.read_bytes / GIB, window.measured_s),
            write_gib_per_s=_ratio(storage.written_bytes / GIB, window.measured_s),
        ),
        storage_total=_storage_sum(rank.storage_total for rank in ordered),
        latency=latency,
        client=_client(ordered, storage),
        breakeven=_breakeven(ordered, prefill_tokens_per_s, bytes_per_token),
        slo=_slo(latency["ttft"], ttft_p95_ms_target),
        hosts=_hosts(ordered, window.measured_s),
    )


def _ratio(part: float, whole: float) -> float | None:
    """`part / whole`; None where there is no whole."""
    return part / whole if whole else None


def _sum_or_none(values: Iterable[int | None]) -> int | None:
    """The sum; None where any value could not be had, since a partial sum would pass for the whole."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _window(ranks: Sequence[RankResult]) -> Window:
    return Window(
        warmup_s=max(rank.window.warmup_s for rank in ranks),
        measured_s=max(rank.window.measured_s for rank in ranks),
        drain_s=max(rank.window.drain_s for rank in ranks),
        requests_in_flight_at_end=sum(rank.window.requests_in_flight_at_end for rank in ranks),
    )


def _request_rates(ranks: Sequence[RankResult], measured_s: float) -> RequestRates:
    completed = sum(rank.requests.completed for rank in ranks)
    return RequestRates(
        completed=completed,
        failed=sum(rank.requests.failed for rank in ranks),
        rate_per_s=_ratio(completed, measured_s),
        prompt_tokens_per_s=_ratio(sum(rank.requests.prompt_tokens for rank in ranks), measured_s),
        cached_tokens_per_s=_ratio(sum(rank.requests.cached_tokens.total for rank in ranks), measured_s),
        output_tokens_per_s=_ratio(sum(rank.requests.output_tokens for rank in ranks), measured_s),
    )


def _hit_ratio(ranks: Sequence[RankResult]) -> HitRatio:
    return HitRatio(
        tokens=_tier_ratios(
            [rank.requests.cached_tokens for rank in ranks], sum(rank.requests.prompt_tokens for rank in ranks)
        ),
        blocks=_tier_ratios(
            [rank.requests.hit_blocks for rank in ranks], sum(rank.requests.prompt_blocks for rank in ranks)
        ),
    )


def _tier_ratios(found: Sequence[TierCounts], whole: int) -> TierRatios:
    return TierRatios(
        gpu=_ratio(sum(counts.gpu for counts in found), whole),
        cpu=_ratio(sum(counts.cpu for counts in found), whole),
        storage=_ratio(sum(counts.storage for counts in found), whole),
        total=_ratio(sum(counts.total for counts in found), whole),
    )


def _storage_sum(parts: Iterable[StorageCounts]) -> StorageCounts:
    totals = dict.fromkeys(StorageCounts.model_fields, 0)
    for part in parts:
        for name, value in part.model_dump().items():
            totals[name] += value
    return StorageCounts(**totals)


def _latency(ranks: Sequence[RankResult]) -> dict[str, Latency]:
    names = dict.fromkeys((*LATENCIES, *(name for rank in ranks for name in rank.latency)))
    return {
        name: Latency.of(Histogram.merged(rank.latency[name].restore() for rank in ranks if name in rank.latency))
        for name in names
    }


def _client(ranks: Sequence[RankResult], storage: StorageCounts) -> Client:
    cpu_s = sum(rank.client.cpu_s for rank in ranks)
    moved_bytes = storage.read_bytes + storage.written_bytes + storage.padding_bytes
    lag_p99_ms = Latency.of(Histogram.merged(rank.client.loop_lag.restore() for rank in ranks)).p99_ms
    return Client(
        cpu_s=cpu_s,
        cpu_ms_per_gib=_ratio(cpu_s * 1000, moved_bytes / GIB),
        max_rss_bytes=max(rank.client.max_rss_bytes for rank in ranks),
        os_read_bytes=_sum_or_none(rank.client.os_read_bytes for rank in ranks),
        os_written_bytes=_sum_or_none(rank.client.os_written_bytes for rank in ranks),
        loop_lag_p99_ms=lag_p99_ms,
        bottleneck=(lag_p99_ms is not None and lag_p99_ms > BOTTLENECK_LOOP_LAG_MS)
        or any(_host_saturated(on_host) for on_host in _by_host(ranks).values()),
    )


def _host_saturated(on_host: Sequence[RankResult]) -> bool:
    """Whether the ranks of one host used nearly all of its processor time in their window.

    The host's cores are counted once, however many ranks share them.
    """
    cores = max(rank.client.cores for rank in on_host)
    measured_s = max(rank.window.measured_s for rank in on_host)
    cpu_s = sum(rank.client.cpu_s for rank in on_host)
    return measured_s > 0 and cpu_s > BOTTLENECK_CPU_SHARE * measured_s * cores


def _breakeven(ranks: Sequence[RankResult], prefill_tokens_per_s: float, bytes_per_token: int) -> BreakEven:
    saved_ns = sum(rank.requests.ttft_saved_ns for rank in ranks)
    return BreakEven(
        prefill_tokens_per_s=prefill_tokens_per_s,
        read_gib_per_s_needed=prefill_tokens_per_s * bytes_per_token / GIB,
        ttft_saved_mean_ms=_ratio(saved_ns / 1e6, sum(rank.requests.ttft_saved_requests for rank in ranks)),
    )


def _slo(ttft: Latency, target_ms: float) -> Slo:
    return Slo(ttft_p95_ms_target=target_ms, met=None if ttft.p95_ms is None else ttft.p95_ms <= target_ms)


def _by_host(ranks: Sequence[RankResult]) -> dict[str, list[RankResult]]:
    hosts: dict[str, list[RankResult]] = {}
    for rank in ranks:
        hosts.setdefault(rank.host, []).append(rank)
    return hosts


def _hosts(ranks: Sequence[RankResult], measured_s: float) -> tuple[HostSummary, ...]:
    """Each host's share, in order of its first rank. Rates divide by the run's window, so that they add up."""
    summaries = []
    for host, on_host in _by_host(ranks).items():
        done_s = [rank.window.measured_s + rank.window.drain_s for rank in on_host]
        storage = _storage_sum(rank.storage for rank in on_host)
        summaries.append(
            HostSummary(
                host=host,
                ranks=len(on_host),
                first_done_s=min(done_s),
                last_done_s=max(done_s),
                read_gib_per_s=_ratio(storage.read_bytes / GIB, measured_s),
                write_gib_per_s=_ratio(storage.written_bytes / GIB, measured_s),
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


def _workload_digest(ranks: Sequence[RankResult]) -> str:
    """The rank's own digest, or the SHA-256 of all ranks' digests, in rank order, one a line."""
    if len(ranks) == 1:
        return ranks[0].workload_digest
    return hashlib.sha256("".join(f"{rank.workload_digest}\n" for rank in ranks).encode()).hexdigest()
