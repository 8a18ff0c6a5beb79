"""Signs of life between ranks, on a clock that the tests move: who is named, when, and what is told before the end."""

import io
import json
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from mlpstorage.kvcache.events import Alive, EventWriter, Silent, parse_event
from mlpstorage.kvcache.pulse import SILENCE_S, STILL_S, Pulse, Silence
from mlpstorage.kvcache.ranks import Alone
from mlpstorage.measure.clock import NS
from mlpstorage.measure.process import thread_activity
from tests.wire import AbortedError

ALIVE = Alive().model_dump_json()
QUARTER_NS = NS // 4


@dataclass(slots=True)
class Hand:
    """A clock that is moved by hand."""

    ns: int = 0

    def now_ns(self) -> int:
        """Nanoseconds."""
        return self.ns

    async def sleep_until(self, when_ns: int) -> None:
        """Nobody sleeps here."""
        raise NotImplementedError


class End(Alone):
    """A rank of several whose signs of life come at once."""

    launched = True

    def __init__(self, rank: int, boxes: dict[int, list[tuple[int, float]]]) -> None:
        self.rank = rank
        self.size = len(boxes)
        self._boxes = boxes
        self.aborted: int | None = None

    def beat(self, still_s: float, to: int) -> None:
        """Put it before the other rank."""
        self._boxes[to].append((self.rank, still_s))

    def beats(self) -> list[tuple[int, float]]:
        """What lies there."""
        here = self._boxes[self.rank][:]
        self._boxes[self.rank].clear()
        return here

    def abort(self, exit_code: int) -> NoReturn:
        """Remember with what, and end."""
        self.aborted = exit_code
        raise AbortedError


@dataclass(slots=True)
class Crew:
    """Three ranks on three hosts."""

    finals: dict[int, str] = field(default_factory=dict)
    busy: dict[int, int | None] = field(default_factory=lambda: {0: 0, 1: 0, 2: 0})
    clock: Hand = field(default_factory=Hand)
    output: io.StringIO = field(default_factory=io.StringIO)
    ends: list[End] = field(default_factory=list)
    pulses: list[Pulse] = field(default_factory=list)

    def __post_init__(self) -> None:
        boxes: dict[int, list[tuple[int, float]]] = {rank: [] for rank in range(3)}
        self.ends = [End(rank, boxes) for rank in range(3)]
        self.pulses = [self._pulse(end, self._activity(end.rank)) for end in self.ends]

    def _activity(self, rank: int) -> Callable[[], object]:
        return lambda: self.busy[rank]

    def _pulse(self, end: End, activity: Callable[[], object]) -> Pulse:
        stdout, sys.stdout = sys.stdout, self.output
        try:
            writer = EventWriter(speaks=end.rank == 0)
        finally:
            sys.stdout = stdout
        hosts = ["h0", "h1", "h2"]
        return Pulse(ranks=end, hosts=hosts, clock=self.clock, writer=writer, finals=self.finals, activity=activity)

    def go(self, time_s: float, *, stopped: Collection[int] = (), still: Collection[int] = ()) -> None:
        """Time passes; ranks that are stopped do not look, in those that are still no thread runs."""
        until_ns = self.clock.ns + round(time_s * NS)
        while self.clock.ns < until_ns:
            self.clock.ns += QUARTER_NS
            for rank, pulse in enumerate(self.pulses):
                count = self.busy[rank]
                if rank not in still and rank not in stopped and count is not None:
                    self.busy[rank] = count + 1
                if rank not in stopped:
                    pulse.look()

    def named(self) -> Silent:
        """What was told the launcher last."""
        event = parse_event(self.output.getvalue().splitlines()[-1].encode())
        assert isinstance(event, Silent)
        return event


def test_ranks_that_do_something_are_left_alone_for_an_hour() -> None:
    """However long it takes: nobody is ended, and the launcher hears of rank 0 every second."""
    crew = Crew()
    crew.go(3600)
    told = crew.output.getvalue().splitlines()
    assert set(told) == {ALIVE}
    assert 3598 <= len(told) <= 3602


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stopped_rank_is_named_and_all_are_ended(rank: int) -> None:
    """After ten seconds, with exit code 7, by rank 0; one of the others does it where rank 0 itself is stopped."""
    crew = Crew()
    crew.go(100)
    with pytest.raises(AbortedError):
        crew.go(60, stopped=[rank])
    # Its last sign of life was up to a second earlier.
    assert 99 + SILENCE_S <= crew.clock.ns / NS <= 100 + SILENCE_S + 2
    (one,) = crew.named().ranks
    assert (one.rank, one.host, one.still) == (rank, f"h{rank}", False)
    assert SILENCE_S <= one.silent_s <= SILENCE_S + 2
    assert 7 in [end.aborted for end in crew.ends]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_in_which_nothing_runs_is_named(rank: int) -> None:
    """Its pulse beats on, and says so: within 18 s all are ended, and it alone is named."""
    crew = Crew()
    crew.go(100)
    with pytest.raises(AbortedError):
        crew.go(60, still=[rank])
    assert 100 + STILL_S <= crew.clock.ns / NS <= 100 + STILL_S + 3
    (one,) = crew.named().ranks
    assert (one.rank, one.host, one.still) == (rank, f"h{rank}", True)


def test_two_ranks_in_which_nothing_runs_are_both_named() -> None:
    """They hang in one storage."""
    crew = Crew()
    with pytest.raises(AbortedError):
        crew.go(60, still=[1, 2])
    assert [one.rank for one in crew.named().ranks] == [1, 2]


def test_a_rank_that_goes_on_now_and_then_is_left_alone() -> None:
    """Still for 14 s, again and again: that is slow storage."""
    crew = Crew()
    for _ in range(10):
        crew.go(14, still=[0, 1])
        crew.go(0.5)
    assert [end.aborted for end in crew.ends] == [None] * 3


def test_where_the_kernel_counts_nothing_nobody_is_taken_to_hang() -> None:
    """Without its counts a rank that works looks the same as one that hangs."""
    crew = Crew(busy={0: None, 1: None, 2: None})
    crew.go(100)
    assert [end.aborted for end in crew.ends] == [None] * 3


def test_complete_results_are_told_before_all_are_ended() -> None:
    """Of a rank that had finished when another was found to hang, the final result is kept, not an older one."""
    crew = Crew(finals={1: '{"of":1}'})
    with pytest.raises(AbortedError):
        crew.go(60, stopped=[2])
    *_, final, _ = crew.output.getvalue().splitlines()
    assert json.loads(final) == {"type": "snapshot", "result": {"of": 1}}


def test_a_process_that_is_late_blames_nobody() -> None:
    """All ranks stand still for a minute, which is more than the limit, and go on."""
    crew = Crew()
    crew.go(3)
    crew.clock.ns += 60 * NS
    crew.go(20)
    assert [end.aborted for end in crew.ends] == [None] * 3


def test_silence_counts_what_was_listened_to() -> None:
    """0.5 s at a time count whole, a minute at once as one second; a message sets it back."""
    silence = Silence([1, 2], limit_s=3.0)
    assert silence.passed(0.5) == {}
    assert silence.passed(60.0) == {}
    silence.heard(2)
    assert silence.passed(1.0) == {}
    assert silence.passed(0.5) == {1: 3.0}
    assert silence.passed(1.0) == {1: 4.0}


@pytest.fixture
def waiting() -> Iterator[tuple[int, threading.Event]]:
    """A thread that waits, and what wakes it: its number, and an event."""
    wake, woken = threading.Event(), threading.Event()

    def wait() -> None:
        while not wake.wait(60):
            pass
        woken.set()
        ended.wait(60)

    ended = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    number = thread.native_id
    assert number is not None
    yield number, wake
    wake.set()
    ended.set()
    thread.join()


def test_a_thread_that_waits_shows_no_activity(waiting: tuple[int, threading.Event]) -> None:
    """The kernel's counts of all other threads left out, nothing changes until it is woken."""
    number, wake = waiting
    this = threading.get_native_id()
    others = {int(task.name) for task in Path("/proc/self/task").iterdir()} - {number}
    assert this in others

    def settled() -> object:
        before = thread_activity(others)
        while (now := thread_activity(others)) != before:
            before = now
        return before

    before = settled()
    assert before is not None
    assert thread_activity(others) == before
    wake.set()
    while thread_activity(others) == before:
        pass
