"""`history list` and `history show`, for people and for scripts."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from pydantic import ValidationError
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mlpstorage.history import RunEntry
from mlpstorage.report.tables import STATUS_STYLES
from mlpstorage.report.terminal import facts_grid, summary_table
from mlpstorage.report.text import plain, seconds_text
from mlpstorage.results.summary import (
    Summary,
)

_RESULT_DIR_MIN_COLUMNS = 32
"""A result directory that is folded into fewer columns is hard to read and to copy."""

_HOSTS_SHOWN = 2
_CLUSTER_LINES = 60
_MEASURE_COLUMNS = 100_000
_ABSENT = "-"


def history_table(entries: Sequence[RunEntry]) -> RenderableType:
    """The runs, in the given order: one line each where the console is wide enough, else a few lines each.

    No id and no result directory is ever cut. `console_for` gives a console that is wide enough for any line where the
    output is no terminal.
    """
    return _History(entries) if entries else Text("no runs")


def history_json(entries: Sequence[RunEntry]) -> list[dict[str, object]]:
    """The runs as JSON takes them, under the names that the metadata uses."""
    return [
        {
            "run_id": entry.run_id,
            "run_datetime": entry.run_datetime,
            "benchmark_type": entry.benchmark_type,
            "model": entry.model,
            "command": entry.command,
            "num_processes": entry.ranks,
            "hosts": list(entry.hosts),
            "status": entry.status,
            "exit_code": entry.exit_code,
            "runtime_s": entry.runtime_s,
            "headline": entry.headline,
            "result_dir": entry.result_dir,
            "labels": dict(entry.labels),
            "metadata_path": str(entry.metadata_path),
        }
        for entry in entries
    ]


def run_details(entry: RunEntry, summary: Mapping[str, object] | None) -> RenderableType:
    """One run whole.

    Args:
        entry: The run.
        summary: Content of its `summary.json`; None where it has none.
    """
    body: list[RenderableType] = [_identity(entry), *_parameters(entry.metadata), *_cluster(entry.metadata)]
    if summary is not None:
        body += [Text(), _numbers(summary, entry.metadata)]
    return Group(*body)


class _History:
    """A list of runs that takes the form that fits the console."""

    def __init__(self, entries: Sequence[RunEntry]) -> None:
        self._entries = entries

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield a table, or a few lines a run where a table would not fit."""
        unlimited = options.update(width=_MEASURE_COLUMNS)
        all_hosts = _lines_table(self._entries, hosts_shown=None)
        table = _lines_table(self._entries, hosts_shown=_HOSTS_SHOWN)
        width = Measurement.get(console, unlimited, table).maximum
        longest = max(len(_result_dir(entry)) for entry in self._entries)
        if Measurement.get(console, unlimited, all_hosts).maximum <= options.max_width:
            yield all_hosts
        elif width - longest + min(longest, _RESULT_DIR_MIN_COLUMNS) <= options.max_width:
            yield table
        else:
            yield from (_stacked(entry) for entry in self._entries)


def _lines_table(entries: Sequence[RunEntry], *, hosts_shown: int | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("id", "when", "benchmark", "model", "command"):
        table.add_column(heading, no_wrap=True)
    table.add_column("ranks", no_wrap=True, justify="right")
    table.add_column("hosts", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("run time", no_wrap=True, justify="right")
    table.add_column("headline", no_wrap=True)
    table.add_column("result directory", overflow="fold")
    for entry in entries:
        table.add_row(
            Text(plain(entry.run_id), style="bold"),
            Text(_when(entry)),
            _text(entry.benchmark_type),
            _text(entry.model),
            _text(entry.command),
            str(entry.ranks),
            Text(_hosts(entry, hosts_shown)),
            _status(entry),
            _run_time(entry),
            _text(entry.headline),
            Text(_result_dir(entry)),
        )
    return table


def _stacked(entry: RunEntry) -> RenderableType:
    """A run in three or four lines, none of which needs more than 80 columns but for a long path, which is folded."""
    first = Text.assemble((plain(entry.run_id), "bold"), "  ", _status(entry), f"  {_run_time(entry)}")
    ranks = f"{entry.ranks} {'rank' if entry.ranks == 1 else 'ranks'}"
    where = f" on {_hosts(entry, _HOSTS_SHOWN)}" if entry.hosts else ""
    what = f"{entry.benchmark_type} {entry.command} {entry.model or ''}".rstrip()
    lines = [first, Text(f"  {_when(entry)}  {plain(what)}, {ranks}{plain(where)}")]
    if entry.headline:
        lines.append(Text(f"  {plain(entry.headline)}"))
    lines.append(Text(f"  {_result_dir(entry)}", overflow="fold"))
    return Group(*lines)


def _text(value: str | None) -> Text:
    return Text(plain(value or _ABSENT))


def _when(entry: RunEntry) -> str:
    """The time of the run in a form that one reads; what is not `YYYYMMDD_HHMMSS` is shown as it stands."""
    date, underscore, time = entry.run_datetime.partition("_")
    if not underscore or (len(date), len(time)) != (8, 6) or not (date + time).isdecimal():
        return plain(entry.run_datetime)
    return f"{date[:4]}-{date[4:6]}-{date[6:]} {time[:2]}:{time[2:4]}:{time[4:]}"


def _hosts(entry: RunEntry, shown: int | None) -> str:
    names = ",".join(entry.hosts[:shown])
    hidden = len(entry.hosts) - len(entry.hosts[:shown])
    return plain(f"{names} +{hidden}" if hidden else names) or _ABSENT


def _status(entry: RunEntry) -> Text:
    return Text(plain(entry.status), style=STATUS_STYLES.get(entry.status, ""))


def _run_time(entry: RunEntry) -> str:
    return _ABSENT if entry.runtime_s is None else seconds_text(entry.runtime_s)


def _result_dir(entry: RunEntry) -> str:
    return plain(entry.result_dir or _ABSENT)


def _identity(entry: RunEntry) -> Table:
    metadata = entry.metadata
    args, software = metadata.get("args"), metadata.get("software")
    rows: list[tuple[str, object]] = [
        ("Error", metadata.get("error")),
        ("Headline", entry.headline),
        ("When", f"{_when(entry)}, run time {_run_time(entry)}"),
        ("Benchmark", f"{entry.benchmark_type} {entry.command}, model {entry.model or _ABSENT}"),
        ("Ranks", f"{entry.ranks}{' on ' + ', '.join(entry.hosts) if entry.hosts else ''}"),
        ("Results", entry.result_dir),
        ("Metadata", entry.metadata_path),
        ("Labels", ", ".join(f"{key}={value}" for key, value in entry.labels.items())),
        ("Arguments", shlex.join(map(str, args)) if isinstance(args, list) else None),
        ("Started in", metadata.get("cwd")),
        ("Command", metadata.get("executed_command")),
        ("Software", ", ".join(f"{key} {value}" for key, value in _leaves(software)) if software else None),
    ]
    grid = facts_grid()
    exit_code = "" if entry.exit_code is None else f", exit code {entry.exit_code}"
    grid.add_row("Run", Text.assemble((plain(entry.run_id), "bold"), "  ", _status(entry), exit_code))
    for label, value in rows:
        if value:
            grid.add_row(label, Text(plain(value), style="bold red" if label == "Error" else ""))
    return grid


def _parameters(metadata: Mapping[str, object]) -> Iterator[RenderableType]:
    parameters, sources = metadata.get("parameters"), metadata.get("parameter_sources")
    if not parameters:
        return
    source_of = dict(_leaves(sources)) if isinstance(sources, Mapping) else {}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("Parameter", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    for name, value in _leaves(parameters):
        table.add_row(Text(plain(name)), Text(plain(value)), Text(plain(source_of.get(name, _ABSENT))))
    yield Text()
    yield table


def _cluster(metadata: Mapping[str, object]) -> Iterator[RenderableType]:
    cluster = metadata.get("cluster_information")
    if not cluster:
        return
    facts = list(_leaves(cluster))
    grid = facts_grid()
    for name, value in facts[:_CLUSTER_LINES]:
        grid.add_row(Text(plain(name)), Text(plain(value)))
    yield Text()
    yield Text("Cluster", style="bold")
    yield grid
    if len(facts) > _CLUSTER_LINES:
        yield Text(f"... and {len(facts) - _CLUSTER_LINES} more: --json shows all", style="dim")


def _numbers(summary: Mapping[str, object], metadata: Mapping[str, object]) -> RenderableType:
    """The summary as the run's end showed it, or, where it is of another benchmark or version, all its numbers."""
    try:
        return summary_table(Summary.model_validate(summary), metadata=metadata)
    except (ValidationError, KeyError):
        grid = facts_grid()
        for name, value in _leaves(summary):
            if ".histogram." not in name:
                grid.add_row(Text(plain(name)), Text(plain(value)))
        return grid


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The values in `value` that are no collections of others, each with its dotted name."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}[{number}]")
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value)) or _ABSENT
    else:
        yield name, _ABSENT if value is None or value == {} else value
