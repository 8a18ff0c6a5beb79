"""A rank's run on virtual time: what lies inside the measured window, how it ends, and what drains."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import pytest

from mlpstorage.config import GIB, GenerationMode, TouchOrder
from mlpstorage.errors import ConfigurationError, RunError, RunTimeoutError
from mlpstorage.kvcache.engine import EngineConfig
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
from mlpstorage.kvcache.workload import ClosedLoop, OpenLoop, Workload
from mlpstorage.measure.clock import NS
from mlpstorage.results.models import Sample
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.ops import OpDone, OpKind
from mlpstorage.testing.virtual import ModelledIO, VirtualClock, VirtualLoop, run_virtual

MS = NS // 1000
OBJECT_BYTES = GIB
"""So that rates in GiB/s are counts of objects a second."""

# A prompt token takes 1 ms, an output token after the first 10 ms; a block has 100 tokens.
CONFIG = EngineConfig(
    block_tokens=100,
    object_bytes=OBJECT_BYTES,
    gpu_blocks=0,
    cpu_blocks=0,
    storage_blocks=1000,
    write_queue_blocks=1000,
    touch=TouchOrder.TAIL,
    prefix_caching=True,
    pacing=Pacing(mode=GenerationMode.REALISTIC, prefill_tokens_per_s=1000.0, decode_tokens_per_s=100.0),
)


def request(arrival_s: float | None, *block_ids: int, think_s: float = 0.0, output_tokens: int = 1) -> Request:
    """A request; without a prefix that is cached it takes 100 ms a block."""
    return Request(
        arrival_s=arrival_s,
        think_s=think_s,
        user=0,
        turn=0,
        prompt_tokens=100 * len(block_ids),
        output_tokens=output_tokens,
        block_ids=block_ids,
    )


def open_loop(*requests: Request) -> OpenLoop:
    """These requests at their times."""
    return OpenLoop(requests=lambda: iter(requests), block_tokens=100, digest="")


def closed_loop(*users: Callable[[], Iterator[Request]]) -> ClosedLoop:
    """These users."""
    return ClosedLoop(users=users, block_tokens=100, digest="")


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
            timing=Timing(warmup_ns=round(self.warmup_s * NS), duration_ns=round(self.duration_s * NS)),
            clock=VirtualClock(),
            open_io=self._open,
            arena=DramArena(self.config.cpu_blocks, 0),
            stop=self.stop,
            on_sample=self.shown.append,
        )
        self.ended_ns = VirtualClock().now_ns()
        return played

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

    played = Stage(OpenLoop(requests=broken, block_tokens=100, digest="")).play()
    assert played.ending is Ending.FAILED
    assert isinstance(played.error, ConfigurationError)
    assert played.recorder.total_requests.completed == 0


def test_a_fault_of_the_program_is_raised() -> None:
    """Whatever is not ours must not look like a failed disk."""

    def broken() -> Iterator[Request]:
        yield request(3.0, 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Stage(OpenLoop(requests=broken, block_tokens=100, digest="")).play()


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
    """Answers of 3 s to requests one second apart: all are in flight at once, each TTFT is its own."""
    stage = Stage(open_loop(*(request(2.0 + second, *range(100 * second, 100 * second + 30)) for second in range(5))))
    played = stage.play()
    ttft = played.recorder.latency["ttft"]
    assert (ttft.count, ttft.min_ns, ttft.max_ns) == (5, 3 * NS, 3 * NS)
    assert max(sample.requests_in_flight for sample in stage.shown) == 3


def test_a_stalled_client_cannot_hide_latency() -> None:
    """A loop that is held up from 4 s to 7 s sends the requests of 4.5 s and 5.5 s late; their TTFT says so."""
    stage = Stage(open_loop(request(4.5, 1), request(5.5, 2), request(8.0, 3)))

    def stall() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.jump(3 * NS)

    played = stage.play(stall, at_s=[4.0])
    ttft = played.recorder.latency["ttft"]
    assert (ttft.count, ttft.sum_ns, ttft.max_ns) == (3, (2600 + 1600 + 100) * MS, 2600 * MS)
    assert played.loop_lag.max_ns is not None
    assert 3 * NS - LAG_PROBE_NS <= played.loop_lag.max_ns <= 3 * NS


def test_users_of_a_closed_loop_wait_think_and_ask_again() -> None:
    """1 s of thought, 100 ms of prefill, 10 x 10 ms of decode: a turn every 1.2 s, TTFT from the end of thinking."""

    def user(first: int) -> Iterator[Request]:
        return (request(None, first + number, think_s=1.0, output_tokens=11) for number in count())

    stage = Stage(closed_loop(partial(user, 0), partial(user, 1000)), warmup_s=0.0, duration_s=12.1)
    played = stage.play()
    assert played.recorder.requests.completed == 2 * 10
    assert played.recorder.latency["ttft"].max_ns == 100 * MS
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
