"""Each rank beside the others, and those that are far from them."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from mlpstorage.config import GIB
from mlpstorage.results.adding import ratio
from mlpstorage.results.models import RankResult
from mlpstorage.results.summary import RankSummary, Straggler

STRAGGLER_FACTOR = 2.0
"""A rank is a straggler where its median read takes longer than so many times the median of the other ranks' medians,
or where it moved less than the others' median over this."""

STRAGGLER_MIN_OPS = 20
"""Reads and writes that the others must have done, in the median, before their bytes say anything. (A median read is
given from 20 reads on too.)"""


def rank_summaries(ranks: Sequence[RankResult], measured_s: float) -> tuple[RankSummary, ...]:
    """A row a rank. Rates divide by `measured_s`, the run's window."""
    return tuple(_row(rank, measured_s) for rank in ranks)


def _row(rank: RankResult, measured_s: float) -> RankSummary:
    ttft_p95_ns = rank.latency["ttft"].restore().percentile_ns(95)
    read_p50_ns = rank.latency["storage_read"].restore().percentile_ns(50)
    return RankSummary(
        rank=rank.rank,
        host=rank.host,
        status=rank.status,
        requests_completed=rank.requests.completed,
        hit_ratio_tokens=ratio(rank.requests.cached_tokens.total, rank.requests.prompt_tokens),
        read_gib_per_s=ratio(rank.storage.read_bytes / GIB, measured_s),
        write_gib_per_s=ratio(rank.storage.written_bytes / GIB, measured_s),
        ttft_p95_ms=None if ttft_p95_ns is None else round(ttft_p95_ns / 1e6, 6),
        storage_read_p50_ms=None if read_p50_ns is None else round(read_p50_ns / 1e6, 6),
    )


def stragglers(ranks: Sequence[RankResult]) -> tuple[Straggler, ...]:
    """The ranks whose reads take much longer, or that moved much less, than those of the others; none with one rank."""
    read_ns = {
        rank.rank: p50_ns
        for rank in ranks
        if (p50_ns := rank.latency["storage_read"].restore().percentile_ns(50)) is not None
    }
    moved = {rank.rank: rank.storage.read_bytes + rank.storage.written_bytes for rank in ranks}
    ops = {rank.rank: rank.storage.read_ops + rank.storage.write_ops for rank in ranks}
    others_read_ns, others_moved, others_ops = map(_medians_of_others, (read_ns, moved, ops))
    found = []
    for rank in ranks:
        number, reasons = rank.rank, []
        if number in others_read_ns and read_ns[number] > STRAGGLER_FACTOR * others_read_ns[number]:
            reasons.append(
                f"its median read took {read_ns[number] / 1e6:.2f} ms, that of the others "
                f"{others_read_ns[number] / 1e6:.2f} ms"
            )
        if others_ops.get(number, 0) >= STRAGGLER_MIN_OPS and moved[number] * STRAGGLER_FACTOR < others_moved[number]:
            reasons.append(
                f"it moved {moved[number] / GIB:.2f} GiB, the others {others_moved[number] / GIB:.2f} GiB each"
            )
        if reasons:
            found.append(Straggler(rank=number, host=rank.host, reason=", and ".join(reasons)))
    return tuple(found)


def _medians_of_others(values: Mapping[int, int]) -> dict[int, float]:
    """For each rank the median of all others' values; nothing where there is no other."""
    ordered = sorted(values.values())
    others = len(ordered) - 1
    if not others:
        return {}
    medians: dict[int, float] = {}
    for rank, value in values.items():
        own = bisect_left(ordered, value)
        middle = (ordered[place + (place >= own)] for place in ((others - 1) // 2, others // 2))
        medians[rank] = sum(middle) / 2
    return medians
