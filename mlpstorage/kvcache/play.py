"""One rank's run in time: arrivals, warm-up, measured window and drain."""

import asyncio
import contextlib
import enum
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mlpstorage.config import GIB
from mlpstorage.errors import MLPStorageError, RunError, RunTimeoutError
from mlpstorage.kvcache.engine import BlockIO, Engine, EngineConfig, SlotArena
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.workload import OpenLoop, Workload
from mlpstorage.measure.clock import NS, Clock
from mlpstorage.measure.histogram import Histogram
from mlpstorage.results.models import Sample
from mlpstorage.storage.ops import OpDone

LAG_PROBE_NS = 5_000_000
"""The event loop's lag is how much later than asked a sleep of this length ends."""

SAMPLE_NS = NS
"""Distance of two lines of the time series."""

DRAIN_LIMIT_S = 30.0
"""I/O that was running at the window's end and has not returned after this long is given up: the storage hangs."""

INTERRUPTED_DRAIN_LIMIT_S = 2.0
"""The same after Ctrl-C or SIGTERM."""


class DrainableIO(BlockIO, Protocol):
    """I/O that can be brought to rest."""

    def cancel_queued(self) -> None:
        """Give up the operations that have not begun."""
        ...

    async def idle(self) -> None:
        """Return when no operation is queued or running."""
        ...


class Ending(enum.Enum):
    """Why the window ended."""

    TIME = "its time was over"
    EXHAUSTED = "every request of the trace was answered"
    FAILED = "an I/O failed"
    INTERRUPTED = "it was interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Planned lengths of the phases, in nanoseconds."""

    warmup_ns: int
    duration_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of a rank's run; times in nanoseconds."""

    ending: Ending
    error: MLPStorageError | None
    started_unix_s: float
    warmup_ns: int
    drain_ns: int
    in_flight_at_end: int
    cpu_s: float
    loop_lag: Histogram
    recorder: Recorder
    samples: tuple[Sample, ...]


class Stop:
    """The first reason to end a run before its time."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self.ending: Ending | None = None
        self.error: MLPStorageError | None = None

    def fail(self, error: Exception) -> None:
        """An I/O failed: the run ends orderly."""
        if self.ending is None:
            self.error = error if isinstance(error, MLPStorageError) else RunError(f"an I/O failed: {error}")
            self._end(Ending.FAILED)

    def interrupt(self) -> None:
        """The user or the system asked for the end."""
        if self.ending is None:
            self._end(Ending.INTERRUPTED)

    async def wait(self) -> None:
        """Return when there is a reason."""
        await self._reached.wait()

    def _end(self, ending: Ending) -> None:
        self.ending = ending
        self._reached.set()


async def play(
    *,
    rank: int,
    workload: Workload,
    config: EngineConfig,
    stored_bytes: int,
    timing: Timing,
    clock: Clock,
    open_io: Callable[[Callable[[list[OpDone]], None]], DrainableIO],
    arena: SlotArena,
    stop: Stop,
    on_sample: Callable[[Sample], None],
) -> Played:
    """Play a workload through warm-up and window, then drain.

    Args:
        rank: Number of this rank, for the samples.
        workload: What is played.
        config: The engine's.
        stored_bytes: Bytes of an object with padding.
        timing: Lengths of the phases.
        clock: The rank's clock.
        open_io: Makes the I/O, given what is to be called with finished operations.
        arena: Slots of the DRAM tier.
        stop: What may end the run early.
        on_sample: Called with every line of the time series.
    """
    begin_ns = clock.now_ns()
    begin_unix_s = time.time()
    window_ns = (begin_ns + timing.warmup_ns, begin_ns + timing.warmup_ns + timing.duration_ns)
    recorder = Recorder(object_bytes=config.object_bytes, stored_bytes=stored_bytes, window_ns=window_ns)
    blocks = open_io(recorder.operations)
    engine = Engine(config, blocks=blocks, arena=arena, recorder=recorder, clock=clock, on_failure=stop.fail)
    lag = Histogram()
    meter = _CpuMeter(clock, window_ns[0])
    sampler = _Sampler(
        rank=rank,
        engine=engine,
        recorder=recorder,
        clock=clock,
        begin_ns=begin_ns,
        window_ns=window_ns,
        stored_bytes=stored_bytes,
        on_sample=on_sample,
    )
    source = asyncio.create_task(_arrivals(workload, engine, config, clock, begin_ns))
    window_over = asyncio.create_task(clock.sleep_until(window_ns[1]))
    async with _running(meter.run(), sampler.run(), _probe_lag(clock, recorder, lag)):
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({source, window_over, stopped}, return_when=asyncio.FIRST_COMPLETED)
        end_ns = clock.now_ns()
        recorder.close(end_ns)
        cpu_s = meter.used_s(end_ns)
        if source.done() and not source.cancelled() and source.exception() is not None:
            stop.fail(_as_failure(source.exception()))
        ending = stop.ending or (Ending.EXHAUSTED if source.done() else Ending.TIME)
        in_flight = engine.in_flight
        for task in (source, window_over, stopped):
            task.cancel()
        engine.stop()
        blocks.cancel_queued()
        await asyncio.gather(source, window_over, stopped, return_exceptions=True)
        blocks.cancel_queued()
        limit_s = INTERRUPTED_DRAIN_LIMIT_S if ending is Ending.INTERRUPTED else DRAIN_LIMIT_S
        try:
            async with asyncio.timeout(limit_s):
                await engine.settle()
                await blocks.idle()
        except TimeoutError:
            if ending is not Ending.INTERRUPTED:
                stop.fail(RunTimeoutError(f"the storage hangs: I/O was still running {limit_s:g} s after the window"))
    return Played(
        ending=Ending.FAILED if stop.error is not None else ending,
        error=stop.error,
        started_unix_s=begin_unix_s + timing.warmup_ns / NS,
        warmup_ns=min(timing.warmup_ns, end_ns - begin_ns),
        drain_ns=clock.now_ns() - end_ns,
        in_flight_at_end=in_flight,
        cpu_s=cpu_s,
        loop_lag=lag,
        recorder=recorder,
        samples=tuple(sampler.samples),
    )


def _as_failure(error: BaseException | None) -> Exception:
    """The one exception behind a task group's; anything but our own is a fault of the program and is raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, MLPStorageError):
        return error
    raise error or AssertionError("a failed task has an exception")


@contextlib.asynccontextmanager
async def _running(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run endless works beside the body and end them with it."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _arrivals(workload: Workload, engine: Engine, config: EngineConfig, clock: Clock, begin_ns: int) -> None:
    """Send every request at its time; return when all are answered and written."""
    async with asyncio.TaskGroup() as group:
        if isinstance(workload, OpenLoop):
            await _open_loop(workload.requests(), group, engine, clock, begin_ns)
        else:
            for user in workload.users:
                group.create_task(_user(user(), engine, config, clock, begin_ns))
    await engine.settle()


async def _open_loop(
    requests: Iterator[Request], group: asyncio.TaskGroup, engine: Engine, clock: Clock, begin_ns: int
) -> None:
    for request in requests:
        assert request.arrival_s is not None, "an open loop's requests have arrival times"
        intended_ns = begin_ns + round(request.arrival_s * NS)
        await clock.sleep_until(intended_ns)
        group.create_task(engine.serve(request, intended_ns))


async def _user(requests: Iterator[Request], engine: Engine, config: EngineConfig, clock: Clock, begin_ns: int) -> None:
    """One user of a closed loop: think, ask, wait for the answer."""
    ready_ns = begin_ns
    for request in requests:
        intended_ns = ready_ns + config.pacing.think_ns(request.think_s)
        await clock.sleep_until(intended_ns)
        await engine.serve(request, intended_ns)
        ready_ns = clock.now_ns()


async def _probe_lag(clock: Clock, recorder: Recorder, lag: Histogram) -> None:
    """Measure how late the event loop is, inside the window."""
    while True:
        due_ns = clock.now_ns() + LAG_PROBE_NS
        await clock.sleep_until(due_ns)
        now_ns = clock.now_ns()
        if recorder.inside(now_ns):
            lag.record(now_ns - due_ns)


class _CpuMeter:
    """Processor time of this process inside the window."""

    def __init__(self, clock: Clock, start_ns: int) -> None:
        self._clock = clock
        self._start_ns = start_ns
        self._at_start_s: float | None = None

    async def run(self) -> None:
        await self._clock.sleep_until(self._start_ns)
        self._at_start_s = _cpu_s()

    def used_s(self, now_ns: int) -> float:
        """Seconds since the window began; 0 where it did not."""
        if now_ns < self._start_ns or self._at_start_s is None:
            return 0.0
        return _cpu_s() - self._at_start_s


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Sampler:
    """Takes a line of the time series every second."""

    def __init__(
        self,
        *,
        rank: int,
        engine: Engine,
        recorder: Recorder,
        clock: Clock,
        begin_ns: int,
        window_ns: tuple[int, int],
        stored_bytes: int,
        on_sample: Callable[[Sample], None],
    ) -> None:
        self._rank = rank
        self._engine = engine
        self._recorder = recorder
        self._clock = clock
        self._begin_ns = begin_ns
        self._window_ns = window_ns
        self._stored_bytes = stored_bytes
        self._on_sample = on_sample
        self.samples: list[Sample] = []
        self._last = (begin_ns, 0, 0)

    async def run(self) -> None:
        due_ns = self._begin_ns
        while True:
            due_ns += SAMPLE_NS
            await self._clock.sleep_until(due_ns)
            sample = self._take(self._clock.now_ns())
            self.samples.append(sample)
            self._on_sample(sample)

    def _take(self, now_ns: int) -> Sample:
        total, requests = self._recorder.total, self._recorder.total_requests
        last_ns, last_read_bytes, last_written_bytes = self._last
        since_s = (now_ns - last_ns) / NS
        self._last = (now_ns, total.read_bytes, total.written_bytes)
        found = requests.cached_tokens
        return Sample(
            rank=self._rank,
            t_s=round((now_ns - self._begin_ns) / NS, 3),
            phase=self._phase(now_ns),
            requests_completed=requests.completed,
            requests_in_flight=self._engine.in_flight,
            prompt_tokens=requests.prompt_tokens,
            cached_tokens=found.gpu + found.cpu + found.storage,
            read_bytes=total.read_bytes,
            written_bytes=total.written_bytes,
            deleted_bytes=total.deleted_bytes,
            read_gib_per_s=round((total.read_bytes - last_read_bytes) / GIB / since_s, 6),
            write_gib_per_s=round((total.written_bytes - last_written_bytes) / GIB / since_s, 6),
            storage_used_bytes=self._engine.stored_blocks * self._stored_bytes,
            cpu_used_bytes=self._engine.cpu_blocks * self._stored_bytes,
            write_queue_blocks=self._engine.write_queue_blocks,
        )

    def _phase(self, now_ns: int) -> Literal["warmup", "window", "drain"]:
        if now_ns < self._window_ns[0]:
            return "warmup"
        return "window" if self._recorder.inside(now_ns) else "drain"
