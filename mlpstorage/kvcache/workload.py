"""What a rank plays: streams of requests, and the digest by which two runs are known to have played the same."""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.synthetic import Mix, user_requests
from mlpstorage.kvcache.traces import Trace, check_block_tokens, full_block_ids, open_trace, regroup

_DIGESTED_REQUESTS = 4
"""Requests of each endless user stream that enter the digest."""

_HEAD = struct.Struct("<ddqqqqqq")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests that arrive at their own times, however long the answers take.

    Attributes:
        requests: Opens the stream anew, in order of arrival. Reading it may raise what reading the trace raises.
        block_tokens: Tokens of a block.
        digest: SHA-256 of the whole stream, as hex digits.
    """

    requests: Callable[[], Iterator[Request]]
    block_tokens: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """Users who wait for an answer, think, and ask again.

    Attributes:
        users: For each user, what opens the endless stream of their requests anew.
        block_tokens: Tokens of a block.
        digest: SHA-256 of the first requests of every user, as hex digits.
    """

    users: tuple[Callable[[], Iterator[Request]], ...]
    block_tokens: int
    digest: str


Workload = OpenLoop | ClosedLoop


def trace_workload(
    path: Path, block_tokens: int, *, time_scale: float, max_requests: int | None, rank: int, ranks: int
) -> OpenLoop:
    """The share of a trace that `rank` plays: every `ranks`-th request, beginning with its own number.

    Reads the trace once, for the digest, so that a broken line shows before anything runs.

    Args:
        path: The trace.
        block_tokens: Tokens of a block, as asked for; a trace with larger blocks keeps its own.
        time_scale: What the trace's times are multiplied by: 0.1 plays it ten times as fast. Times count from the
            trace's first record, whichever rank plays it.
        max_requests: Play only so many requests of the trace, all ranks together; None for all.
        rank: Number of this rank.
        ranks: Number of all ranks.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: The trace is broken or holds no request for this rank, or `block_tokens` does not fit it.
    """
    trace = open_trace(path)
    played_tokens = played_block_tokens(trace, block_tokens)
    requests = partial(
        _trace_requests,
        trace,
        played_tokens,
        time_scale=time_scale,
        max_requests=max_requests,
        rank=rank,
        ranks=ranks,
    )
    digest = _digest(f"open loop, {played_tokens} tokens a block", requests())
    if next(requests(), None) is None:
        raise ConfigurationError(
            f"{path}: the trace has no request left for rank {rank} of {ranks}; "
            "lower --num-processes, or raise --max-requests"
        )
    return OpenLoop(requests=requests, block_tokens=played_tokens, digest=digest)


def played_block_tokens(trace: Trace, block_tokens: int) -> int:
    """Tokens of a block as the trace is played: smaller blocks are grouped, equal and larger ones are kept.

    Raises:
        ConfigurationError: The trace has no blocks, or they are smaller and `block_tokens` is not a multiple of them.
    """
    if trace.block_tokens is None:
        raise ConfigurationError(
            f"{trace.path}: the {trace.format} format has no block ids; this version cannot play it"
        )
    played_tokens = max(trace.block_tokens, block_tokens)
    check_block_tokens(trace.block_tokens, played_tokens)
    return played_tokens


def session_workload(mix: Mix, num_users: int, seed: int, block_tokens: int, *, multi_turn: bool = True) -> ClosedLoop:
    """Synthetic users of one rank.

    Args:
        mix: Which kinds of sessions they hold.
        num_users: Number of users.
        seed: Seed of this rank; another rank must have another one, or its users are the same people.
        block_tokens: Tokens of a block.
        multi_turn: False ends every session after its first request.
    """
    users = tuple(
        partial(user_requests, mix, seed, user, block_tokens, multi_turn=multi_turn) for user in range(num_users)
    )
    firsts = chain.from_iterable(islice(user(), _DIGESTED_REQUESTS) for user in users)
    digest = _digest(f"closed loop, {block_tokens} tokens a block, {mix}", firsts)
    return ClosedLoop(users=users, block_tokens=block_tokens, digest=digest)


def _trace_requests(
    trace: Trace, block_tokens: int, *, time_scale: float, max_requests: int | None, rank: int, ranks: int
) -> Iterator[Request]:
    assert trace.block_tokens is not None, "a trace without blocks was refused"
    start_s: float | None = None
    for number, record in enumerate(trace.requests(max_requests)):
        if start_s is None:
            start_s = record.timestamp_s
        if number % ranks != rank:
            continue
        full = full_block_ids(record, trace)
        yield Request(
            arrival_s=(record.timestamp_s - start_s) * time_scale,
            think_s=0.0,
            user=number,
            session=0,
            turn=0,
            prompt_tokens=record.input_tokens,
            output_tokens=record.output_tokens,
            block_ids=regroup(full, trace.block_tokens, block_tokens),
        )


def _digest(header: str, requests: Iterable[Request]) -> str:
    """SHA-256 over the header and every field of the requests, in a fixed binary form (little-endian)."""
    digest = hashlib.sha256(header.encode())
    for request in requests:
        ids = request.block_ids
        digest.update(
            _HEAD.pack(
                -1.0 if request.arrival_s is None else request.arrival_s,
                request.think_s,
                request.user,
                request.session,
                request.turn,
                request.prompt_tokens,
                request.output_tokens,
                len(ids),
            )
        )
        digest.update(struct.pack(f"<{len(ids)}Q", *ids))
    return digest.hexdigest()
