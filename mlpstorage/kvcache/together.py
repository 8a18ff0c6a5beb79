"""What ranks do together while they play: agree on moments, report to rank 0, end as one.

Every rank posts to rank 0, which tells the launcher and answers. All of it happens in the event loop, a few messages a
second and rank; nothing waits inside MPI, so that a rank that stops holds nobody up. That one is noticed by `pulse`.
"""

import asyncio
from collections.abc import Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlpstorage.kvcache.events import EventWriter
from mlpstorage.kvcache.ranks import ClockOffset, Ranks
from mlpstorage.measure.clock import NS, Clock

POLL_NS = NS // 20
"""How often a rank looks for messages."""

_LEAD_NS, _LEAD_A_RANK_NS = NS // 5, NS // 200
"""How far ahead an agreed moment lies, so that word of it is there before: so much, and more with many ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What ranks have agreed on.

    Attributes:
        everyone: Whether all of them voted yes.
        moment_ns: A moment a little ahead, the same for all, by this rank's clock.
    """

    everyone: bool
    moment_ns: int


Meet = Callable[[bool], Coroutine[Any, Any, Meeting]]
"""Called with a vote; returns when all ranks that still play have called it as often."""


def alone(clock: Clock) -> Meet:
    """Agrees with nobody: at once."""

    async def meet(vote: bool) -> Meeting:
        return Meeting(everyone=vote, moment_ns=clock.now_ns())

    return meet


class _Vote(NamedTuple):
    meeting: int
    yes: bool


class _Agreed(NamedTuple):
    meeting: int
    everyone: bool
    moment_ns: int  # by rank 0's clock


class _Line(NamedTuple):
    text: str


class _Final(NamedTuple):
    result: str
    failed: bool


class _Stop(NamedTuple):
    pass


class _Over(NamedTuple):
    pass


class Together:
    """This rank's part.

    Args:
        ranks: All ranks.
        offset: Between this rank's clock and rank 0's.
        clock: This rank's.
        writer: Where rank 0 tells the launcher.
        on_stop: Called where another rank has failed and this one should end.
        finals: Where rank 0 keeps the results that have come, as JSON.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        offset: ClockOffset,
        clock: Clock,
        writer: EventWriter,
        on_stop: Callable[[], None],
        finals: MutableMapping[int, str],
    ) -> None:
        self._ranks = ranks
        self._offset_ns = offset.offset_ns
        self._clock = clock
        self._writer = writer
        self._on_stop = on_stop
        self._meeting = 0
        self._agreed: dict[int, asyncio.Future[Meeting]] = {}
        self._votes: dict[int, dict[int, bool]] = {}
        self._finals = finals
        self._stopping = False
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Carry messages until the run is over for all ranks."""
        while not self._over.is_set():
            await self._clock.sleep_until(self._clock.now_ns() + POLL_NS)
            for source, message in self._ranks.arrived():
                self._take(source, message)

    async def meet(self, vote: bool) -> Meeting:
        """Return when all ranks that still play are here; see `Meet`."""
        self._meeting += 1
        agreed: asyncio.Future[Meeting] = asyncio.get_running_loop().create_future()
        self._agreed[self._meeting] = agreed
        self._to_root(_Vote(self._meeting, vote))
        return await agreed

    def tell(self, line: str) -> None:
        """Have rank 0 tell the launcher an event, as JSON."""
        self._to_root(_Line(line))

    async def finish(self, result: str, *, failed: bool) -> list[str] | None:
        """Hand over this rank's result, as JSON; returns all of them in rank order on rank 0, None on the others.

        Returns when every rank has finished. `failed` asks those that still play to end.
        """
        self._to_root(_Final(result, failed))
        await self._over.wait()
        return [self._finals[rank] for rank in sorted(self._finals)] if self._ranks.rank == 0 else None

    def _to_root(self, message: object) -> None:
        if self._ranks.rank == 0:
            self._take(0, message)
        else:
            self._ranks.post(message, 0)

    def _to_others(self, message: object) -> None:
        """From rank 0 to all; the others have nothing to tell each other."""
        for other in range(1, self._ranks.size) if self._ranks.rank == 0 else ():
            self._ranks.post(message, other)

    def _take(self, source: int, message: object) -> None:
        match message:
            case _Vote(meeting=meeting, yes=yes):
                self._votes.setdefault(meeting, {})[source] = yes
                self._conclude()
            case _Agreed():
                self._arrive(message)
            case _Line(text=text):
                self._writer.line(text)
            case _Final(result=result, failed=failed):
                self._finals[source] = result
                self._conclude()
                if failed and not self._stopping:
                    self._stopping = True
                    self._to_others(_Stop())
                    self._on_stop()
                if len(self._finals) == self._ranks.size:
                    self._to_others(_Over())
                    self._over.set()
            case _Stop():
                self._on_stop()
            case _Over():
                self._over.set()

    def _conclude(self) -> None:
        """End the meetings at which all are present; a rank that has finished counts as present, with a yes."""
        for meeting, votes in list(self._votes.items()):
            if len(votes.keys() | self._finals.keys()) < self._ranks.size:
                continue
            del self._votes[meeting]
            lead_ns = 0 if self._ranks.size == 1 else _LEAD_NS + self._ranks.size * _LEAD_A_RANK_NS
            agreed = _Agreed(meeting, all(votes.values()), self._clock.now_ns() + lead_ns)
            self._to_others(agreed)
            self._arrive(agreed)

    def _arrive(self, agreed: _Agreed) -> None:
        waiting = self._agreed.pop(agreed.meeting, None)
        if waiting is not None and not waiting.done():
            moment_ns = agreed.moment_ns - self._offset_ns
            waiting.set_result(Meeting(everyone=agreed.everyone, moment_ns=moment_ns))
