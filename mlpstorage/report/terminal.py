"""What the terminal shows at the end of a run."""

import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mlpstorage.config import RunStatus
from mlpstorage.report.meaning import (
    breakeven_text,
    goodput_text,
    parts_text,
    reuse_text,
    saved_text,
    slower_than_recompute,
    steady_text,
    ttft_text,
    writes_text,
)
from mlpstorage.report.rank_table import rank_notes, ranks_numbers_missing, ranks_table, worst_table
from mlpstorage.report.tables import BAD, FAINT, GOOD, HEAD, STATUS_STYLES, WARN, cell_text, new_table, note
from mlpstorage.report.text import (
    NOT_AVAILABLE,
    bytes_text,
    percent_text,
    plain,
    significant,
    time_text,
    with_unit,
)
from mlpstorage.results.models import StorageCounts
from mlpstorage.results.summary import DeviceUse, Latency, Summary, TierRatios, Trials

_PIPE_WIDTH = 100_000
"""Columns of an output that is no terminal: nothing is cut or wrapped for a screen that is not there."""

_READING_WIDTH = 100
"""Longer lines of prose are hard to read, and an output that is no terminal has no other limit."""

_FAILURES_SHOWN = 3
"""Verification failures that are shown one by one; the summary keeps more."""

_DEVICES_SHOWN = 4
"""Devices that are shown, the busiest first; the summary has those of all hosts."""

_LATENCY_NAMES = {
    "ttft": "TTFT",
    "ttft_without_storage": "  no storage",
    "ttft_without_cache": "  no cache",
    "client_late": "client late",
    "lookup": "lookup",
    "request_load": "request load",
    "storage_load": "  of storage",
    "prefill_queue": "prefill queue",
    "queue_wait": "queue wait",
    "write_behind": "write-behind",
}


def console_for(stream: TextIO | None = None) -> Console:
    """A console on `stream` (default: standard output) that neither cuts nor wraps where that is no terminal."""
    target = sys.stdout if stream is None else stream
    return Console(file=target, width=None if target.isatty() else _PIPE_WIDTH, highlight=False)


def headline(summary: Summary) -> str:
    """The run's two main numbers."""
    read, ttft_ms = significant(summary.storage.read_gib_per_s), significant(summary.latency["ttft"].p95_ms)
    return f"{with_unit(read, 'GiB/s')} read, TTFT p95 {with_unit(ttft_ms, 'ms')}"


def summary_table(summary: Summary, *, metadata: Mapping[str, object]) -> RenderableType:
    """The end of a run: a verdict in words, the numbers, and what must not be overlooked.

    Args:
        summary: The numbers.
        metadata: The run's metadata; `model`, `num_users`, `ranks` and the trace in `parameters` are used.
    """
    body: list[RenderableType] = [
        *_banner(summary),
        _verdict(summary, metadata),
        Text(),
        _storage_table(summary),
        Text(),
        _latency_table(summary),
        Text(),
        _hit_table(summary),
        Text(),
    ]
    if summary.trials is not None:
        body += [_trials_table(summary.trials), Text()]
    if len(summary.hosts) > 1:
        body += [_hosts_table(summary), Text()]
    if len(summary.ranks) > 1:
        body += [worst_table(summary), Text(), ranks_table(summary), Text()]
    body.append(_facts(summary, metadata))
    attention = list(_attention(summary, metadata))
    if attention:
        body += [Text(), *attention]
    if _numbers_missing(summary):
        missing = f"{NOT_AVAILABLE}: not measured, or too few samples (a percentile needs ten above it)"
        body += [Text(), Text(missing, style=FAINT)]
    return _Narrow(Group(*body))


class _Narrow:
    """Content that is laid out for at most `_READING_WIDTH` columns."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Yield the content as a console of that width would show it."""
        yield from console.render(self._content, options.update(width=min(options.max_width, _READING_WIDTH)))


def facts_grid() -> Table:
    """A grid of labels and texts that may be long."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=HEAD, no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _banner(summary: Summary) -> Iterator[RenderableType]:
    if summary.status is not RunStatus.COMPLETE:
        style = STATUS_STYLES.get(summary.status, BAD)
        yield Text(f"RUN {summary.status.upper()}: the numbers are PARTIAL, up to where it stopped", style=style)
    if summary.error:
        yield Text(plain(summary.error), style=BAD, overflow="fold")
    if summary.status is not RunStatus.COMPLETE or summary.error:
        yield Text()


def _verdict(summary: Summary, metadata: Mapping[str, object]) -> Text:
    """The run in a few sentences, for a reader who reads no further."""
    tokens, slo = summary.hit_ratio.tokens, summary.slo
    text = Text(f"{_load_text(metadata)} this storage served ")
    if tokens.total is None:
        text.append("nothing: no request was completed in the measured window. ")
    else:
        text.append(f"{percent_text(tokens.storage)} of the prompt tokens (all tiers {percent_text(tokens.total)}), ")
        text.append(f"{ttft_text(summary)}. ")
    target = f"the target of {time_text(slo.ttft_p95_ms_target)}"
    if slo.met is None:
        text.append(f"Too few requests were completed to tell whether TTFT p95 meets {target}.", style=WARN)
    else:
        text.append("It ")
        text.append(f"{'MEETS' if slo.met else 'MISSES'} {target}", style=GOOD if slo.met else BAD)
        text.append("." if summary.status is RunStatus.COMPLETE else ", as far as the partial numbers tell.")
    if slower_than_recompute(summary):
        text.append(" Reading tokens from this storage was SLOWER than computing them again.", style=BAD)
    return text


def _load_text(metadata: Mapping[str, object]) -> str:
    """What was played: users of each rank, a trace, or requests at a rate, which is of all ranks together."""
    recorded = metadata.get("parameters")
    parameters: Mapping[str, object] = recorded if isinstance(recorded, Mapping) else {}
    model = plain(metadata.get("model") or "a model not recorded")
    ranks = _planned_ranks(metadata) or 1
    on_ranks = f" on {plain(ranks)} ranks" if ranks != 1 else ""
    trace, rate = parameters.get("trace"), parameters.get("request_rate")
    name = None if trace is None else plain(trace).rstrip("/").rpartition("/")[2]
    if rate is not None:
        of_trace = "" if name is None else f" of the trace {name}"
        return f"At {_number(rate)} requests a second{of_trace} to {model}{on_ranks}"
    if name is not None:
        return f"With the trace {name} played to {model}{on_ranks}"
    users = plain(metadata.get("num_users", parameters.get("num_users", NOT_AVAILABLE)))
    return f"At {users} users of {model}{on_ranks.replace(' on', ' on each of')}"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else plain(value)


def _planned_ranks(metadata: Mapping[str, object]) -> object:
    return metadata.get("ranks") or metadata.get("num_processes")


def _storage_table(summary: Summary) -> Table:
    storage = summary.storage
    rows: tuple[tuple[str, str, int, int | None, str], ...] = (
        ("read", significant(storage.read_gib_per_s), storage.read_ops, storage.read_bytes, "storage_read"),
        ("write", significant(storage.write_gib_per_s), storage.write_ops, storage.written_bytes, "storage_write"),
        ("delete", "-", storage.delete_ops, storage.deleted_bytes, "storage_delete"),
    )
    if storage.sync_ops:
        rows += (("sync", "-", storage.sync_ops, None, "storage_sync"),)
    table = new_table("Storage", "GiB/s", "ops", "bytes", "p50 ms", "p95 ms", "p99 ms")
    for name, rate, ops, moved_bytes, latency_name in rows:
        latency = summary.latency[latency_name]
        percentiles = (latency.p50_ms, latency.p95_ms, latency.p99_ms)
        texts = (rate, f"{ops:,}", "-" if moved_bytes is None else bytes_text(moved_bytes))
        table.add_row(name, *map(cell_text, (*texts, *map(significant, percentiles))))
    return table


def _latency_table(summary: Summary) -> Table:
    table = new_table("Latency", "count", "mean ms", "p50 ms", "p95 ms", "p99 ms", "max ms")
    for key, name in _LATENCY_NAMES.items():
        latency: Latency = summary.latency[key]
        values = (latency.mean_ms, latency.p50_ms, latency.p95_ms, latency.p99_ms, latency.max_ms)
        table.add_row(name, f"{latency.count:,}", *map(cell_text, map(significant, values)))
    return table


def _hit_table(summary: Summary) -> Table:
    both = (summary.hit_ratio.tokens, summary.hit_ratio.blocks)
    crosses = any(ratios.cross_rank for ratios in both)
    table = new_table("Cache hits", "GPU", "CPU", "storage", "total", *(["of other ranks"] if crosses else []))
    for name, ratios in (("of tokens", summary.hit_ratio.tokens), ("of blocks", summary.hit_ratio.blocks)):
        tiers: TierRatios = ratios
        shown = (tiers.gpu, tiers.cpu, tiers.storage, tiers.total, *((tiers.cross_rank,) if crosses else ()))
        table.add_row(name, *map(cell_text, map(percent_text, shown)))
    return table


def _hosts_table(summary: Summary) -> Table:
    table = new_table("Host", "ranks", "read GiB/s", "write GiB/s", "first done", "last done")
    table.columns[0].overflow = "fold"
    table.columns[0].no_wrap = False
    for host in summary.hosts:
        rates = map(significant, (host.read_gib_per_s, host.write_gib_per_s))
        done = (f"{seconds:.1f} s" for seconds in (host.first_done_s, host.last_done_s))
        table.add_row(Text(plain(host.host)), str(host.ranks), *map(cell_text, rates), *done)
    return table


def _facts(summary: Summary, metadata: Mapping[str, object]) -> Table:
    requests, window, client, breakeven = summary.requests, summary.window, summary.client, summary.breakeven
    grid = facts_grid()
    grid.add_row(
        "Requests",
        f"{requests.completed:,} completed, {significant(requests.rate_per_s)} a second; tokens a second: "
        f"{significant(requests.prompt_tokens_per_s)} prompt, {significant(requests.cached_tokens_per_s)} cached, "
        f"{significant(requests.output_tokens_per_s)} output",
    )
    grid.add_row("Goodput", goodput_text(summary))
    grid.add_row(
        "Window",
        f"{window.measured_s:.1f} s measured after {window.warmup_s:.1f} s of warm-up{steady_text(window)}; "
        f"{window.drain_s:.1f} s of drain",
    )
    if len(summary.ranks) > 1:
        skew, error = map(significant, (summary.clock.start_skew_ms, summary.clock.max_offset_error_ms))
        grid.add_row("Common start", f"ranks began within {skew} ms; their clocks are known to {error} ms")
    grid.add_row("TTFT is made of", parts_text(summary.ttft_parts))
    grid.add_row("Break-even", breakeven_text(breakeven))
    grid.add_row("Saved", saved_text(summary.saved))
    grid.add_row("Reuse", reuse_text(summary.reuse_distance))
    grid.add_row("Writes", writes_text(summary.storage))
    if summary.storage.read_burst_ratio is not None:
        grid.add_row(
            "Read bursts",
            f"{significant(summary.storage.read_peak_gib_per_s)} GiB/s in the peak {_interval_text(metadata)}, "
            f"{significant(summary.storage.read_burst_ratio)} times the mean",
        )
    cpu, lag, wait = map(significant, (client.cpu_ms_per_gib, client.loop_lag_p99_ms, client.cpu_wait_s))
    grid.add_row(
        "Client",
        f"CPU {with_unit(cpu, 'ms')} per GiB moved, {client.cpu_s:.1f} s in all, "
        f"{percent_text(client.payload_cpu_share)} of it for stamps and checks; waited {with_unit(wait, 's')} for a "
        f"processor; peak RSS of a rank {bytes_text(client.max_rss_bytes)}; loop lag p99 {with_unit(lag, 'ms')}",
    )
    for use in sorted(summary.devices, key=lambda one: -one.busy_share)[:_DEVICES_SHOWN]:
        grid.add_row("Device", _device_text(use, several=len(summary.hosts) > 1))
    if summary.reuse is not None:
        reuse = summary.reuse
        grid.add_row(
            "Reused",
            f"{reuse.objects:,} objects ({bytes_text(reuse.bytes)}) of an earlier run, "
            f"found in {reuse.rebuild_s:.2f} s",
        )
    return grid


def _interval_text(metadata: Mapping[str, object]) -> str:
    """The distance of two lines of the time series in words."""
    parameters = metadata.get("parameters")
    interval_s = parameters.get("timeseries_interval", 1) if isinstance(parameters, Mapping) else 1
    return "second" if interval_s == 1 else f"{_number(interval_s)} s"


def _device_text(use: DeviceUse, *, several: bool) -> str:
    """What all programs did with a device: where it is more than the run's own part, others used it, too."""
    where = f" of {plain(use.host)}" if several else ""
    return (
        f"{plain(use.device)}{where}: {significant(use.read_gib_per_s)} GiB/s read and "
        f"{significant(use.write_gib_per_s)} GiB/s written by all programs, {percent_text(use.busy_share)} busy"
    )


def _trials_table(trials: Trials) -> Table:
    table = new_table(f"{trials.count} trials", "mean", "min", "max", "stdev", "CV")
    for name, spread in (
        ("storage GiB/s", trials.storage_gib_per_s),
        ("read GiB/s", trials.read_gib_per_s),
        ("write GiB/s", trials.write_gib_per_s),
        ("requests/s", trials.requests_per_s),
        ("hit ratio", trials.hit_ratio_tokens),
        ("TTFT p50 ms", trials.ttft_p50_ms),
        ("TTFT p95 ms", trials.ttft_p95_ms),
    ):
        values = (None,) * 4 if spread is None else (spread.mean, spread.min, spread.max, spread.stdev)
        table.add_row(
            name, *map(cell_text, map(significant, values)), cell_text(percent_text(spread.cv if spread else None))
        )
    return table


def _attention(summary: Summary, metadata: Mapping[str, object]) -> Iterator[Text]:
    """What changes the meaning of the numbers above, the worst first."""
    storage, total = summary.storage, summary.storage_total
    in_flight = summary.window.requests_in_flight_at_end
    measured_ranks, planned_ranks = sum(host.ranks for host in summary.hosts), _planned_ranks(metadata)
    if isinstance(planned_ranks, int) and measured_ranks < planned_ranks:
        yield note(BAD, f"only {measured_ranks} of {planned_ranks} ranks left numbers")
    yield from rank_notes(summary)
    for style, name, count, meaning in (
        (BAD, "verify errors", _worst(storage, total, "verify_errors"), "reads that returned WRONG DATA"),
        (BAD, "I/O errors", _worst(storage, total, "io_errors"), "storage operations that failed"),
        (BAD, "failed requests", summary.requests.failed, "inside the window"),
        (WARN, "dropped writes", _worst(storage, total, "writes_dropped"), "blocks that were not stored"),
        (WARN, "abandoned loads", summary.requests.loads_abandoned, "they took too long and were computed instead"),
        (WARN, "retries", _worst(storage, total, "retries"), "storage requests that had to be sent again"),
        (WARN, "buffered files", _worst(storage, total, "buffered_files"), _page_cache_text(storage)),
    ):
        if count:
            yield note(style, f"{name}: {count:,} ({meaning})")
    for failure in summary.verify_failures[:_FAILURES_SHOWN]:
        yield note(BAD, plain(failure))
    if summary.requests.completed and not storage.read_ops:
        yield note(
            WARN,
            "nothing was read from storage inside the window: the faster tiers held all that was found; "
            "run longer, or lower --gpu-mem-gb and --cpu-mem-gb",
        )
    if summary.client.bottleneck_reason is not None:
        reason = plain(summary.client.bottleneck_reason)
        yield note(WARN, f"client bottleneck: the client, not the storage, may be the limit ({reason})")
    if in_flight:
        yield note("", f"in flight at the end of the window: {in_flight:,} (requests that are not counted)")


def _page_cache_text(storage: StorageCounts) -> str:
    """What is known of the page cache's part in buffered reads."""
    if storage.page_cache_bytes is None:
        return "the page cache is part of these numbers; how much of it cannot be known"
    if not storage.read_bytes:
        return "the page cache is part of these numbers"
    # Padding counts in what the page cache held, but not in the bytes read.
    part = percent_text(min(storage.page_cache_bytes / storage.read_bytes, 1.0))
    return f"the page cache is part of these numbers; of what was read it held {part} beforehand"


def _worst(window: StorageCounts, total: StorageCounts, name: str) -> int:
    """A count of what went wrong in any phase."""
    return max(int(getattr(window, name) or 0), int(getattr(total, name) or 0))


def _numbers_missing(summary: Summary) -> bool:
    """Whether any number that the report shows is not there."""
    sync = ("storage_sync",) if summary.storage.sync_ops else ()
    names = (*_LATENCY_NAMES, "storage_read", "storage_write", "storage_delete", *sync)
    groups = (
        *(summary.latency[name] for name in names),
        summary.hit_ratio.tokens,
        summary.requests,
        summary.storage,
        summary.ttft_parts,
        summary.slo,
        summary.reuse_distance,
        *(() if summary.trials is None else (summary.trials,)),
    )
    # A burst has a line of its own, which is left out; that there is no verdict is said in words.
    not_shown = {"p90_ms", "p999_ms", "page_cache_bytes", "p99_gib", "read_peak_gib_per_s", "read_burst_ratio", "met"}
    not_shown.add("highest_of_ranks")
    shown_missing = (value is None for group in groups for name, value in group if name not in not_shown)
    client, saved = summary.client, summary.saved
    of_client = (client.cpu_ms_per_gib, client.payload_cpu_share, client.cpu_wait_s, client.loop_lag_p99_ms)
    of_ranks = len(summary.ranks) > 1 and ranks_numbers_missing(summary)
    return any(shown_missing) or None in of_client or (saved.requests > 0 and saved.p50_ms is None) or of_ranks
