"""What rank 0 tells the launcher: one JSON object a line on standard output, which nobody else writes to."""

import sys
import threading
from collections.abc import Sequence
from typing import IO, Annotated, Literal

from pydantic import Field, TypeAdapter

from mlpstorage.results.models import HostSample, RankResult, Record, Sample


class Known(Record):
    """Facts of every host, each told by its lowest rank, before the run begins; see `cluster.facts.host_facts`."""

    type: Literal["hosts"] = "hosts"
    hosts: tuple[dict[str, object], ...]


class Progress(Record):
    """A line of the time series, while the run goes on."""

    type: Literal["progress"] = "progress"
    sample: Sample


class HostProgress(Record):
    """A line of the time series of a host, likewise; its lowest rank takes it."""

    type: Literal["host_progress"] = "host_progress"
    sample: HostSample


class Alive(Record):
    """Rank 0 lives, from the start to the end, whatever else it has to tell."""

    type: Literal["alive"] = "alive"


class Warned(Record):
    """Something that the user should know and that does not end the run."""

    type: Literal["warning"] = "warning"
    message: str


class Refused(Record):
    """The ranks could not begin."""

    type: Literal["error"] = "error"
    exit_code: int
    message: str


class StartedRank(Record):
    """Where a rank runs: its host's own name, and its process there."""

    rank: int
    host: str
    pid: int


class Started(Record):
    """Every rank has started, and has the same version of this package."""

    type: Literal["started"] = "started"
    version: str
    ranks: tuple[StartedRank, ...]


class Snapshot(Record):
    """What a rank has measured so far, or in all: kept where the job ends without its `Finished`.

    The result has no samples, of the rank or of its host: those were told as they came.
    """

    type: Literal["snapshot"] = "snapshot"
    result: RankResult


class SilentRank(Record):
    """A rank that has not been heard of for so many seconds, or, where it is `still`, has said that it does nothing."""

    rank: int
    host: str
    silent_s: float
    still: bool = False


class Silent(Record):
    """Ranks that hang: the run ends here, by the rank that noticed."""

    type: Literal["silent"] = "silent"
    ranks: tuple[SilentRank, ...]


class Finished(Record):
    """What every rank measured, complete or not."""

    type: Literal["result"] = "result"
    ranks: tuple[RankResult, ...]


Event = Started | Known | Progress | HostProgress | Alive | Warned | Refused | Snapshot | Silent | Finished

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
        self._stdout = sys.stdout
        self._stream: IO[str] | None = self._stdout if speaks else None
        self._one_at_a_time = threading.Lock()
        sys.stdout = sys.stderr

    def send(self, event: Event) -> None:
        """Write one event. Where nobody reads any more, the launcher is gone and its end is on its way."""
        if self._stream is not None:
            self.line(event.model_dump_json())

    def line(self, text: str) -> None:
        """Write an event that is JSON already, of another rank perhaps."""
        if self._stream is None:
            return
        with self._one_at_a_time:
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except BrokenPipeError:
                self._stream = None

    def speak(self) -> None:
        """Write from now on: rank 0 hangs, and somebody must say so."""
        self._stream = self._stream or self._stdout

    def warn(self, messages: Sequence[str]) -> None:
        """Write warnings."""
        for message in messages:
            self.send(Warned(message=message))
