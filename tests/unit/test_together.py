"""What ranks do together, on virtual time: agreed moments, reports, and the common end."""

import asyncio
import io
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpstorage.kvcache.events import EventWriter
from mlpstorage.kvcache.ranks import Alone, ClockOffset
from mlpstorage.kvcache.together import Meeting, Together
from mlpstorage.measure.clock import NS
from mlpstorage.testing.virtual import VirtualClock, run_virtual
from tests.wire import ShiftedClock, Wire, WiredRank

MS = NS // 1000


class Crew:
    """Several ranks of a wire, whose clocks are so far ahead of that of rank 0, as far as the ranks know."""

    def __init__(self, *ahead_ns: int) -> None:
        self.wire = Wire(size=len(ahead_ns))
        self.output = io.StringIO()
        self.stopped: list[int] = []
        self.ends = [self.wire.rank(number) for number in range(len(ahead_ns))]
        self.clocks = [ShiftedClock(ahead_ns=shift_ns) for shift_ns in ahead_ns]
        self.ranks = [self._together(number, end) for number, end in enumerate(self.ends)]

    def _together(self, number: int, end: WiredRank) -> Together:
        stdout, sys.stdout = sys.stdout, self.output
        try:
            writer = EventWriter(speaks=number == 0)
        finally:
            sys.stdout = stdout
        return Together(
            ranks=end,
            offset=ClockOffset(offset_ns=-self.clocks[number].ahead_ns, error_ns=0),
            clock=self.clocks[number],
            writer=writer,
            on_stop=lambda: self.stopped.append(number),
            finals={},
        )

    @property
    def lines(self) -> list[str]:
        """What was told the launcher."""
        return self.output.getvalue().splitlines()


async def carried(crew: Crew, *works: Any) -> list[Any]:  # noqa: ANN401 - coroutines
    """What comes of works while the ranks carry messages."""
    carrying: set[asyncio.Future[Any]] = {asyncio.create_task(one.run()) for one in crew.ranks}
    working = asyncio.gather(*works)
    waiting = {working, *carrying}
    try:
        while not working.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        return list(working.result())
    finally:
        working.cancel()
        for task in carrying:
            task.cancel()
        await asyncio.gather(working, *carrying, return_exceptions=True)


async def after(delay_s: float, work: Any) -> Any:  # noqa: ANN401 - what the work gives
    """Do the work so many virtual seconds later."""
    await asyncio.sleep(delay_s)
    return await work


def test_all_begin_at_one_moment_of_their_different_clocks() -> None:
    """The moment is the same for all in true time, ahead of the last to be ready, and each has it by its own clock."""

    async def story() -> None:
        crew = Crew(0, 5 * NS, -3 * NS)
        meetings = await carried(
            crew, *(after(wait_s, one.meet(True)) for wait_s, one in zip((0, 2, 1), crew.ranks, strict=True))
        )
        true_ns = {meeting.moment_ns - clock.ahead_ns for meeting, clock in zip(meetings, crew.clocks, strict=True)}
        assert len(true_ns) == 1
        assert 2 * NS < VirtualClock().now_ns() <= true_ns.pop() < 3 * NS
        assert all(meeting.everyone for meeting in meetings)

    run_virtual(story())


@pytest.mark.parametrize(("votes", "everyone"), [((True, True), True), ((True, False), False), ((False, True), False)])
def test_one_no_is_enough(votes: tuple[bool, bool], *, everyone: bool) -> None:
    """Ranks agree only where all of them say yes, and all of them learn it; meetings follow each other."""

    async def story() -> None:
        crew = Crew(0, 0)
        first = await carried(crew, *(one.meet(True) for one in crew.ranks))
        second = await carried(crew, *(one.meet(vote) for one, vote in zip(crew.ranks, votes, strict=True)))
        assert [meeting.everyone for meeting in (*first, *second)] == [True, True, everyone, everyone]

    run_virtual(story())


def test_a_rank_that_has_finished_is_not_waited_for() -> None:
    """Its trace is at its end: the others agree without it, now and at every later meeting."""

    async def story() -> None:
        crew = Crew(0, 0, 0)

        async def two_meetings(one: Together) -> list[Meeting]:
            meetings = [await one.meet(True), await one.meet(True)]
            await one.finish("{}", failed=False)
            return meetings

        *meetings, _ = await carried(
            crew, two_meetings(crew.ranks[0]), two_meetings(crew.ranks[1]), crew.ranks[2].finish("{}", failed=False)
        )
        assert [meeting.everyone for pair in meetings for meeting in pair] == [True] * 4

    run_virtual(story())


def test_results_come_to_rank_0_in_rank_order_when_all_are_there() -> None:
    """However late a rank is (it drains), the others wait for it; only rank 0 gets results."""

    async def story() -> None:
        crew = Crew(0, 0, 0)
        waits_s = (3.0, 40.0, 1.0)
        works = (
            after(wait_s, one.finish(f'"{number}"', failed=False))
            for number, (wait_s, one) in enumerate(zip(waits_s, crew.ranks, strict=True))
        )
        assert await carried(crew, *works) == [['"0"', '"1"', '"2"'], None, None]
        assert 40 * NS < VirtualClock().now_ns() < 41 * NS
        assert crew.stopped == []

    run_virtual(story())


def test_what_a_rank_tells_comes_out_at_rank_0_in_its_order() -> None:
    """Lines of all ranks reach the launcher through rank 0, those of one rank in their order."""

    async def story() -> None:
        crew = Crew(0, 0)
        for number in range(3):
            for rank, one in enumerate(crew.ranks):
                one.tell(json.dumps([rank, number]))
        await carried(crew, *(one.finish("{}", failed=False) for one in crew.ranks))
        told = [json.loads(line) for line in crew.lines]
        assert [number for rank, number in told if rank == 1] == [0, 1, 2]
        assert [number for rank, number in told if rank == 0] == [0, 1, 2]

    run_virtual(story())


def test_a_failed_rank_stops_all_others_once() -> None:
    """Who fails has finished; the others are asked to end, and do so in their own way."""

    async def story() -> None:
        crew = Crew(0, 0, 0)
        failing = crew.ranks[1].finish('"failed"', failed=True)
        ending = (after(2.0, crew.ranks[rank].finish('"ended"', failed=True)) for rank in (0, 2))
        results, *_ = await carried(crew, next(ending), failing, *ending)
        assert results == ['"ended"', '"failed"', '"ended"']
        assert sorted(set(crew.stopped)) == [0, 1, 2]
        assert len(crew.stopped) == 3

    run_virtual(story())


def test_a_rank_alone_agrees_at_once() -> None:
    """No time passes until it begins, and its result comes back."""

    async def story() -> None:
        one = Together(
            ranks=Alone(),
            offset=Alone().clock_offset(),
            clock=VirtualClock(),
            writer=EventWriter(speaks=False),
            on_stop=lambda: None,
            finals={},
        )
        assert await one.meet(False) == Meeting(everyone=False, moment_ns=0)
        assert await one.finish('"mine"', failed=False) == ['"mine"']
        assert VirtualClock().now_ns() == 0

    stdout = sys.stdout
    try:
        run_virtual(story())
    finally:
        sys.stdout = stdout


@given(
    true_offset_ns=st.integers(-(10**15), 10**15),
    there_ns=st.integers(0, 10**9),
    back_ns=st.integers(0, 10**9),
    asked_ns=st.integers(0, 10**15),
)
def test_an_offset_is_never_further_off_than_its_bound(
    true_offset_ns: int, there_ns: int, back_ns: int, asked_ns: int
) -> None:
    """However unequal the ways of question and answer are, and however far the clocks are apart."""
    told_ns = asked_ns + there_ns + true_offset_ns
    offset = ClockOffset.of_round_trip(asked_ns, told_ns, asked_ns + there_ns + back_ns)
    assert abs(offset.offset_ns - true_offset_ns) <= offset.error_ns
    assert offset.error_ns <= (there_ns + back_ns + 1) // 2
