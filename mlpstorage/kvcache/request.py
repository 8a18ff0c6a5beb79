"""The request: what every workload sends to the engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and the answer it gets, described by lengths and block ids; there is no text.

    Attributes:
        arrival_s: Intended arrival, seconds since the workload's start; None in a closed loop.
        think_s: Closed loop: pause between the user's last answer and this request, in real seconds that no
            generation mode has shortened yet; 0.0 in an open loop.
        user: Number of the user within the rank; in a trace without users, number of the request within the trace.
        session: Number of the session within the user, from 0; 0 in a trace without sessions.
        turn: Number of the request within its session, from 0.
        prompt_tokens: Length of the whole prompt, earlier turns included.
        output_tokens: Length of the answer.
        block_ids: Ids of the prompt's full blocks, first to last, unsigned 64-bit. An id stands for the block's tokens
            and all before it, so that equal ids mean equal prefixes. A partial last block has none: it is never cached.
    """

    arrival_s: float | None
    think_s: float
    user: int
    session: int
    turn: int
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
