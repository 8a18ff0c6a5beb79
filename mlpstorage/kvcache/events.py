"""What rank 0 tells the launcher: one JSON object a line on standard output, which nobody else writes to."""

import sys
from collections.abc import Sequence
from typing import IO, Annotated, Literal

from pydantic import Field, TypeAdapter

from mlpstorage.results.models import RankResult, Record, Sample


class Progress(Record):
    """A line of the time series, while the run goes on."""

    type: Literal["progress"] = "progress"
    sample: Sample


class Warned(Record):
    """Something that the user should know and that does not end the run."""

    type: Literal["warning"] = "warning"
    message: str


class Refused(Record):
    """The ranks could not begin."""

    type: Literal["error"] = "error"
    exit_code: int
    message: str


class Finished(Record):
    """What every rank measured, complete or not."""

    type: Literal["result"] = "result"
    ranks: tuple[RankResult, ...]


Event = Progress | Warned | Refused | Finished

_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def parse_event(line: bytes) -> Event:
    """The event on a line.

    Raises:
        pydantic.ValidationError: It is none.
    """
    return _EVENT.validate_json(line)


class EventWriter:
    """Writes events where this is rank 0.

    Standard output is kept for events: whatever else is printed in this process goes to standard error.
    """

    def __init__(self, *, speaks: bool) -> None:
        self._stream: IO[str] | None = sys.stdout if speaks else None
        sys.stdout = sys.stderr

    def send(self, event: Event) -> None:
        """Write one event. Where nobody reads any more, the launcher is gone and its end is on its way."""
        if self._stream is None:
            return
        try:
            self._stream.write(event.model_dump_json() + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._stream = None

    def warn(self, messages: Sequence[str]) -> None:
        """Write warnings."""
        for message in messages:
            self.send(Warned(message=message))
