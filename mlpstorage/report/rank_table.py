"""The ranks of a run, one a row, and what is to be said of some."""

from collections.abc import Iterator, Mapping

from rich.table import Table
from rich.text import Text

from mlpstorage.config import RunStatus
from mlpstorage.report.tables import BAD, STATUS_STYLES, WARN, cell_text, new_table, note
from mlpstorage.report.text import percent_text, plain, significant
from mlpstorage.results.models import IncompleteRank
from mlpstorage.results.summary import RankPercentile, RankSummary, Summary

RANKS_SHOWN = 16
"""Rows that fit on a screen; the summary has all ranks."""

_WORST_OF: Mapping[str, str] = {"ttft": "TTFT", "storage_read": "storage read", "storage_write": "storage write"}

_NAMED = 3
"""Ranks that are named one by one in notes."""


def ranks_table(summary: Summary) -> Table:
    """All ranks, or those that one should look at: not complete, stragglers, and then the slowest readers."""
    table = new_table("Rank", "requests", "hits", "read GiB/s", "write GiB/s", "TTFT p95", "status")
    table.columns[0].min_width = None
    table.add_column("host", overflow="fold")
    for rank in _shown(summary):
        numbers = (
            f"{rank.requests_completed:,}",
            percent_text(rank.hit_ratio_tokens),
            significant(rank.read_gib_per_s),
            significant(rank.write_gib_per_s),
            significant(rank.ttft_p95_ms),
        )
        status = Text(rank.status, style=STATUS_STYLES.get(rank.status, ""))
        table.add_row(str(rank.rank), *map(cell_text, numbers), status, Text(plain(rank.host)))
    left_out = len(summary.ranks) - RANKS_SHOWN
    if left_out > 0:
        table.add_row(f"and {left_out} more")
    return table


def worst_table(summary: Summary) -> Table:
    """The highest percentiles of any one rank, and whose they are."""
    table = new_table("Worst rank", "p50 ms", "rank", "p95 ms", "rank", "p99 ms", "rank")
    for key, name in _WORST_OF.items():
        texts: list[str] = []
        for one in _highest(summary, key):
            texts += (significant(None), significant(None)) if one is None else (significant(one.ms), str(one.rank))
        table.add_row(name, *map(cell_text, texts))
    return table


def _highest(summary: Summary, latency: str) -> tuple[RankPercentile | None, ...]:
    highest = summary.latency[latency].highest_of_ranks
    return (None,) * 3 if highest is None else (highest.p50_ms, highest.p95_ms, highest.p99_ms)


def ranks_numbers_missing(summary: Summary) -> bool:
    """Whether any number of a rank that is shown is not there."""
    rows = _shown(summary)
    return any(None in _highest(summary, latency) for latency in _WORST_OF) or any(
        None in (row.hit_ratio_tokens, row.read_gib_per_s, row.write_gib_per_s, row.ttft_p95_ms) for row in rows
    )


def _shown(summary: Summary) -> list[RankSummary]:
    stragglers = {one.rank for one in summary.stragglers}

    def urgency(rank: RankSummary) -> tuple[bool, bool, float, int]:
        return (
            rank.status is RunStatus.COMPLETE,
            rank.rank not in stragglers,
            rank.read_gib_per_s or 0.0,
            rank.rank,
        )

    return sorted(sorted(summary.ranks, key=urgency)[:RANKS_SHOWN], key=lambda rank: rank.rank)


def rank_notes(summary: Summary) -> Iterator[Text]:
    """The ranks that left no final result, and those that are far from the others."""
    incomplete, stragglers = summary.incomplete_ranks, summary.stragglers
    for one in incomplete[:_NAMED]:
        yield note(BAD, _incomplete_text(one))
    if len(incomplete) > _NAMED:
        yield note(BAD, f"{len(incomplete) - _NAMED} more ranks left no final result")
    for straggler in stragglers[:_NAMED]:
        where = f"rank {straggler.rank} on {plain(straggler.host)}"
        yield note(WARN, f"straggler: {where}: {plain(straggler.reason)}")
    if len(stragglers) > _NAMED:
        yield note(WARN, f"{len(stragglers) - _NAMED} more stragglers")


def _incomplete_text(one: IncompleteRank) -> str:
    where = "" if one.host is None else f" on {plain(one.host)}"
    if one.last_seen_s is None:
        return f"rank {one.rank}{where} left no final result and was never heard of"
    return f"rank {one.rank}{where} left no final result; last heard of {one.last_seen_s:.1f} s after the start"
