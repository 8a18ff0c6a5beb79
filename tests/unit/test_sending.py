"""When requests are sent: open loop, users, sessions; on virtual time, every moment worked by hand."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import pytest

from mlpstorage.config import GenerationMode
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.sending import send
from mlpstorage.kvcache.traces import After
from mlpstorage.kvcache.workload import ClosedLoop, OpenLoop, Session, SessionLoop, Workload
from mlpstorage.measure.clock import NS
from mlpstorage.plan.compute import ConstantCompute
from mlpstorage.storage.ops import OpKind
from mlpstorage.storage.payload import VerifyError
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench, now_ns
from mlpstorage.testing.virtual import ModelledIO, VirtualClock, VirtualLoop, run_virtual

BEGIN_S = 10
"""When the workloads begin: at no special moment of the clock."""

PREFILL_S = 0.1
"""Of a request below, of 100 tokens."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request, and when it should have come, came, and was answered: seconds since the workload's begin."""

    name: tuple[int, int]
    intended_s: float
    begun_s: float
    answered_s: float


class WatchedEngine(Engine):
    """An engine that notes when it is asked."""

    def __init__(self, bench: EngineBench) -> None:
        super().__init__(
            bench.config,
            blocks=bench.io,
            arena=bench.arena,
            recorder=bench.recorder,
            clock=VirtualClock(),
            on_failure=bench.failures.append,
        )
        self.sent: list[Sent] = []

    async def serve(self, request: Request, intended_ns: int) -> None:
        """Serve it, and note the times."""
        begun_ns = now_ns()
        await super().serve(request, intended_ns)
        times_s = [since_s(at_ns) for at_ns in (intended_ns, begun_ns, now_ns())]
        self.sent.append(Sent((request.user, request.turn), *times_s))


def since_s(at_ns: int) -> float:
    """Seconds since the begin, to a microsecond."""
    return round(at_ns / NS - BEGIN_S, 6)


def request(turn: int, *block_ids: int, user: int = 0, arrival_s: float | None = None, think_s: float = 0.0) -> Request:
    """A request of 100 tokens or more."""
    return Request(
        arrival_s=arrival_s,
        think_s=think_s,
        user=user,
        session=0,
        turn=turn,
        prompt_tokens=100,
        output_tokens=1,
        block_ids=block_ids,
    )


def session(*after: Sequence[tuple[int, float]], start_s: float = 0.0, user: int = 0) -> Session:
    """A session whose requests wait for those turns and pauses."""
    steps = (
        (request(turn, user=user), tuple(After(turn=number, pause_s=pause_s) for number, pause_s in waits))
        for turn, waits in enumerate(after)
    )
    return Session(start_s=start_s, steps=tuple(steps))


def sessions(*them: Session, users: int | None = None) -> SessionLoop:
    """These sessions."""
    return SessionLoop(sessions=lambda: iter(them), users=users, digest="")


def pacing(mode: GenerationMode = GenerationMode.REALISTIC) -> Pacing:
    """A prompt token takes 1 ms."""
    return Pacing(mode=mode, compute=ConstantCompute(prefill_tokens_per_s=1000.0, decode_tokens_per_s=None))


def played(
    workload: Workload,
    *,
    bench: EngineBench | None = None,
    mode: GenerationMode = GenerationMode.REALISTIC,
    stall_s: tuple[float, float] | None = None,
    for_s: float = 1000.0,
) -> list[Sent]:
    """Send it; what was answered, in that order.

    Args:
        workload: What is sent.
        bench: The engine's surroundings.
        mode: What is waited for.
        stall_s: From when to when the event loop is held up.
        for_s: After how long it is cut off.
    """
    bench = bench or EngineBench(replace(PLAIN, block_tokens=50))
    bench.config = replace(bench.config, pacing=pacing(mode))
    sent: list[Sent] = []

    async def play() -> None:
        engine = bench.engine = WatchedEngine(bench)
        await VirtualClock().sleep_until(BEGIN_S * NS)
        if stall_s is not None:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.call_at(BEGIN_S + stall_s[0], loop.jump, round((stall_s[1] - stall_s[0]) * NS))
        sending = asyncio.create_task(send(workload, engine, bench.config.pacing, VirtualClock(), BEGIN_S * NS))
        await asyncio.wait({sending}, timeout=for_s)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=False) if sending.done() else None
        sent.extend(engine.sent)

    run_virtual(play())
    return sent


def names(sent: Sequence[Sent]) -> list[tuple[int, int]]:
    """User and turn of each."""
    return [one.name for one in sent]


# Sessions


@pytest.mark.parametrize(
    ("mode", "intended_s", "answered_s"),
    [
        (GenerationMode.REALISTIC, [1.0, 3.1, 6.2], [1.1, 3.2, 6.3]),
        (GenerationMode.FAST, [1.0, 1.21, 1.52], [1.01, 1.22, 1.53]),
        (GenerationMode.NONE, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ],
)
def test_a_session_goes_on_a_pause_after_each_answer(
    mode: GenerationMode, intended_s: list[float], answered_s: list[float]
) -> None:
    """100 ms of prefill, pauses of 2 and 3 s: in full, a tenth, nothing. Its start is an arrival, in full."""
    sent = played(sessions(session([], [(0, 2.0)], [(1, 3.0)], start_s=1.0)), mode=mode)
    assert names(sent) == [(0, 0), (0, 1), (0, 2)]
    assert [one.intended_s for one in sent] == intended_s
    assert [one.begun_s for one in sent] == intended_s
    assert [one.answered_s for one in sent] == answered_s


@pytest.mark.parametrize(
    ("pauses_s", "at_s"),
    [
        # The second sub-agent answers last: 1.2 s + 0.5 s.
        ((0.0, 0.5), 1.7),
        # The first answered at 0.2 s, and its pause is longer: 0.2 s + 2 s.
        ((2.0, 0.5), 2.2),
    ],
)
def test_a_parent_waits_for_all_its_sub_agents(pauses_s: tuple[float, float], at_s: float) -> None:
    """0: 0 to 0.1 s. Its sub-agents at once, 0.1 to 0.2 s, and 1 s later, 1.1 to 1.2 s; the parent after both."""
    first_s, second_s = pauses_s
    sent = played(sessions(session([], [(0, 0.0)], [(0, 1.0)], [(1, first_s), (2, second_s)])))
    assert [(one.name[1], one.intended_s) for one in sent] == [(0, 0.0), (1, 0.1), (2, 1.1), (3, at_s)]
    assert [one.answered_s for one in sent] == [0.1, 0.2, 1.2, round(at_s + 0.1, 6)]


def test_sub_agents_that_begin_together_wait_for_the_accelerators_alone() -> None:
    """Three at 0.1 s, answered at 0.2, 0.3 and 0.4 s; the parent goes on after the last."""
    sent = played(sessions(session([], *[[(0, 0.0)]] * 3, [(1, 0.0), (2, 0.0), (3, 0.0)])))
    assert [one.intended_s for one in sent] == [0.0, 0.1, 0.1, 0.1, 0.4]
    assert [one.answered_s for one in sent] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_sessions_begin_at_their_starts_however_long_others_take() -> None:
    """The first thinks for 50 s; the others begin at 1 s and 2 s."""
    sent = played(
        sessions(session([], [(0, 50.0)]), session([], start_s=1.0, user=1), session([], start_s=2.0, user=2))
    )
    assert [(one.name, one.intended_s) for one in sent] == [
        ((0, 0), 0.0),
        ((1, 0), 1.0),
        ((2, 0), 2.0),
        ((0, 1), 50.1),
    ]


def test_users_take_sessions_in_turn_whatever_their_starts() -> None:
    """Two users, four sessions. Prefills take 0.1 s.

    The first is over at 2.2 s (0 to 0.1, a pause of 2 s, 2.1 to 2.2), the second, which waited for a prefill, at 5.3 s.
    Who was first takes the third at 2.2 s and, at 2.3 s, the fourth.
    """
    loop = sessions(
        session([], [(0, 2.0)], user=0),
        session([], [(0, 5.0)], start_s=7.0, user=1),
        session([], start_s=100.0, user=2),
        session([], start_s=200.0, user=3),
        users=2,
    )
    sent = played(loop)
    assert [(one.name, one.intended_s, one.answered_s) for one in sent] == [
        ((0, 0), 0.0, 0.1),
        ((1, 0), 0.0, 0.2),
        ((0, 1), 2.1, 2.2),
        ((2, 0), 2.2, 2.3),
        ((3, 0), 2.3, 2.4),
        ((1, 1), 5.2, 5.3),
    ]


def test_more_users_than_sessions_leave_some_with_nothing() -> None:
    """Five users, two sessions: each is played once."""
    sent = played(sessions(session([]), session([], user=1), users=5))
    assert [(one.name, one.intended_s) for one in sent] == [((0, 0), 0.0), ((1, 0), 0.0)]


def test_a_request_that_fails_does_not_stop_its_session() -> None:
    """The second reads wrong data: the third comes a pause after its failure, and finds that block gone."""
    wrong = VerifyError("object", 0, (1, 0), (2, 0))
    io = ModelledIO(latency_ns={OpKind.READ: 300 * MS}, failures={(OpKind.READ, 1): wrong})
    bench = EngineBench(replace(PLAIN, block_tokens=50), io)
    steps = (
        (request(0, 1), ()),
        (request(1, 1, 2), (After(turn=0, pause_s=1.0),)),
        (request(2, 1, 2), (After(turn=1, pause_s=1.0),)),
    )
    sent = played(sessions(Session(start_s=0.0, steps=steps)), bench=bench)
    # 0 to 0.1 s; 1.1 s and 0.3 s of reading; 1 s later 0.1 s of computing.
    assert [(one.intended_s, one.answered_s) for one in sent] == [(0.0, 0.1), (1.1, 1.4), (2.4, 2.5)]
    assert (bench.recorder.requests.failed, bench.recorder.requests.completed) == (1, 2)
    assert bench.io.stored == {1, 2}


def test_a_session_waits_for_its_writes_to_be_taken() -> None:
    """As a user does: a full write queue holds the next turn back, too. Two blocks through a queue of one, 2 s each."""
    config = replace(PLAIN, block_tokens=50, write_queue_blocks=1)
    bench = EngineBench(config, ModelledIO(servers=1, latency_ns={OpKind.WRITE: 2 * NS}))
    steps = ((request(0, 1, 2), ()), (request(1), (After(turn=0, pause_s=1.0),)))
    sent = played(sessions(Session(start_s=0.0, steps=steps)), bench=bench)
    # Computed at 0.1 s; the second block enters the queue when the first is written, at 2.1 s.
    assert [one.intended_s for one in sent] == [0.0, 3.1]


@pytest.mark.parametrize("users", [None, 2])
def test_a_trace_that_breaks_while_it_is_played_is_told(users: int | None) -> None:
    """What reading raises comes out, and what is under way is cancelled."""

    def broken() -> Iterator[Session]:
        yield session([], [(0, 100.0)])
        raise ConfigurationError("trace.jsonl:2: broken")

    bench = EngineBench()

    async def play() -> None:
        await send(
            SessionLoop(sessions=broken, users=users, digest=""), bench.engine, PLAIN.pacing, VirtualClock(), now_ns()
        )

    with pytest.raises(ExceptionGroup) as raised:
        run_virtual(play())
    assert raised.group_contains(ConfigurationError, match="line|jsonl:2: broken")
    assert bench.engine.in_flight == 0


def test_it_returns_when_all_is_written() -> None:
    """One answer at 0.1 s, whose write ends 7 s later."""
    bench = EngineBench(replace(PLAIN, block_tokens=50), ModelledIO(latency_ns={OpKind.WRITE: 7 * NS}))

    async def play() -> None:
        one = SessionLoop(
            sessions=lambda: iter([Session(start_s=0.0, steps=((request(0, 1), ()),))]), users=None, digest=""
        )
        await send(one, bench.engine, pacing(), VirtualClock(), 0)
        assert now_ns() == 7 * NS

    run_virtual(play())
    assert bench.io.stored == {1}


# A client that is held up


def user(thinks_s: float) -> Iterator[Request]:
    """Thinks, asks, and so on."""
    return (request(turn, think_s=thinks_s) for turn in count())


STALLED: dict[str, Callable[[], Workload]] = {
    "open": lambda: OpenLoop(requests=lambda: iter([request(0, arrival_s=2.0)]), digest=""),
    "users": lambda: ClosedLoop(users=(partial(user, 2.0),), digest=""),
    "sessions": lambda: sessions(session([], start_s=2.0)),
    "pauses": lambda: sessions(session([], [(0, 1.9)])),
    "sessions in turn": lambda: sessions(session([], [(0, 1.9)]), users=1),
}


@pytest.mark.parametrize("name", STALLED)
def test_a_stalled_client_shows_in_ttft_and_in_its_own_delay(name: str) -> None:
    """Held up from 1 s to 4.5 s: what should have come at 2 s is 2.5 s late, and its TTFT 2.6 s.

    The other requests of the first 4.7 s, if any, are in time.
    """
    bench = EngineBench(replace(PLAIN, block_tokens=50))
    sent = played(STALLED[name](), bench=bench, stall_s=(1.0, 4.5), for_s=4.7)
    late = [(one.intended_s, one.begun_s, one.answered_s) for one in sent if one.intended_s != one.begun_s]
    assert late == [(2.0, 4.5, 4.6)]
    latency = bench.recorder.latency
    assert (latency["client_late"].max_ns, latency["client_late"].sum_ns) == (2500 * MS, 2500 * MS)
    assert latency["ttft"].max_ns == 2600 * MS
    assert bench.recorder.first_tokens.client_late_ns == 2500 * MS
    assert latency["ttft"].sum_ns == 2500 * MS + latency["ttft"].count * 100 * MS


@pytest.mark.parametrize("name", ["users", "pauses"])
def test_without_a_stall_the_client_is_never_late(name: str) -> None:
    """The same workloads."""
    bench = EngineBench(replace(PLAIN, block_tokens=50))
    sent = played(STALLED[name](), bench=bench, for_s=4.7)
    assert len(sent) == 2
    assert (bench.recorder.latency["client_late"].count, bench.recorder.latency["client_late"].max_ns) == (2, 0)
