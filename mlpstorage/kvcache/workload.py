"""What a rank plays: streams of requests, and the digest by which two runs are known to have played the same."""

import hashlib
import heapq
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice, tee
from operator import itemgetter

from mlpstorage.config import Arrivals, Placement
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.arrivals import at_rate, poisson_s, spread
from mlpstorage.kvcache.placement import rank_of_prefix
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.synthetic import Mix, user_requests, with_prefixes
from mlpstorage.kvcache.traces import After, Trace, TraceRequest, check_block_tokens, full_block_ids, regroup

_DIGESTED_REQUESTS = 4
"""Requests of each endless user stream that enter the digest."""

_HEAD = struct.Struct("<ddqqqqqq")
_AFTER = struct.Struct("<qd")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests that arrive at their own times, however long the answers take.

    Attributes:
        requests: Opens the stream anew, in order of arrival. Reading it may raise what reading the trace raises.
        digest: SHA-256 of the whole stream, or of the first requests of one that has no end, as hex digits.
    """

    requests: Callable[[], Iterator[Request]]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """Users who wait for an answer, think, and ask again.

    Attributes:
        users: For each user, what opens the endless stream of their requests anew.
        digest: SHA-256 of the first requests of every user, as hex digits.
    """

    users: tuple[Callable[[], Iterator[Request]], ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Requests that wait for each other's answers.

    Attributes:
        start_s: When it begins, seconds since the workload's start.
        steps: Its requests, in order of their turns, and what each waits for; the first of all for nothing.
    """

    start_s: float
    steps: tuple[tuple[Request, tuple[After, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLoop:
    """Sessions, each of which goes on a pause after its last answer.

    Attributes:
        sessions: Opens the stream of sessions anew, in the trace's order. Reading it may raise what reading the trace
            raises.
        users: How many users play one session after the other, whatever their starts; None where each session begins
            at its own start.
        digest: SHA-256 of all sessions, as hex digits.
    """

    sessions: Callable[[], Iterator[Session]]
    users: int | None
    digest: str


Workload = OpenLoop | ClosedLoop | SessionLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePlay:
    """How a trace is played, by all ranks together.

    Attributes:
        arrivals: When its requests arrive.
        block_tokens: Tokens of a block.
        time_scale: What its times are multiplied by: 0.1 plays it ten times as fast. Times count from the trace's
            first request, whichever rank plays it.
        spread_s: Each request is delayed by a random time below this, in the trace's seconds.
        request_rate_per_s: Requests a second at random times, in the place of the trace's times; None for these.
        max_requests: The first so many requests are played; None for all.
        seed: Of what is random: one for all ranks.
        users: Users of each rank, for a closed loop.
        placement: Which rank plays a request; a session that waits for its answers is played whole by one rank, which
            for `PREFIX` is that of its first request.
    """

    arrivals: Arrivals
    block_tokens: int
    time_scale: float = 1.0
    spread_s: float = 0.0
    request_rate_per_s: float | None = None
    max_requests: int | None = None
    seed: int = 0
    users: int = 1
    placement: Placement = Placement.SESSION


def trace_workload(trace: Trace, play: TracePlay, *, rank: int, ranks: int) -> OpenLoop | SessionLoop:
    """The share of a trace that `rank` plays, by the placement.

    Reads the trace once, for the digest, so that a broken line shows before anything runs.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: The trace is broken, holds no request for this rank, tells no pauses that its sessions
            could be played by, or has blocks that do not fit.
    """
    if trace.block_tokens is not None:
        check_block_tokens(trace.block_tokens, play.block_tokens)
    if play.arrivals is Arrivals.SESSION and not trace.has_think_times:
        raise ConfigurationError(
            f"--arrivals session: format {trace.format} tells no pauses between an answer and the next request; "
            "use --arrivals open or closed"
        )
    loop = _open_loop(trace, play, rank, ranks) if play.arrivals is Arrivals.OPEN else _loop(trace, play, rank, ranks)
    first: object = next(loop.requests() if isinstance(loop, OpenLoop) else loop.sessions(), None)
    if first is None:
        raise ConfigurationError(
            f"{trace.path}: the trace has nothing left for rank {rank} of {ranks} (--placement {play.placement}); "
            "lower --num-processes, or raise --max-requests"
        )
    return loop


def user_workload(mix: Mix, num_users: int, seed: int, block_tokens: int, *, multi_turn: bool = True) -> ClosedLoop:
    """Synthetic users of one rank, in a closed loop.

    Args:
        mix: What they do.
        num_users: Number of users.
        seed: Seed of this rank; another rank must have another one, or its users are the same people.
        block_tokens: Tokens of a block.
        multi_turn: False ends every session after its first request.
    """
    users = _users(mix, num_users, seed, block_tokens, multi_turn=multi_turn)
    firsts = chain.from_iterable(islice(user(), _DIGESTED_REQUESTS) for user in users)
    return ClosedLoop(users=users, digest=_digest(f"closed loop, {block_tokens} tokens a block, {mix}", firsts))


def user_arrivals(
    mix: Mix, num_users: int, seed: int, block_tokens: int, *, rate_per_s: float, multi_turn: bool = True
) -> OpenLoop:
    """The same users in an open loop: they ask in turn, at random times, whether they have an answer or not.

    Args:
        mix: What they do.
        num_users: Number of users.
        seed: Seed of this rank.
        block_tokens: Tokens of a block.
        rate_per_s: Requests a second of this rank.
        multi_turn: False ends every session after its first request.
    """
    users = _users(mix, num_users, seed, block_tokens, multi_turn=multi_turn)

    def requests() -> Iterator[Request]:
        for stream, at_s in zip(cycle([user() for user in users]), poisson_s(rate_per_s, seed), strict=False):
            yield _arriving(next(stream), at_s)

    firsts = islice(requests(), _DIGESTED_REQUESTS * num_users)
    return OpenLoop(requests=requests, digest=_digest(f"open loop, {block_tokens} tokens a block, {mix}", firsts))


def dealt_arrivals(of_ranks: Sequence[OpenLoop], rank: int) -> OpenLoop:
    """What one rank serves of the synthetic users of all ranks where their requests are dealt, in order of arrival.

    Args:
        of_ranks: The users of each rank, as `user_arrivals` gives them.
        rank: The rank.
    """
    ranks = len(of_ranks)

    def requests() -> Iterator[Request]:
        streams = [((one.arrival_s, own, one) for one in loop.requests()) for own, loop in enumerate(of_ranks)]
        merged = heapq.merge(*streams, key=itemgetter(0, 1))
        return (one for _, _, one in islice(merged, rank, None, ranks))

    digests = "".join(f"{loop.digest}\n" for loop in of_ranks)
    return OpenLoop(requests=requests, digest=_digest(f"{digests}every {ranks} requests from {rank} on", ()))


def _users(
    mix: Mix, num_users: int, seed: int, block_tokens: int, *, multi_turn: bool
) -> tuple[Callable[[], Iterator[Request]], ...]:
    return tuple(
        partial(user_requests, mix, seed, user, block_tokens, multi_turn=multi_turn) for user in range(num_users)
    )


def _arriving(request: Request, at_s: float) -> Request:
    return Request(
        arrival_s=at_s,
        think_s=0.0,
        user=request.user,
        session=request.session,
        turn=request.turn,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        block_ids=request.block_ids,
    )


def _open_loop(trace: Trace, play: TracePlay, rank: int, ranks: int) -> OpenLoop:
    def requests() -> Iterator[Request]:
        timed = _with_ids(trace, play, trace.requests(play.max_requests))
        start_s: float | None = None
        if play.request_rate_per_s is not None:
            timed, start_s = at_rate(timed, play.request_rate_per_s, play.seed), 0.0
        elif play.spread_s:
            timed = spread(timed, play.spread_s, play.seed)
        for number, one in enumerate(timed):
            if start_s is None:
                start_s = one.timestamp_s
            if _rank_of(trace, play, one, number, ranks) == rank:
                yield _request(trace, play, one, (one.timestamp_s - start_s) * play.time_scale)

    header = f"open loop, {play.block_tokens} tokens a block{_placed(play.placement, ranks)}"
    return OpenLoop(requests=requests, digest=_digest(header, requests()))


def _rank_of(trace: Trace, play: TracePlay, one: TraceRequest, number: int, ranks: int) -> int:
    """The rank that plays a request of an open loop, which has that number among all of them."""
    match play.placement:
        case Placement.SESSION:
            return one.session % ranks
        case Placement.ROUND_ROBIN:
            return number % ranks
    rank = rank_of_prefix(_block_ids(trace, play, one), play.block_tokens, ranks)
    return one.session % ranks if rank is None else rank


def _placed(placement: Placement, ranks: int) -> str:
    """What a digest's header says of the placement: with one rank, or by sessions, nothing."""
    return "" if ranks == 1 or placement is Placement.SESSION else f", placed by {placement}"


def _loop(trace: Trace, play: TracePlay, rank: int, ranks: int) -> SessionLoop:
    """Sessions with pauses; where the trace tells none, every request is a session of its own."""
    most = None if play.max_requests is None else Counter(one.session for one in trace.requests(play.max_requests))

    def sessions() -> Iterator[Session]:
        whole = trace.sessions() if trace.has_think_times else _alone(trace, play)
        for number, steps in enumerate(whole):
            kept = steps if most is None else steps[: most[steps[0].session]]
            if not kept or _rank_of_session(trace, play, kept[0], number, ranks) != rank:
                continue
            yield Session(
                start_s=steps[0].timestamp_s * play.time_scale,
                steps=tuple(
                    (
                        _request(trace, play, step, None),
                        tuple(After(turn=one.turn, pause_s=one.pause_s * play.time_scale) for one in step.after),
                    )
                    for step in kept
                ),
            )

    header = f"sessions, {play.block_tokens} tokens a block{_placed(play.placement, ranks)}"
    users = play.users if play.arrivals is Arrivals.CLOSED else None
    return SessionLoop(sessions=sessions, users=users, digest=_sessions_digest(header, sessions()))


def _rank_of_session(trace: Trace, play: TracePlay, first: TraceRequest, number: int, ranks: int) -> int:
    """The rank that plays a whole session, which has that number among all of them."""
    rank = None
    if play.placement is Placement.PREFIX:
        rank = rank_of_prefix(_block_ids(trace, play, first), play.block_tokens, ranks)
    return number % ranks if rank is None else rank


def _alone(trace: Trace, play: TracePlay) -> Iterator[tuple[TraceRequest, ...]]:
    return ((one,) for one in _with_ids(trace, play, trace.requests(play.max_requests)))


def _with_ids(trace: Trace, play: TracePlay, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
    """The requests; those of a trace without block ids with those of made-up sessions."""
    if trace.block_tokens is not None:
        return requests
    kept, measured = tee(requests)
    lengths = ((one.input_tokens, one.output_tokens) for one in measured)
    made = with_prefixes(lengths, play.seed, play.block_tokens)
    return (
        TraceRequest(
            place=one.place,
            timestamp_s=one.timestamp_s,
            input_tokens=one.input_tokens,
            output_tokens=one.output_tokens,
            block_ids=block_ids,
            session=session,
            turn=turn,
            after=(),
        )
        for one, (session, turn, block_ids) in zip(kept, made, strict=True)
    )


def _request(trace: Trace, play: TracePlay, one: TraceRequest, arrival_s: float | None) -> Request:
    return Request(
        arrival_s=arrival_s,
        think_s=0.0,
        user=one.session,
        session=0,
        turn=one.turn,
        prompt_tokens=one.input_tokens,
        output_tokens=one.output_tokens,
        block_ids=_block_ids(trace, play, one),
    )


def _block_ids(trace: Trace, play: TracePlay, one: TraceRequest) -> tuple[int, ...]:
    """Ids of a prompt's full blocks, of the size that is played."""
    assert one.block_ids is not None, "made up where the trace has none"
    if trace.block_tokens is None:
        return one.block_ids
    return regroup(full_block_ids(one, trace), trace.block_tokens, play.block_tokens)


def _digest(header: str, requests: Iterable[Request]) -> str:
    """SHA-256 over the header and every field of the requests, in a fixed binary form (little-endian)."""
    digest = hashlib.sha256(header.encode())
    for request in requests:
        digest.update(_packed(request))
    return digest.hexdigest()


def _sessions_digest(header: str, sessions: Iterable[Session]) -> str:
    """The same over sessions: the start of each, and of each request what it waits for."""
    digest = hashlib.sha256(header.encode())
    for session in sessions:
        digest.update(_AFTER.pack(len(session.steps), session.start_s))
        for request, after in session.steps:
            digest.update(_packed(request))
            digest.update(b"".join(_AFTER.pack(one.turn, one.pause_s) for one in after))
    return digest.hexdigest()


def _packed(request: Request) -> bytes:
    ids = request.block_ids
    head = _HEAD.pack(
        -1.0 if request.arrival_s is None else request.arrival_s,
        request.think_s,
        request.user,
        request.session,
        request.turn,
        request.prompt_tokens,
        request.output_tokens,
        len(ids),
    )
    return head + struct.pack(f"<{len(ids)}Q", *ids)
