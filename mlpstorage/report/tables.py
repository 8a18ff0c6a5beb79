"""What tables on the terminal have in common."""

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from mlpstorage.config import RunStatus
from mlpstorage.report.text import NOT_AVAILABLE

GOOD, BAD, WARN, HEAD, FAINT = "green", "bold red", "yellow", "bold", "dim"

STATUS_STYLES: Mapping[str, str] = {
    RunStatus.RUNNING: "cyan",
    RunStatus.COMPLETE: GOOD,
    RunStatus.FAILED: BAD,
    RunStatus.INTERRUPTED: WARN,
}
"""Style of a status; one that is not ours has none."""


def new_table(first: str, *others: str) -> Table:
    """A table with a column of names, headed by the table's own, and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style=HEAD)
    table.add_column(first, no_wrap=True, min_width=13)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True, min_width=8)
    return table


def cell_text(text: str) -> Text:
    """A cell of a table; one without a number is faint."""
    return Text(text, style=FAINT if text in {NOT_AVAILABLE, "-"} else "")


def note(style: str, text: str) -> Text:
    """A line that must not be overlooked."""
    return Text(f"! {text}", style=style)
