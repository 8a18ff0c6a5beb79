"""One rank's run in time: arrivals, warm-up, measured window and drain."""

import asyncio
import contextlib
import enum
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mlpstorage.errors import MLPStorageError, RunError, RunTimeoutError
from mlpstorage.kvcache.block_io import BlockIO
from mlpstorage.kvcache.dram_tier import SlotArena
from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.host_series import HostSampler, HostWatch
from mlpstorage.kvcache.other_ranks import Existence
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.sampler import Sampler
from mlpstorage.kvcache.sending import send
from mlpstorage.kvcache.steadiness import Steadiness
from mlpstorage.kvcache.together import Meet, Meeting, alone
from mlpstorage.kvcache.window import DropPageCache, PageCache, Window
from mlpstorage.kvcache.workload import Workload
from mlpstorage.measure.clock import NS, Clock
from mlpstorage.measure.histogram import Histogram
from mlpstorage.measure.process import ProcessorMeter
from mlpstorage.measure.reuse import ReuseDistance
from mlpstorage.results.models import HostSample, Sample
from mlpstorage.storage.ops import OpDone

LAG_PROBE_NS = 5_000_000
"""The event loop's lag is how much later than asked a sleep of this length ends."""

DRAIN_LIMIT_S = 30.0
"""I/O that was running at the window's end and has not returned after this long is given up: the storage hangs."""

SNAPSHOT_NS = 3 * NS
"""Distance of two snapshots; the first is taken with the first line of the time series, where that is not later."""

INTERRUPTED_DRAIN_LIMIT_S = 2.0
"""The same after Ctrl-C or SIGTERM."""

MS = NS // 1000


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
    """Planned lengths of the phases, in nanoseconds.

    Attributes:
        warmup_ns: Length of the warm-up; the most, where it ends with a steady hit ratio.
        duration_ns: Length of the measured window.
        drain_limit_s: How long I/O that was running at the window's end may take to return.
        until_steady: Whether the warm-up ends as soon as the hit ratio is steady.
        sample_ns: Distance of two lines of the time series.
    """

    warmup_ns: int
    duration_ns: int
    drain_limit_s: float = DRAIN_LIMIT_S
    until_steady: bool = False
    sample_ns: int = NS


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of a rank's run, or a snapshot of it; times in nanoseconds.

    Attributes:
        ending: Why the window ended; `FAILED` also where all of it was played and data was wrong.
        error: Why the run failed; None where it did not.
        started_unix_s: Wall-clock time at which the window began, or would have.
        late_ns: How much later than at the agreed moment this rank really began.
        warmup_ns: True length of the warm-up.
        warmup_steady: Whether the hit ratio was steady at its end; None where that was not waited for.
        measured_ns: True length of the window; of a snapshot, as far as it is over.
        drain_ns: Time from the window's end until nothing was running any more.
        in_flight_at_end: Requests without an answer at the window's end.
        cpu_s: Processor time of this process inside the window.
        cpu_wait_s: How long its threads waited for processors inside the window, summed; None where not known.
        payload_cpu_s: Processor time of filling, stamping and checking payloads inside the window.
        sampling_cpu_s: Processor time of the time series inside the window.
        loop_lag: How late the event loop was inside the window.
        recorder: All counts.
        reuse: How far apart the uses of blocks were.
        operations_digest: Digest of all that was looked up, loaded, stored and deleted.
        samples: The time series.
        host_samples: That of the host, where this rank kept it.
        failures: Messages of the first verification failures of the whole run.
        verify_failures: Number of all of them.
        dropped_page_cache_bytes: Bytes that the page cache was made to forget; None where that is unknown.
    """

    ending: Ending
    error: MLPStorageError | None
    started_unix_s: float
    late_ns: int
    warmup_ns: int
    warmup_steady: bool | None
    measured_ns: int
    drain_ns: int
    in_flight_at_end: int
    cpu_s: float
    cpu_wait_s: float | None
    payload_cpu_s: float
    sampling_cpu_s: float
    loop_lag: Histogram
    recorder: Recorder
    operations_digest: str
    reuse: ReuseDistance
    samples: tuple[Sample, ...]
    host_samples: tuple[HostSample, ...]
    failures: tuple[str, ...]
    verify_failures: int
    dropped_page_cache_bytes: int | None
    hung: bool


class Stop:
    """The first reason to end a run before its time."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self.ending: Ending | None = None
        self.error: MLPStorageError | None = None
        self.reason = ""

    def fail(self, error: Exception) -> None:
        """An I/O failed: the run ends orderly."""
        if self.ending is None:
            self.error = error if isinstance(error, MLPStorageError) else RunError(f"an I/O failed: {error}")
            self._end(Ending.FAILED)

    def interrupt(self, reason: str = "interrupted by a signal") -> None:
        """The user, the system or another rank asked for the end."""
        if self.ending is None:
            self.reason = reason
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
    ttft_target_ms: float,
    timing: Timing,
    clock: Clock,
    open_io: Callable[[Callable[[list[OpDone]], None]], DrainableIO],
    arena: SlotArena,
    stop: Stop,
    on_sample: Callable[[Sample], None],
    reused: Sequence[int] = (),
    drop_page_cache: DropPageCache | None = None,
    meet: Meet | None = None,
    on_snapshot: Callable[[Played], None] | None = None,
    existence: Existence | None = None,
    host_watch: HostWatch | None = None,
) -> Played:
    """Play a workload through warm-up and window, then drain.

    Args:
        rank: Number of this rank, for the samples.
        workload: What is played.
        config: The engine's.
        stored_bytes: Bytes of an object with padding.
        ttft_target_ms: Target of the verdict.
        timing: Lengths of the phases.
        clock: The rank's clock.
        open_io: Makes the I/O, given what is to be called with finished operations.
        arena: Slots of the DRAM tier.
        stop: What may end the run early.
        on_sample: Called with every line of the time series.
        reused: Blocks that are on storage when the run begins, the least recently used first. The oldest of those that
            the storage tier cannot hold are deleted before the start.
        drop_page_cache: Called with the ids of the objects on storage at the end of the warm-up, and, where blocks are
            reused, before the start; returns the bytes dropped, None if unknown. The window begins when it has
            returned. An `OSError` of it fails the run. None where nothing is cached.
        meet: Agrees with other ranks on when to begin, and on when the window begins where that is not known from the
            start. None for a rank alone, which begins as soon as it is ready.
        on_snapshot: Called every few seconds with what came of the run so far, without its samples.
        existence: Tells which blocks are on storage that other ranks write to as well; None where none does.
        host_watch: Keeps the time series of the host; None where another rank of it does.
    """
    meet = meet or alone(clock)
    recorder = Recorder(
        object_bytes=config.object_bytes,
        stored_bytes=stored_bytes,
        ttft_target_ns=round(ttft_target_ms * MS),
        shared=existence is not None,
    )
    blocks = open_io(recorder.operations)
    engine = Engine(
        config,
        blocks=blocks,
        arena=arena,
        recorder=recorder,
        clock=clock,
        on_failure=stop.fail,
        existence=existence,
    )
    cache = None if drop_page_cache is None else PageCache(drop_page_cache, engine)
    stopped = asyncio.create_task(stop.wait())
    if reused:
        await _reuse(engine, reused, cache, stop, stopped)
    begin = await _beginning(meet, clock, stopped, known=cache is None)
    begin_ns = begin.moment_ns
    window_known = begin.everyone and not timing.until_steady
    if window_known:
        # Now, so that what ends with the window's first moment is inside, however late the loop is then.
        recorder.open((begin_ns + timing.warmup_ns, begin_ns + timing.warmup_ns + timing.duration_ns))
    await _ends_first(asyncio.create_task(clock.sleep_until(begin_ns)), stopped)
    began_ns = clock.now_ns()
    begin_ns = min(begin_ns, began_ns)  # where it was stopped before
    begin_unix_s = time.time() - (began_ns - begin_ns) / NS
    lag = Histogram()
    meter = ProcessorMeter()
    sampler = Sampler(
        rank=rank,
        engine=engine,
        recorder=recorder,
        clock=clock,
        begin_ns=begin_ns,
        interval_ns=timing.sample_ns,
        block_bytes=stored_bytes * config.kv_ranks,
        on_sample=on_sample,
    )
    host = None if host_watch is None else _host_sampler(host_watch, sampler, clock, begin_ns, timing)
    steady = Steadiness() if timing.until_steady else None

    def so_far(ending: Ending, error: MLPStorageError | None, *, end_ns: int, drain_ns: int) -> Played:
        warmup_ns = (end_ns if recorder.start_ns is None else min(recorder.start_ns, end_ns)) - begin_ns
        return Played(
            ending=ending,
            error=error,
            started_unix_s=begin_unix_s + (max(warmup_ns, timing.warmup_ns) if window_known else warmup_ns) / NS,
            late_ns=began_ns - begin_ns,
            warmup_ns=warmup_ns,
            warmup_steady=None if steady is None else steady.seen,
            measured_ns=recorder.measured_until(end_ns),
            drain_ns=drain_ns,
            in_flight_at_end=engine.in_flight,
            cpu_s=meter.cpu_s,
            cpu_wait_s=meter.wait_s,
            payload_cpu_s=recorder.payload_ns / NS,
            sampling_cpu_s=sampler.cpu_s + (0.0 if host is None else host.cpu_s),
            loop_lag=lag,
            recorder=recorder,
            operations_digest=engine.operations_digest,
            reuse=engine.reuse,
            samples=(),
            host_samples=(),
            failures=tuple(recorder.failures),
            verify_failures=recorder.verify_failures,
            dropped_page_cache_bytes=None if cache is None else cache.dropped_bytes,
            hung=False,
        )

    def snapshot() -> None:
        if on_snapshot is not None:
            meter.read()
            on_snapshot(so_far(Ending.TIME, None, end_ns=clock.now_ns(), drain_ns=0))

    source = asyncio.create_task(send(workload, engine, config.pacing, clock, begin_ns))
    window = Window(
        warmup_ns=timing.warmup_ns,
        duration_ns=timing.duration_ns,
        clock=clock,
        recorder=recorder,
        meter=meter,
        cache=cache,
        steady=steady,
        meet=meet,
    )
    window_over = asyncio.create_task(window.over(begin_ns, known=window_known))
    async with _running(sampler.run(), _probe_lag(clock, recorder, lag), *(() if host is None else (host.run(),))):
        async with _running(_snapshots(clock, begin_ns + min(timing.sample_ns, SNAPSHOT_NS), snapshot)):
            await asyncio.wait({source, window_over, stopped}, return_when=asyncio.FIRST_COMPLETED)
        end_ns = clock.now_ns()
        recorder.close(end_ns)
        meter.read()
        for task in (source, window_over):
            if task.done() and not task.cancelled() and task.exception() is not None:
                stop.fail(_as_failure(task.exception()))
        ending = stop.ending or (Ending.EXHAUSTED if source.done() else Ending.TIME)
        in_flight = engine.in_flight
        engine.stop()
        blocks.cancel_queued()
        await _end(source, window_over, stopped)
        blocks.cancel_queued()
        hung = not await _drained(engine, blocks, timing, ending, stop)
    drained_ns = clock.now_ns()
    host_samples = () if host is None else await host.finish()
    error = stop.error or _wrong_data(recorder)
    return replace(
        so_far(Ending.FAILED if error is not None else ending, error, end_ns=end_ns, drain_ns=drained_ns - end_ns),
        in_flight_at_end=in_flight,
        samples=tuple(sampler.samples),
        host_samples=host_samples,
        hung=hung,
    )


def _host_sampler(watch: HostWatch, sampler: Sampler, clock: Clock, begin_ns: int, timing: Timing) -> HostSampler:
    """Takes lines of the host as often as the rank's, in the same phases."""
    return HostSampler(watch, clock=clock, begin_ns=begin_ns, interval_ns=timing.sample_ns, phase=sampler.phase)


async def _beginning(meet: Meet, clock: Clock, stopped: asyncio.Task[None], *, known: bool) -> Meeting:
    """What the ranks agree on for their begin, the vote being `known`; at once where the run is stopped before."""
    begin = Meeting(everyone=True, moment_ns=clock.now_ns())
    meeting = asyncio.create_task(meet(known))
    return meeting.result() if await _ends_first(meeting, stopped) else begin


async def _ends_first(task: asyncio.Task[Any], stopped: asyncio.Task[None]) -> bool:
    """Whether the task ended before the run was stopped; where not, it is cancelled."""
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        await _end(task)
        return False
    return True


async def _snapshots(clock: Clock, due_ns: int, snapshot: Callable[[], None]) -> None:
    """Take snapshots until cancelled, the first when it is due."""
    while True:
        await clock.sleep_until(due_ns)
        snapshot()
        due_ns += SNAPSHOT_NS


async def _reuse(
    engine: Engine, reused: Sequence[int], cache: PageCache | None, stop: Stop, stopped: asyncio.Task[None]
) -> None:
    """Begin with what an earlier run left on storage; return when that is ready, or the run is stopped."""

    async def ready() -> None:
        await engine.settle()
        if cache is not None:
            await cache.drop()

    engine.adopt(reused)
    readying = asyncio.create_task(ready())
    await asyncio.wait({readying, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if readying.done() and readying.exception() is not None:
        stop.fail(_as_failure(readying.exception()))
    readying.cancel()


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _drained(engine: Engine, blocks: DrainableIO, timing: Timing, ending: Ending, stop: Stop) -> bool:
    """Wait for what is running. False where storage does not return within the limit: it hangs, and fails the run."""
    limit_s = INTERRUPTED_DRAIN_LIMIT_S if ending is Ending.INTERRUPTED else timing.drain_limit_s
    try:
        async with asyncio.timeout(limit_s):
            await engine.settle()
            await blocks.idle()
    except TimeoutError:
        if ending is not Ending.INTERRUPTED:
            stop.fail(RunTimeoutError(f"the storage hangs: I/O was still running {limit_s:g} s after the window"))
        return False
    return True


def _wrong_data(recorder: Recorder) -> MLPStorageError | None:
    """The failure of a run in which storage returned what had not been written."""
    if not recorder.verify_failures:
        return None
    reads = "1 read" if recorder.verify_failures == 1 else f"{recorder.verify_failures:,} reads, of which the first"
    return RunError(f"verification failed for {reads}: {recorder.failures[0]}")


def _as_failure(error: BaseException | None) -> Exception:
    """The one exception behind a task group's; all but our own and the system's are faults of the program: raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, MLPStorageError | OSError):
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


async def _probe_lag(clock: Clock, recorder: Recorder, lag: Histogram) -> None:
    """Measure how late the event loop is, inside the window."""
    while True:
        due_ns = clock.now_ns() + LAG_PROBE_NS
        await clock.sleep_until(due_ns)
        now_ns = clock.now_ns()
        if recorder.inside(now_ns):
            lag.record(now_ns - due_ns)
