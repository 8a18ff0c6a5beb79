"""A rank's run on virtual time: what lies inside the measured window, how it ends, and what drains."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import (
    GIB,
    Decisions,
    Eviction,
    GenerationMode,
    Promotion,
    StorePolicy,
    TouchOrder,
    WriteOverflow,
    WriteSync,
)
from mlpstorage.errors import ConfigurationError, RunError, RunTimeoutError
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.host_rates import HostRates
from mlpstorage.kvcache.host_series import HostReading, HostWatch
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.play import (
    DRAIN_LIMIT_S,
    INTERRUPTED_DRAIN_LIMIT_S,
    LAG_PROBE_NS,
    Ending,
    Played,
    Stop,
    Timing,
    play,
)
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.together import Meet, Meeting
from mlpstorage.kvcache.window import DropPageCache
from mlpstorage.kvcache.workload import ClosedLoop, OpenLoop, Workload
from mlpstorage.measure.clock import NS
from mlpstorage.measure.process import thread_waits_ns
from mlpstorage.plan.compute import ConstantCompute
from mlpstorage.results.models import HostSample, Sample
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.ops import OpDone, OpKind
from mlpstorage.storage.payload import VerifyError
from mlpstorage.testing.virtual import ModelledIO, VirtualClock, VirtualLoop, run_virtual

MS = NS // 1000
OBJECT_BYTES = GIB
"""So that rates in GiB/s are counts of objects a second."""

# A prompt token takes 1 ms, an output token after the first 10 ms; a block has 100 tokens.
CONFIG = EngineConfig(
    block_tokens=100,
    kv_ranks=1,
    object_bytes=OBJECT_BYTES,
    gpu_blocks=0,
    cpu_blocks=0,
    storage_blocks=1000,
    touch=TouchOrder.TAIL,
    prefix_caching=True,
    pacing=Pacing(
        mode=GenerationMode.REALISTIC,
        compute=ConstantCompute(prefill_tokens_per_s=1000.0, decode_tokens_per_s=100.0),
    ),
    promote=Promotion.ALWAYS,
    decisions=Decisions.COMPLETION,
    store_policy=StorePolicy.ALWAYS,
    eviction=Eviction.LRU,
    evict_above=1.0,
    evict_to=1.0,
    write_overflow=WriteOverflow.BLOCK,
    write_queue_blocks=1000,
    write_queue_s=None,
    write_batch=16,
    write_interval_s=0.0,
    write_sync=WriteSync.NONE,
    load_batch=1,
    min_load_tokens=0,
    load_timeout=None,
)


def request(arrival_s: float | None, *block_ids: int, think_s: float = 0.0, output_tokens: int = 1) -> Request:
    """A request; without a prefix that is cached it takes 100 ms a block."""
    return Request(
        arrival_s=arrival_s,
        think_s=think_s,
        user=0,
        session=0,
        turn=0,
        prompt_tokens=100 * len(block_ids),
        output_tokens=output_tokens,
        block_ids=block_ids,
    )


def open_loop(*requests: Request) -> OpenLoop:
    """These requests at their times."""
    return OpenLoop(requests=lambda: iter(requests), digest="")


def closed_loop(*users: Callable[[], Iterator[Request]]) -> ClosedLoop:
    """These users."""
    return ClosedLoop(users=users, digest="")


def steady(first: float, step: float, number: int) -> OpenLoop:
    """Requests of one new block each, `step` seconds apart."""
    return open_loop(*(request(first + step * index, index) for index in range(number)))


@dataclass(slots=True)
class Stage:
    """A run and its surroundings."""

    workload: Workload
    warmup_s: float = 2.0
    duration_s: float = 10.0
    config: EngineConfig = CONFIG
    io: ModelledIO = field(default_factory=ModelledIO)
    stop: Stop = field(default_factory=Stop)
    shown: list[Sample] = field(default_factory=list)
    reused: Sequence[int] = ()
    drop_page_cache: DropPageCache | None = None
    until_steady: bool = False
    meet: Meet | None = None
    snapshots: list[tuple[int, int, int, int]] = field(default_factory=list)
    sample_s: float = 1.0
    host_watch: HostWatch | None = None
    ended_ns: int = 0

    def play(self, *beside: Callable[[], None], at_s: Sequence[float] = ()) -> Played:
        """Play it; each of `beside` is called at its time."""
        return run_virtual(self._play(beside, at_s), limit_s=1000)

    async def _play(self, beside: Sequence[Callable[[], None]], at_s: Sequence[float]) -> Played:
        loop = asyncio.get_running_loop()
        for call, when_s in zip(beside, at_s, strict=True):
            loop.call_at(when_s, call)
        played = await play(
            rank=3,
            workload=self.workload,
            config=self.config,
            stored_bytes=OBJECT_BYTES,
            ttft_target_ms=450.0,
            timing=Timing(
                warmup_ns=round(self.warmup_s * NS),
                duration_ns=round(self.duration_s * NS),
                until_steady=self.until_steady,
                sample_ns=round(self.sample_s * NS),
            ),
            clock=VirtualClock(),
            open_io=self._open,
            arena=DramArena(self.config.cpu_blocks, 0),
            stop=self.stop,
            on_sample=self.shown.append,
            reused=self.reused,
            drop_page_cache=self.drop_page_cache,
            meet=self.meet,
            on_snapshot=self._snapshot,
            host_watch=self.host_watch,
        )
        self.ended_ns = VirtualClock().now_ns()
        return played

    def _snapshot(self, played: Played) -> None:
        """Keep when it was taken, and of it the window so far, the requests in it, and the warm-up so far."""
        taken_ns = VirtualClock().now_ns()
        self.snapshots.append((taken_ns, played.measured_ns, played.recorder.requests.completed, played.warmup_ns))

    def _open(self, on_operations: Callable[[list[OpDone]], None]) -> ModelledIO:
        self.io.on_operations = on_operations
        return self.io


# The window


def test_only_what_completes_inside_the_window_counts() -> None:
    """Window 2 s to 12 s; requests of 100 ms that arrive every second from 0.95 s on end from 1.05 s to 14.05 s."""
    stage = Stage(steady(0.95, 1.0, 14), io=ModelledIO(latency_ns={OpKind.WRITE: 200 * MS}))
    played = stage.play()
    recorder = played.recorder
    assert played.ending is Ending.TIME
    assert played.error is None
    # Answers at 1.05, 2.05 ... 11.05; the request of 11.95 is still computed at 12.
    assert recorder.total_requests.completed == 11
    assert recorder.requests.completed == 10
    assert recorder.requests.prompt_tokens == 1000
    assert recorder.latency["ttft"].count == 10
    # Writes end 200 ms later: at 1.25, 2.25 ... 11.25.
    assert (recorder.total.write_ops, recorder.window.write_ops) == (11, 10)
    assert recorder.measured_ns == 10 * NS
    assert played.warmup_ns == 2 * NS
    assert played.in_flight_at_end == 1
    assert played.drain_ns == 0


def test_what_ends_after_the_window_is_in_the_totals_only() -> None:
    """A write of 5 s that begins at 11.1 s ends in the drain, 4.1 s after the window."""
    stage = Stage(open_loop(request(11.0, 1), request(100.0, 2)), io=ModelledIO(latency_ns={OpKind.WRITE: 5 * NS}))
    played = stage.play()
    assert played.recorder.requests.completed == 1
    assert played.recorder.window.write_ops == 0
    assert played.recorder.total.write_ops == 1
    assert played.recorder.total.written_bytes == OBJECT_BYTES
    assert played.recorder.latency["storage_write"].count == 0
    assert played.drain_ns == 4100 * MS
    assert played.in_flight_at_end == 0
    assert stage.ended_ns == 16_100 * MS


def test_writes_that_have_not_begun_at_the_end_are_given_up() -> None:
    """One thread, 4 s a write: the first of three runs on, the others never begin and count nowhere."""
    stage = Stage(
        open_loop(request(11.0, 1, 2, 3), request(100.0, 9)),
        io=ModelledIO(servers=1, latency_ns={OpKind.WRITE: 4 * NS}),
    )
    played = stage.play()
    assert played.drain_ns == 3300 * MS
    assert played.recorder.total.write_ops == 1
    assert played.recorder.total.io_errors == played.recorder.total.writes_dropped == 0
    assert played.error is None


def agreed(*moments_ns: int, everyone: bool = True, meetings: list[tuple[int, bool]] | None = None) -> Meet:
    """Ranks that agree on one moment after the other; keeps when they were asked, and the vote."""
    named = iter(moments_ns)

    async def meet(vote: bool) -> Meeting:
        if meetings is not None:
            meetings.append((VirtualClock().now_ns(), vote))
        return Meeting(everyone=everyone, moment_ns=next(named))

    return meet


def test_a_rank_begins_at_the_agreed_moment() -> None:
    """The moment is at 7 s: arrivals, warm-up, window and samples count from there, though the rank was ready at 0."""
    stage = Stage(steady(0.95, 1.0, 14), meet=agreed(7 * NS))
    played = stage.play()
    assert stage.io.done_of(OpKind.WRITE)[0].queued_ns == 8_050 * MS
    assert (played.warmup_ns, played.measured_ns, played.late_ns) == (2 * NS, 10 * NS, 0)
    assert played.recorder.requests.completed == 10
    assert [sample.t_s for sample in stage.shown[:2]] == [1.0, 2.0]
    assert stage.ended_ns == 19 * NS


def test_a_rank_that_hears_late_of_the_moment_keeps_to_it() -> None:
    """It is ready at 0, and hears at 3 s that all began at 1 s: its window is theirs, and it says how late it is."""

    async def meet(vote: bool) -> Meeting:
        await VirtualClock().sleep_until(3 * NS)
        return Meeting(everyone=vote, moment_ns=NS)

    stage = Stage(steady(0.95, 1.0, 14), meet=meet)
    played = stage.play()
    assert (played.late_ns, played.warmup_ns, played.measured_ns) == (2 * NS, 2 * NS, 10 * NS)
    assert stage.ended_ns == 13 * NS


def test_a_rank_is_stopped_while_it_waits_for_the_others() -> None:
    """They never come: it ends when it is asked to, with nothing played."""

    async def meet(vote: bool) -> Meeting:
        await asyncio.get_running_loop().create_future()
        return Meeting(everyone=vote, moment_ns=0)

    stage = Stage(steady(0.95, 1.0, 14), meet=meet)
    played = stage.play(stage.stop.interrupt, at_s=[4.0])
    assert played.ending is Ending.INTERRUPTED
    assert played.recorder.total_requests.completed == 0
    assert stage.ended_ns < 5 * NS


def test_ranks_of_which_one_drops_cached_pages_agree_on_the_window_too() -> None:
    """This rank has nothing to drop; another has: all wait at the end of the warm-up, and open the window as one."""
    meetings: list[tuple[int, bool]] = []
    stage = Stage(steady(0.95, 1.0, 30), meet=agreed(0, 5 * NS, everyone=False, meetings=meetings))
    played = stage.play()
    assert meetings == [(0, True), (2 * NS, True)]
    assert (played.warmup_ns, played.measured_ns) == (5 * NS, 10 * NS)
    assert stage.ended_ns == 15 * NS


def test_a_snapshot_has_what_was_measured_so_far() -> None:
    """Taken 1, 4, 7 and 10 s after the start: the window, from 2 s on, is 0, 2, 5 and 8 s long by then.

    Answers inside it come at 2.05, 3.05 and so on.
    """
    stage = Stage(steady(0.95, 1.0, 14))
    stage.play()
    assert stage.snapshots == [
        (1 * NS, 0, 0, 1 * NS),
        (4 * NS, 2 * NS, 2, 2 * NS),
        (7 * NS, 5 * NS, 5, 2 * NS),
        (10 * NS, 8 * NS, 8, 2 * NS),
    ]


def test_a_window_of_its_own_length_gives_the_rate() -> None:
    """Half a second, one answer every 100 ms of one user without think time: five, at any time of the clock."""

    def user() -> Iterator[Request]:
        return (request(None, number) for number in count())

    played = Stage(closed_loop(user), warmup_s=0.05, duration_s=0.5).play()
    assert played.recorder.requests.completed == 5
    assert played.recorder.measured_ns == 500 * MS
    assert played.in_flight_at_end == 1


# Early ends


def test_a_trace_that_is_over_ends_the_window() -> None:
    """The last answer is at 5.1 s and its write ends at 5.4 s: then nothing is left to measure."""
    stage = Stage(open_loop(request(3.0, 1), request(5.0, 2)), io=ModelledIO(latency_ns={OpKind.WRITE: 300 * MS}))
    played = stage.play()
    assert played.ending is Ending.EXHAUSTED
    assert played.error is None
    assert played.recorder.measured_ns == 3400 * MS
    assert played.recorder.requests.completed == 2
    assert played.in_flight_at_end == 0
    assert stage.ended_ns == 5400 * MS


def test_a_trace_that_is_over_in_the_warm_up_measured_nothing() -> None:
    """No window, no counts, and a warm-up of its true length."""
    played = Stage(open_loop(request(0.5, 1))).play()
    assert played.ending is Ending.EXHAUSTED
    assert (played.recorder.measured_ns, played.recorder.requests.completed) == (0, 0)
    assert played.recorder.total_requests.completed == 1
    assert played.warmup_ns == 600 * MS


def test_a_failed_write_ends_the_window_at_that_moment() -> None:
    """The write of the third request fails at 4.2 s: 2.2 s were measured, two requests in flight are reported."""
    error = OSError(28, "No space left on device")
    io = ModelledIO(latency_ns={OpKind.WRITE: 100 * MS}, failures={(OpKind.WRITE, 3): error})
    requests = [request(float(second), second) for second in (2, 3, 4)]
    played = Stage(open_loop(*requests, request(4.15, 10, 11), request(4.19, 12, 13), request(9.0, 14)), io=io).play()
    assert played.ending is Ending.FAILED
    assert isinstance(played.error, RunError)
    assert "No space left on device" in str(played.error)
    assert played.recorder.measured_ns == 2200 * MS
    assert played.recorder.requests.completed == 3
    assert played.recorder.total.write_ops == 2
    assert played.recorder.total.io_errors == 1
    assert played.in_flight_at_end == 2


def test_a_failed_read_ends_the_run_with_its_request_failed() -> None:
    """The second request finds a block that cannot be read."""
    io = ModelledIO(failures={(OpKind.READ, 1): OSError(5, "Input/output error")})
    played = Stage(open_loop(request(3.0, 1), request(4.0, 1, 2), request(9.0, 3)), io=io).play()
    assert played.ending is Ending.FAILED
    assert played.recorder.total_requests.failed == 1
    assert played.recorder.measured_ns == 2 * NS


def test_a_workload_that_breaks_while_it_is_read_fails_the_run() -> None:
    """Our own errors end the run orderly, under their own type."""

    def broken() -> Iterator[Request]:
        yield request(3.0, 1)
        raise ConfigurationError("trace.jsonl:2: broken")

    played = Stage(OpenLoop(requests=broken, digest="")).play()
    assert played.ending is Ending.FAILED
    assert isinstance(played.error, ConfigurationError)
    assert played.recorder.total_requests.completed == 0


def test_a_fault_of_the_program_is_raised() -> None:
    """Whatever is not ours must not look like a failed disk."""

    def broken() -> Iterator[Request]:
        yield request(3.0, 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Stage(OpenLoop(requests=broken, digest="")).play()


def test_an_interruption_ends_the_window_at_that_moment() -> None:
    """At 6.5 s of a window from 2 s: 4.5 s were measured, and what was counted is kept."""
    stage = Stage(steady(0.95, 1.0, 14))
    played = stage.play(stage.stop.interrupt, at_s=[6.5])
    assert played.ending is Ending.INTERRUPTED
    assert played.error is None
    assert played.recorder.measured_ns == 4500 * MS
    assert played.recorder.requests.completed == 5
    assert stage.ended_ns == 6500 * MS


def test_an_interruption_in_the_warm_up_measured_nothing() -> None:
    """There was no window yet."""
    stage = Stage(steady(0.1, 0.5, 14))
    played = stage.play(stage.stop.interrupt, at_s=[1.5])
    assert (played.ending, played.recorder.measured_ns, played.warmup_ns) == (Ending.INTERRUPTED, 0, 1500 * MS)
    assert played.cpu_s == 0.0
    assert played.recorder.total_requests.completed == 3


def test_the_first_reason_to_stop_is_the_one_that_is_told() -> None:
    """An interruption after a failure changes nothing, and the other way round."""
    stop = Stop()
    stop.fail(OSError("first"))
    stop.interrupt()
    stop.fail(OSError("second"))
    assert stop.ending is Ending.FAILED
    assert "first" in str(stop.error)
    stop = Stop()
    stop.interrupt()
    stop.fail(OSError("late"))
    assert (stop.ending, stop.error) == (Ending.INTERRUPTED, None)


# A warm-up until the hit ratio is steady


def alternating(number: int) -> OpenLoop:
    """A request a second; those of one span of 5 s have a new block each, those of the next the same one."""
    return open_loop(
        *(request(0.5 + index, 9999 if index // 5 % 2 else index) for index in range(number)), request(1000.0, 1)
    )


def test_a_warm_up_ends_as_soon_as_the_hit_ratio_is_steady() -> None:
    """Nothing is ever found: three spans agree at 15 s of at most 60, and the window has its full length from there."""
    stage = Stage(steady(0.5, 1.0, 100), warmup_s=60.0, until_steady=True)
    played = stage.play()
    assert (played.warmup_steady, played.warmup_ns) == (True, 15 * NS)
    assert played.recorder.measured_ns == 10 * NS
    assert played.recorder.requests.completed == 10
    assert played.ending is Ending.TIME
    assert stage.ended_ns == 25 * NS
    phases = [sample.phase for sample in stage.shown]
    # But for the moments at which it changes.
    assert phases[:14] + phases[15:24] == ["warmup"] * 14 + ["window"] * 9


def test_a_warm_up_that_is_never_steady_ends_at_its_limit() -> None:
    """Hit ratios of 0 and of nearly 1, span after span: at 22 s it is over, is told so, and the window is whole."""
    stage = Stage(alternating(40), warmup_s=22.0, until_steady=True)
    played = stage.play()
    assert (played.warmup_steady, played.warmup_ns) == (False, 22 * NS)
    assert played.recorder.measured_ns == 10 * NS
    assert stage.ended_ns == 32 * NS


def test_spans_without_an_answer_make_no_warm_up_steady() -> None:
    """One request in the 11th second, and none before: 30 s are waited for."""
    played = Stage(open_loop(request(10.5, 1), request(100.0, 2)), warmup_s=30.0, until_steady=True).play()
    assert (played.warmup_steady, played.warmup_ns, played.recorder.measured_ns) == (False, 30 * NS, 10 * NS)


def test_a_warm_up_of_a_fixed_length_says_nothing_of_steadiness() -> None:
    """Nobody looked."""
    assert Stage(steady(0.95, 1.0, 14)).play().warmup_steady is None


def test_a_trace_that_is_over_before_it_is_steady_measured_nothing() -> None:
    """The last answer comes at 7.6 s."""
    played = Stage(steady(0.5, 1.0, 8), warmup_s=60.0, until_steady=True).play()
    assert (played.ending, played.warmup_steady) == (Ending.EXHAUSTED, False)
    assert (played.recorder.measured_ns, played.warmup_ns) == (0, 7600 * MS)


def test_an_interruption_while_it_is_not_steady_measured_nothing() -> None:
    """At 12.3 s, in the third span."""
    stage = Stage(steady(0.5, 1.0, 100), warmup_s=60.0, until_steady=True)
    played = stage.play(stage.stop.interrupt, at_s=[12.3])
    assert (played.ending, played.warmup_steady) == (Ending.INTERRUPTED, False)
    assert (played.recorder.measured_ns, played.warmup_ns) == (0, 12_300 * MS)


# Decisions at arrival

ARRIVAL = replace(CONFIG, decisions=Decisions.ARRIVAL, cpu_blocks=2, storage_blocks=8, write_queue_blocks=2)


def tangled() -> OpenLoop:
    """Ten requests a second that share beginnings: reads wait for writes, deletes for reads, writes for deletes."""
    chains = [(1, 2), (1, 2, 3), (1, 2, 3, 4), (5, 6), (1, 2, 7), (5, 6, 8, 9), (10, 11), (5, 6, 12), (1, 2, 3, 4, 13)]
    return open_loop(*(request(0.1 * index, *chains[index % len(chains)]) for index in range(60)), request(1000.0, 1))


SLOW = {OpKind.READ: 150 * MS, OpKind.WRITE: 250 * MS, OpKind.DELETE: 100 * MS, OpKind.COPY_IN: 20 * MS}


def test_with_decisions_at_arrival_a_run_plays_to_its_end() -> None:
    """The tangle of the tests below does what it is for: all kinds of operations, and all of it is answered."""
    stage = Stage(tangled(), config=ARRIVAL, duration_s=60.0, io=ModelledIO(servers=4, latency_ns=SLOW))
    played = stage.play()
    assert played.recorder.total_requests.completed == 60
    assert (played.recorder.total_requests.failed, stage.io.misuses, played.error) == (0, [], None)
    assert min(played.recorder.total.read_ops, played.recorder.total.write_ops, played.recorder.total.delete_ops) > 20


@settings(derandomize=True, deadline=None, max_examples=60)
@given(at_ms=st.integers(0, 8000), servers=st.sampled_from([1, 4, None]), fast=st.booleans())
def test_with_decisions_at_arrival_an_interruption_at_any_moment_ends_orderly(
    at_ms: int, servers: int | None, *, fast: bool
) -> None:
    """Whoever waits for whom: nothing hangs, and the drain is what was running then, one write at the most."""
    mode = GenerationMode.FAST if fast else GenerationMode.REALISTIC
    config = replace(ARRIVAL, pacing=replace(CONFIG.pacing, mode=mode))
    stage = Stage(tangled(), config=config, io=ModelledIO(servers=servers, latency_ns=SLOW))
    played = stage.play(stage.stop.interrupt, at_s=[at_ms / 1000])
    assert (played.ending, played.error, played.hung) == (Ending.INTERRUPTED, None, False)
    assert played.drain_ns <= max(SLOW.values())
    assert stage.io.misuses == []
    assert played.recorder.total.writes_dropped == 0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([OpKind.READ, OpKind.WRITE, OpKind.DELETE]),
    number=st.integers(1, 20),
    servers=st.sampled_from([1, 4, None]),
)
def test_with_decisions_at_arrival_a_failure_of_any_operation_ends_orderly(
    kind: OpKind, number: int, servers: int | None
) -> None:
    """The run fails with that error and at that moment; nothing hangs, and no second error follows from the first."""
    io = ModelledIO(servers=servers, latency_ns=SLOW, failures={(kind, number): OSError(5, "Input/output error")})
    played = Stage(tangled(), config=ARRIVAL, duration_s=60.0, io=io).play()
    assert (played.ending, played.hung) == (Ending.FAILED, False)
    assert "Input/output error" in str(played.error)
    assert played.recorder.total.io_errors == 1
    assert played.drain_ns <= max(SLOW.values())
    assert io.misuses == []


def test_with_decisions_at_arrival_storage_that_hangs_is_given_up_after_a_limit() -> None:
    """A write that never returns holds up a read that waits for it: both are given up with it."""
    io = ModelledIO(latency_ns={OpKind.WRITE: None})
    asked = open_loop(request(3.0, 1), request(4.0, 1, 2), request(100.0, 3))
    played = Stage(asked, config=replace(ARRIVAL, cpu_blocks=0), io=io).play()
    assert isinstance(played.error, RunTimeoutError)
    assert (played.hung, played.in_flight_at_end) == (True, 1)
    assert played.drain_ns == round(DRAIN_LIMIT_S * NS)


def test_two_runs_on_storage_of_other_speeds_have_one_digest_and_other_workloads_another() -> None:
    """A run tells the digest of its engine, and how far apart the uses of its blocks were."""

    def digest(workload: OpenLoop, config: EngineConfig, servers: int) -> str:
        io = ModelledIO(servers=servers, latency_ns=SLOW)
        played = Stage(workload, config=config, duration_s=60.0, io=io).play()
        assert played.reuse.first_uses == 13
        return played.operations_digest

    one = digest(tangled(), ARRIVAL, 1)
    assert one == digest(tangled(), ARRIVAL, 4)
    assert one != digest(tangled(), replace(ARRIVAL, storage_blocks=7), 4)


# Storage that hangs


def test_storage_that_hangs_is_given_up_after_a_limit() -> None:
    """A write that never returns: the drain takes its limit, and the run has failed with a time limit."""
    io = ModelledIO(latency_ns={OpKind.WRITE: None})
    stage = Stage(open_loop(request(3.0, 1), request(100.0, 2)), io=io)
    played = stage.play()
    assert isinstance(played.error, RunTimeoutError)
    assert played.ending is Ending.FAILED
    assert played.drain_ns == round(DRAIN_LIMIT_S * NS)
    assert played.recorder.measured_ns == 10 * NS
    assert stage.ended_ns == 42 * NS


def test_a_read_that_hangs_holds_the_drain_too() -> None:
    """Its request is cancelled with the window, its thread is not."""
    io = ModelledIO(latency_ns={OpKind.READ: None})
    played = Stage(open_loop(request(3.0, 1), request(4.0, 1, 2), request(100.0, 3)), io=io).play()
    assert isinstance(played.error, RunTimeoutError)
    assert played.in_flight_at_end == 1


def test_who_interrupts_waits_less_for_storage_that_hangs() -> None:
    """2 s, and it is still an interruption."""
    io = ModelledIO(latency_ns={OpKind.WRITE: None})
    stage = Stage(open_loop(request(3.0, 1), request(100.0, 2)), io=io)
    played = stage.play(stage.stop.interrupt, at_s=[5.0])
    assert (played.ending, played.error) == (Ending.INTERRUPTED, None)
    assert played.drain_ns == round(INTERRUPTED_DRAIN_LIMIT_S * NS)


def test_requests_that_wait_for_the_write_queue_do_not_outlive_the_window() -> None:
    """A queue of one block before a slow disk: the drain is the one running write, not the whole backlog."""
    stage = Stage(
        open_loop(request(3.0, *range(20)), request(100.0, 99)),
        config=replace(CONFIG, write_queue_blocks=1),
        io=ModelledIO(servers=1, latency_ns={OpKind.WRITE: 3 * NS}),
    )
    played = stage.play()
    # Computed at 5 s; writes end at 8 s and 11 s, the third runs over the end at 12 s until 14 s.
    assert played.recorder.total.write_ops == 3
    assert played.recorder.window.write_ops == 2
    assert played.drain_ns == 2 * NS


# Arrivals


def test_an_open_loop_keeps_its_times_however_slow_the_answers_are() -> None:
    """Answers of 100 ms and 290 x 10 ms to requests one second apart: three are in flight, each TTFT is its own."""
    stage = Stage(open_loop(*(request(2.05 + second, second, output_tokens=291) for second in range(5))))
    played = stage.play()
    ttft = played.recorder.latency["ttft"]
    assert (ttft.count, ttft.min_ns, ttft.max_ns) == (5, 100 * MS, 100 * MS)
    assert played.recorder.requests.completed == 5
    # At 5 s, say: those of 2.05 s (until 5.05 s), 3.05 s and 4.05 s.
    assert max(sample.requests_in_flight for sample in stage.shown) == 3


def test_prefills_wait_for_one_another_and_arrivals_do_not() -> None:
    """Prefills of 3 s, one second apart from 2 s on, end at 5, 8, 11 and, after the window, at 14 and 17 s."""
    stage = Stage(open_loop(*(request(2.0 + second, *range(100 * second, 100 * second + 30)) for second in range(5))))
    played = stage.play()
    ttft, tokens = played.recorder.latency["ttft"], played.recorder.first_tokens
    assert (ttft.count, ttft.min_ns, ttft.sum_ns, ttft.max_ns) == (3, 3 * NS, (3 + 5 + 7) * NS, 7 * NS)
    assert (tokens.client_late_ns, tokens.prefill_queue_ns, tokens.prefill_ns) == (0, (0 + 2 + 4) * NS, 9 * NS)
    # At 7 s all five have come, and one is answered.
    assert max(sample.requests_in_flight for sample in stage.shown) == 4
    assert played.in_flight_at_end == 2


def test_a_stalled_client_cannot_hide_latency() -> None:
    """A loop that is held up from 4 s to 7 s sends the requests of 4.5 s and 5.5 s late; their TTFT says so.

    Both begin at 7 s, and the second waits 100 ms for the prefill of the first.
    """
    stage = Stage(open_loop(request(4.5, 1), request(5.5, 2), request(8.0, 3)))

    def stall() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.jump(3 * NS)

    played = stage.play(stall, at_s=[4.0])
    ttft = played.recorder.latency["ttft"]
    assert (ttft.count, ttft.sum_ns, ttft.max_ns) == (3, (2600 + 1700 + 100) * MS, 2600 * MS)
    late, tokens = played.recorder.latency["client_late"], played.recorder.first_tokens
    assert (late.count, late.sum_ns, late.max_ns) == (3, (2500 + 1500) * MS, 2500 * MS)
    assert (tokens.client_late_ns, tokens.prefill_queue_ns) == (4000 * MS, 100 * MS)
    assert played.loop_lag.max_ns is not None
    assert 3 * NS - LAG_PROBE_NS <= played.loop_lag.max_ns <= 3 * NS


def test_users_of_a_closed_loop_wait_think_and_ask_again() -> None:
    """1 s of thought, 100 ms of prefill, 10 x 10 ms of decode: a turn every 1.2 s, TTFT from the end of thinking.

    The first prefill of the second user waits for that of the first, once: from then on the second is 100 ms behind,
    and its tenth answer comes at 12.1 s.
    """

    def user(first: int) -> Iterator[Request]:
        return (request(None, first + number, think_s=1.0, output_tokens=11) for number in count())

    stage = Stage(closed_loop(partial(user, 0), partial(user, 1000)), warmup_s=0.0, duration_s=12.15)
    played = stage.play()
    assert played.recorder.requests.completed == 2 * 10
    ttft = played.recorder.latency["ttft"]
    assert (ttft.count, ttft.sum_ns, ttft.max_ns) == (20, 19 * 100 * MS + 200 * MS, 200 * MS)
    assert played.recorder.requests.output_tokens == 2 * 10 * 11
    assert played.in_flight_at_end == 0


@pytest.mark.parametrize(("mode", "completed"), [(GenerationMode.REALISTIC, 10), (GenerationMode.FAST, 100)])
def test_the_generation_mode_scales_thought_and_computation(mode: GenerationMode, completed: int) -> None:
    """900 ms of thought and 100 ms of prefill: one answer a second, or ten."""

    def user() -> Iterator[Request]:
        return (request(None, number, think_s=0.9) for number in count())

    config = replace(CONFIG, pacing=replace(CONFIG.pacing, mode=mode))
    played = Stage(closed_loop(user), warmup_s=0.01, duration_s=10.0, config=config).play()
    assert played.recorder.requests.completed == completed


def test_a_user_waits_for_the_write_queue_before_the_next_question() -> None:
    """A closed loop slows down with its storage: one block each 2 s, although an answer takes 100 ms."""

    def user() -> Iterator[Request]:
        return (request(None, number) for number in count())

    stage = Stage(
        closed_loop(user),
        warmup_s=0.0,
        duration_s=20.05,
        config=replace(CONFIG, write_queue_blocks=1),
        io=ModelledIO(servers=1, latency_ns={OpKind.WRITE: 2 * NS}),
    )
    played = stage.play()
    # Answers at 0.1 s, 0.2 s (whose write enters at 2.1 s), 2.2 s, 4.2 s ... 18.2 s.
    assert played.recorder.requests.completed == 11


# The time series


def test_a_sample_is_taken_every_second_with_its_phase() -> None:
    """Warm-up to 2.5 s, window to 6.5 s, then a drain of a write that ends at 9.1 s."""
    stage = Stage(
        open_loop(request(1.0, 1), request(3.2, 2), request(6.0, 3), request(100.0, 4)),
        warmup_s=2.5,
        duration_s=4.0,
        io=ModelledIO(latency_ns={OpKind.WRITE: 3 * NS}),
    )
    played = stage.play()
    assert stage.shown == list(played.samples)
    assert [sample.t_s for sample in played.samples] == [float(second) for second in range(1, 10)]
    assert [sample.phase for sample in played.samples] == ["warmup"] * 2 + ["window"] * 4 + ["drain"] * 3
    assert {sample.rank for sample in played.samples} == {3}
    # Answers at 1.1, 3.3 and 6.1 s; writes end 3 s later.
    assert [sample.requests_completed for sample in played.samples] == [0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [sample.written_bytes // GIB for sample in played.samples] == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert [sample.write_gib_per_s for sample in played.samples] == [0, 0, 0, 0, 1, 0, 1, 0, 0]
    assert [sample.write_queue_blocks for sample in played.samples] == [0, 1, 1, 2, 1, 1, 1, 1, 1]
    assert [sample.storage_used_bytes // GIB for sample in played.samples] == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert played.drain_ns == 2600 * MS


def test_a_sample_tells_what_is_in_flight_and_what_was_found() -> None:
    """Three blocks of four are read back, at 3 GiB in that second."""
    stage = Stage(open_loop(request(2.0, 1, 2, 3), request(4.2, 1, 2, 3, 4, output_tokens=100), request(100.0, 9)))
    played = stage.play()
    fifth, sixth = played.samples[4:6]
    assert (fifth.t_s, fifth.read_gib_per_s, fifth.requests_in_flight, fifth.cached_tokens) == (5.0, 3.0, 1, 0)
    assert (sixth.read_gib_per_s, sixth.requests_in_flight, sixth.cached_tokens) == (0.0, 0, 300)


def test_a_sample_tells_the_room_of_all_objects_of_a_block() -> None:
    """Two blocks of four objects of 1 GiB: 8 GiB on storage, and 4 of them in DRAM."""
    config = replace(CONFIG, kv_ranks=4, cpu_blocks=1)
    stage = Stage(open_loop(request(2.0, 1, 2), request(100.0, 9)), config=config, io=ModelledIO(kv_ranks=4))
    (sample,) = [sample for sample in stage.play().samples if sample.t_s == 5.0]
    assert (sample.storage_used_bytes // GIB, sample.cpu_used_bytes // GIB) == (8, 4)
    assert sample.written_bytes == 8 * GIB


@pytest.mark.parametrize(("sample_s", "taken_s"), [(0.5, [0.5, 1.0, 1.5, 2.0]), (2.0, [2.0]), (3600.0, [])])
def test_samples_are_an_interval_apart(sample_s: float, taken_s: list[float]) -> None:
    """Half a second, two seconds, an hour: of a run of 2.2 s."""
    stage = Stage(open_loop(request(100.0, 1)), warmup_s=1.2, duration_s=1.0, sample_s=sample_s)
    assert [sample.t_s for sample in stage.play().samples] == taken_s


def test_a_client_that_was_late_takes_one_sample_and_is_in_step_again() -> None:
    """From 2.1 s to 4.3 s nothing ran: the lines of 3 and 4 s are one, over all that time."""
    stage = Stage(steady(0.95, 1.0, 9), warmup_s=0.0, duration_s=6.5)

    def held_up() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.jump(2_200 * MS)

    played = stage.play(held_up, at_s=[2.1])
    assert [sample.t_s for sample in played.samples] == [1.0, 2.0, 4.3, 5.0, 6.0]


def test_the_host_is_watched_to_the_end_of_the_drain() -> None:
    """Readings that tell nothing but their time: one a second, and one when the drain is over, at 9.1 s."""
    lines: list[HostSample] = []
    last_s = [0.0]

    async def take() -> HostReading | None:
        now_s = VirtualClock().now_ns() / NS
        interval_s, last_s[0] = now_s - last_s[0], now_s
        nothing = HostRates(cpu=None, memory=None, vm=None, disks=None, networks=None)
        reading = HostReading(at_ns=round(now_s * NS), interval_s=interval_s, rates=nothing, cpu_s=0.25)
        return reading if interval_s else None

    stage = Stage(
        open_loop(request(6.0, 1), request(100.0, 4)),
        warmup_s=2.5,
        duration_s=4.0,
        io=ModelledIO(latency_ns={OpKind.WRITE: 3 * NS}),
        host_watch=HostWatch(take=take, on_sample=lines.append),
    )
    played = stage.play()
    assert [line.t_s for line in lines] == [*map(float, range(1, 10)), 9.1]
    assert [line.phase for line in lines] == ["warmup"] * 2 + ["window"] * 4 + ["drain"] * 4
    assert list(played.host_samples) == lines
    assert played.drain_ns == 2600 * MS
    # Four readings of the window; the lines themselves cost next to nothing.
    assert 1.0 < played.sampling_cpu_s < 1.2


# What was on storage before


def test_what_an_earlier_run_left_is_found() -> None:
    """Two blocks of two objects each, read in the window by the first request."""
    stage = Stage(
        open_loop(request(3.0, 1, 2, 3), request(100.0, 9)),
        config=replace(CONFIG, kv_ranks=2),
        io=ModelledIO(stored={2, 3, 4, 5}, kv_ranks=2),
        reused=(2, 1),
    )
    played = stage.play()
    assert played.recorder.requests.hit_blocks.storage == 2
    assert played.recorder.window.read_ops == 4
    assert played.error is None
    assert stage.io.misuses == []


def test_what_is_too_much_of_it_is_deleted_before_the_run_begins() -> None:
    """Two of four blocks fit: deletes of 3 s, the oldest blocks, in no window; the run begins when they have ended."""
    stage = Stage(
        open_loop(request(1.0, 1, 2), request(100.0, 9)),
        warmup_s=0.0,
        config=replace(CONFIG, storage_blocks=2),
        io=ModelledIO(stored={1, 2, 3, 4}, latency_ns={OpKind.DELETE: 3 * NS}),
        reused=(4, 3, 2, 1),
    )
    played = stage.play()
    assert [done.op.object_id for done in stage.io.done_of(OpKind.DELETE)] == [4, 3]
    assert (played.recorder.total.delete_ops, played.recorder.window.delete_ops) == (2, 0)
    assert [done.start_ns for done in stage.io.done_of(OpKind.READ)] == [4 * NS, 4 * NS]
    assert played.recorder.measured_ns == 10 * NS
    assert stage.ended_ns == 13 * NS


def test_who_interrupts_before_the_run_has_begun_does_not_wait_for_all_deletes() -> None:
    """Of three deletes of 3 s by one thread the first is waited for; nothing was measured."""
    stage = Stage(
        open_loop(request(1.0, 1)),
        config=replace(CONFIG, storage_blocks=1),
        io=ModelledIO(servers=1, stored={1, 2, 3, 4}, latency_ns={OpKind.DELETE: 3 * NS}),
        reused=(4, 3, 2, 1),
    )
    played = stage.play(stage.stop.interrupt, at_s=[2.0])
    assert played.ending is Ending.INTERRUPTED
    assert played.recorder.total.delete_ops == 1
    assert played.recorder.measured_ns == 0
    assert stage.ended_ns == 3 * NS


# The page cache


@dataclass(slots=True)
class Dropper:
    """Stands for a store whose pages can be dropped; takes its time, and says what it is told to say."""

    says: list[int | None] = field(default_factory=list)
    takes_s: float = 0.0
    error: OSError | None = None
    calls: list[tuple[int, list[int]]] = field(default_factory=list)

    async def __call__(self, object_ids: Sequence[int]) -> int | None:
        """Drop the objects' pages."""
        self.calls.append((VirtualClock().now_ns(), sorted(object_ids)))
        await asyncio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        return self.says[len(self.calls) - 1]


def test_the_page_cache_is_dropped_when_the_window_begins() -> None:
    """At 2 s, of what is on storage by then: two blocks of two objects, and not of the one that is being written."""
    drop = Dropper(says=[4096])
    stage = Stage(
        open_loop(request(0.5, 1, 2), request(1.8, 3), request(100.0, 9)),
        config=replace(CONFIG, kv_ranks=2),
        io=ModelledIO(kv_ranks=2, latency_ns={OpKind.WRITE: 300 * MS}),
        drop_page_cache=drop,
    )
    played = stage.play()
    assert drop.calls == [(2 * NS, [2, 3, 4, 5])]
    assert played.dropped_page_cache_bytes == 4096


def test_the_page_cache_is_dropped_before_the_start_too_where_blocks_are_reused() -> None:
    """After the deletes of what does not fit, at 3 s, for 1 s; then at the window's begin. The run began at 4 s."""
    drop = Dropper(says=[100, 20], takes_s=1.0)
    stage = Stage(
        open_loop(request(9.0, 1)),
        config=replace(CONFIG, storage_blocks=1),
        io=ModelledIO(stored={1, 2}, latency_ns={OpKind.DELETE: 3 * NS}),
        reused=(2, 1),
        drop_page_cache=drop,
    )
    played = stage.play()
    assert drop.calls == [(3 * NS, [1]), (6 * NS, [1])]
    assert played.dropped_page_cache_bytes == 120
    # A full hit computes one token.
    assert stage.ended_ns == 13 * NS + 1 * MS


def test_where_one_drop_is_unknown_the_sum_is() -> None:
    """None, and so is what was never dropped: no call, or no window."""
    workload, io = open_loop(request(9.0, 1)), ModelledIO(stored={1})
    assert (
        Stage(workload, io=io, reused=(1,), drop_page_cache=Dropper(says=[5, None])).play().dropped_page_cache_bytes
        is None
    )
    assert Stage(workload).play().dropped_page_cache_bytes is None
    early, drop = open_loop(request(0.5, 1)), Dropper(says=[5])
    assert Stage(early, drop_page_cache=drop).play().dropped_page_cache_bytes is None
    assert drop.calls == []


def test_a_drop_that_fails_fails_the_run() -> None:
    """As any I/O does, at once."""
    drop = Dropper(error=OSError(5, "Input/output error"))
    played = Stage(steady(0.95, 1.0, 14), drop_page_cache=drop).play()
    assert isinstance(played.error, RunError)
    assert "Input/output error" in str(played.error)
    assert played.recorder.measured_ns == 0


def test_a_slow_drop_puts_off_the_window() -> None:
    """15 s from the end of the warm-up at 2 s: the window begins at 17 s and has its full length."""
    played = Stage(steady(0.95, 1.0, 40), drop_page_cache=Dropper(says=[7], takes_s=15.0)).play()
    assert (played.warmup_ns, played.recorder.measured_ns) == (17 * NS, 10 * NS)
    assert (played.dropped_page_cache_bytes, played.error, played.hung) == (7, None, False)
    assert played.recorder.requests.completed == 10


def test_a_drop_that_never_ends_keeps_nobody_waiting() -> None:
    """The trace is over before the drop is: the run ends, with a window of no length."""
    played = Stage(steady(0.95, 1.0, 14), drop_page_cache=Dropper(says=[7], takes_s=100.0)).play()
    assert (played.recorder.measured_ns, played.dropped_page_cache_bytes, played.hung) == (0, None, False)
    assert played.ending is Ending.EXHAUSTED


# Wrong data


def test_wrong_data_fails_the_run_at_its_end_and_not_before() -> None:
    """Two reads of the warm-up and the window are wrong: the whole window is measured, and the first is told."""
    first, second = VerifyError("first", 1, (1, 1), (2, 1)), VerifyError("second", 0, (1, 0), (2, 0))
    io = ModelledIO(failures={(OpKind.READ, 1): first, (OpKind.READ, 3): second})
    asked = [request(at_s, 1) for at_s in (0.5, 1.0, 3.0, 4.0, 5.0, 6.0)]
    played = Stage(open_loop(*asked, request(100.0, 9)), io=io).play()
    # Block 1 is wrong at 1 s, is computed and written anew at 3 s, is right at 4 s, wrong at 5 s, computed at 6 s.
    assert played.ending is Ending.FAILED
    assert isinstance(played.error, RunError)
    assert played.error.exit_code == 6
    assert "2 reads" in str(played.error)
    assert str(first) in str(played.error)
    assert played.failures == (str(first), str(second))
    assert played.verify_failures == 2
    assert played.recorder.measured_ns == 10 * NS
    assert (played.recorder.requests.completed, played.recorder.requests.failed) == (3, 1)
    assert played.recorder.total_requests.failed == 2
    assert io.misuses == []


def test_a_failed_call_is_told_before_wrong_data() -> None:
    """It ended the run; the wrong data is in the failures."""
    failures = {(OpKind.READ, 1): VerifyError("first", 1, (1, 1), (2, 1)), (OpKind.WRITE, 2): OSError(28, "full")}
    asked = [request(at_s, 1) for at_s in (3.0, 4.0, 5.0)]
    played = Stage(open_loop(*asked, request(100.0, 9)), io=ModelledIO(failures=failures)).play()
    assert "full" in str(played.error)
    assert played.verify_failures == len(played.failures) == 1


# The client's own cost


def test_time_of_payloads_is_that_of_the_window() -> None:
    """Writes of 3 ms of payload end at 1.05, 2.05 ... 11.05 s: ten of the eleven lie inside."""
    played = Stage(steady(0.95, 1.0, 14), io=ModelledIO(payload_ns={OpKind.WRITE: 3 * MS})).play()
    assert played.payload_cpu_s == 0.03
    assert played.recorder.total.write_ops == 11


def test_waits_for_processors_are_those_of_the_window() -> None:
    """None where the kernel does not tell; never negative; and 0 where there was no window."""
    played = Stage(steady(0.95, 1.0, 14)).play()
    assert (played.cpu_wait_s is None) == (thread_waits_ns() is None)
    assert played.cpu_wait_s is None or played.cpu_wait_s >= 0
    assert played.cpu_s > 0
    stage = Stage(steady(0.1, 0.5, 14))
    assert stage.play(stage.stop.interrupt, at_s=[1.5]).cpu_wait_s == 0


# Blocks that collect


def test_a_trace_that_is_over_waits_for_the_interval() -> None:
    """Answered at 3.1 s, handed over 4 s later, written in 1 s: all is stored when the run ends."""
    stage = Stage(
        open_loop(request(3.0, 1)),
        config=replace(CONFIG, write_interval_s=4.0),
        io=ModelledIO(latency_ns={OpKind.WRITE: 1 * NS}),
    )
    played = stage.play()
    assert played.ending is Ending.EXHAUSTED
    assert stage.ended_ns == 8100 * MS
    assert played.recorder.window.write_ops == 1


def test_what_collects_when_the_window_ends_stays_in_flight() -> None:
    """Answered at 11.1 s, to be handed over at 15.1 s: neither written nor dropped, and nothing to drain."""
    stage = Stage(open_loop(request(11.0, 1), request(100.0, 9)), config=replace(CONFIG, write_interval_s=4.0))
    played = stage.play()
    assert played.recorder.total.write_ops == played.recorder.total.writes_dropped == 0
    assert (stage.ended_ns, played.drain_ns) == (12 * NS, 0)


# The loop's lag


def test_lag_is_measured_inside_the_window_only() -> None:
    """The loop is held up for 500 ms in the warm-up and for 70 ms in the window; only the latter shows."""
    stage = Stage(steady(0.95, 1.0, 20))

    def stall(time_ms: int) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.jump(time_ms * MS)

    played = stage.play(partial(stall, 500), partial(stall, 70), at_s=[1.203, 5.203])
    lag = played.loop_lag
    assert lag.max_ns is not None
    assert 70 * MS - LAG_PROBE_NS <= lag.max_ns <= 70 * MS
    # A probe in each of its periods, less those that the stall swallowed, and one at each edge.
    probes = (10 * NS - 70 * MS) // LAG_PROBE_NS
    assert probes - 1 <= lag.count <= probes + 2
    assert lag.percentile_ns(50) == 0
