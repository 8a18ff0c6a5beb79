"""What every trace format comes down to: requests with lengths, times, block ids and what they wait for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    """A request begins `pause_s` after the answer to an earlier one of its session.

    Attributes:
        turn: Number of the earlier request within the session.
        pause_s: Seconds between its answer and this request, 0 or more.
    """

    turn: int
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        place: Where it stands, for messages: "line 12", or "request 7" and "request 7.3" of a conversation.
        timestamp_s: When it arrived: seconds from an origin of the trace's own; never decreases along a trace.
        input_tokens: Length of the prompt, 1 or more.
        output_tokens: Length of the answer, 0 or more.
        block_ids: Ids of the prompt's blocks in the trace's own block size, unsigned 64-bit, equal in two requests of
            the trace where all tokens up to the block's end are equal. The last one may stand for a partial block
            (`Trace.has_partial_block`). None where the format has no ids.
        session: Number of its session in the trace, from 0; where the format has no sessions, of the request.
        turn: Number within the session, from 0, in order of time.
        after: What it waits for where sessions are played closed: always earlier turns. Empty for the first request of
            a session, and for all of a trace that tells no think times.
    """

    place: str
    timestamp_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] | None
    session: int
    turn: int
    after: tuple[After, ...]
