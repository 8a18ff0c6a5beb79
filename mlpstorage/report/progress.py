"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere. Always on standard error."""

import sys
from typing import Protocol

from mlpstorage.results.models import Sample

LINE_EVERY_S = 10.0


class ProgressView(Protocol):
    """Shows samples as they come."""

    def show(self, sample: Sample) -> None:
        """Show one line of the time series."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class NoProgress:
    """Shows nothing."""

    def show(self, sample: Sample) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing is to be done."""


class LineProgress:
    """A line every ten seconds, for logs."""

    def __init__(self, planned_s: float) -> None:
        self._planned_s = planned_s
        self._next_s = LINE_EVERY_S

    def show(self, sample: Sample) -> None:
        """Print a line where ten seconds have passed."""
        if sample.t_s >= self._next_s:
            self._next_s += LINE_EVERY_S
            print(f"{sample.t_s:.0f} s of {self._planned_s:.0f} s: {_figures(sample)}", file=sys.stderr, flush=True)  # noqa: T201 - this is what it is for

    def close(self) -> None:
        """Nothing is to be done."""


class BarProgress:
    """A bar that redraws itself."""

    def __init__(self, planned_s: float) -> None:
        from rich.console import Console  # noqa: PLC0415 - slow to import, and only a terminal needs it
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        self._progress = Progress(
            TextColumn("{task.fields[phase]:>7}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("run", total=planned_s, phase="start", figures="")
        self._progress.start()

    def show(self, sample: Sample) -> None:
        """Redraw the bar."""
        self._progress.update(self._task, completed=sample.t_s, phase=sample.phase, figures=_figures(sample))

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


def progress_view(*, planned_s: float, quiet: bool) -> ProgressView:
    """The view that fits where standard error goes."""
    if quiet:
        return NoProgress()
    return BarProgress(planned_s) if sys.stderr.isatty() else LineProgress(planned_s)


def _figures(sample: Sample) -> str:
    return (
        f"read {sample.read_gib_per_s:.2f} GiB/s, write {sample.write_gib_per_s:.2f} GiB/s, "
        f"{sample.requests_completed:,} answered, {sample.requests_in_flight:,} in flight"
    )
