"""Sends the requests of a workload to the engine, each at its time."""

import asyncio
from collections.abc import Iterator, Sequence

from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.traces import After
from mlpstorage.kvcache.workload import OpenLoop, Session, SessionLoop, Workload
from mlpstorage.measure.clock import NS, Clock


async def send(workload: Workload, engine: Engine, pacing: Pacing, clock: Clock, begin_ns: int) -> None:
    """Send every request at its time; return when all are answered and written."""
    async with asyncio.TaskGroup() as group:
        match workload:
            case OpenLoop():
                await _open_loop(workload.requests(), group, engine, clock, begin_ns)
            case SessionLoop():
                await _sessions(workload, group, _Sessions(engine, pacing, clock), begin_ns)
            case _:
                for user in workload.users:
                    group.create_task(_user(user(), engine, pacing, clock, begin_ns))
    await engine.settle()


async def _open_loop(
    requests: Iterator[Request], group: asyncio.TaskGroup, engine: Engine, clock: Clock, begin_ns: int
) -> None:
    for request in requests:
        assert request.arrival_s is not None, "an open loop's requests have arrival times"
        intended_ns = begin_ns + round(request.arrival_s * NS)
        await clock.sleep_until(intended_ns)
        group.create_task(engine.serve(request, intended_ns))


async def _user(requests: Iterator[Request], engine: Engine, pacing: Pacing, clock: Clock, begin_ns: int) -> None:
    """One user of a closed loop: think, ask, wait for the answer."""
    ready_ns = begin_ns
    for request in requests:
        intended_ns = ready_ns + pacing.think_ns(request.think_s)
        await clock.sleep_until(intended_ns)
        await engine.serve(request, intended_ns)
        ready_ns = clock.now_ns()


async def _sessions(workload: SessionLoop, group: asyncio.TaskGroup, player: "_Sessions", begin_ns: int) -> None:
    sessions = workload.sessions()
    if workload.users is not None:
        for _ in range(workload.users):
            group.create_task(player.one_after_the_other(sessions, begin_ns))
        return
    for session in sessions:
        group.create_task(player.begin(session, begin_ns + round(session.start_s * NS)))
        # Reading one takes a while: who is to ask now is not to wait for all of them.
        await asyncio.sleep(0)


class _Sessions:
    """Plays sessions: a request begins a pause after the answers that it waits for."""

    def __init__(self, engine: Engine, pacing: Pacing, clock: Clock) -> None:
        self._engine = engine
        self._pacing = pacing
        self.clock = clock

    async def one_after_the_other(self, sessions: Iterator[Session], begin_ns: int) -> None:
        """Take the next session as soon as the last is over, until there is none: one of several users."""
        ready_ns = begin_ns
        for session in sessions:
            await self.play(session, ready_ns)
            ready_ns = self.clock.now_ns()

    async def begin(self, session: Session, start_ns: int) -> None:
        """Play a session at its time."""
        await self.clock.sleep_until(start_ns)
        await self.play(session, start_ns)

    async def play(self, session: Session, start_ns: int) -> None:
        """Play a session; return when all of it is answered."""
        loop = asyncio.get_running_loop()
        answered: list[asyncio.Future[int]] = [loop.create_future() for _ in session.steps]
        async with asyncio.TaskGroup() as group:
            for number, (request, after) in enumerate(session.steps):
                group.create_task(self._step(request, after, answered, number, start_ns))

    async def _step(
        self,
        request: Request,
        after: Sequence[After],
        answered: Sequence[asyncio.Future[int]],
        number: int,
        start_ns: int,
    ) -> None:
        intended_ns = start_ns
        for one in after:
            answer_ns = await answered[one.turn]
            intended_ns = max(intended_ns, answer_ns + self._pacing.think_ns(one.pause_s))
        await self.clock.sleep_until(intended_ns)
        await self._engine.serve(request, intended_ns)
        answered[number].set_result(self.clock.now_ns())
