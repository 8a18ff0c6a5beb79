"""Prefixes for traces that have none: which request goes on with which session is made up, the lengths are the trace's.

What is made up follows a chat: how often a session goes on, how long a new message is, how long the shared system
prompt is. Hit ratios of such a trace are therefore those of the model, not of the service that was traced.
"""

from bisect import bisect, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from mlpstorage.kvcache.synthetic.block_ids import Chain, shared_block_ids
from mlpstorage.kvcache.synthetic.draws import source
from mlpstorage.kvcache.synthetic.profile import Profile
from mlpstorage.kvcache.synthetic.profiles import CHAT

MAX_OPEN_SESSIONS = 10_000
"""Sessions that can go on; beyond it the one that was idle for longest ends. It bounds the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenSession:
    """A session that may go on.

    Attributes:
        number: Its number.
        turns: Requests that it had.
        context_tokens: Its last prompt and the answer.
        shared_blocks: Blocks that lie wholly inside the part of the system prompt that it began with.
    """

    number: int
    turns: int
    context_tokens: int
    shared_blocks: int


@dataclass(frozen=True, slots=True)
class _OpenSessions:
    """Open sessions by the length of their contexts, and by the time of their last request."""

    by_context: list[tuple[int, int]] = field(default_factory=list)
    by_time: dict[int, _OpenSession] = field(default_factory=dict)

    def add(self, session: _OpenSession) -> None:
        """Keep a session that just had a request, in the place of the one that was idle for longest if it must be."""
        if len(self.by_time) == MAX_OPEN_SESSIONS:
            self._remove(next(iter(self.by_time.values())))
        self.by_time[session.number] = session
        insort(self.by_context, (session.context_tokens, session.number))

    def take(self, least_tokens: int, most_tokens: int) -> _OpenSession | None:
        """Remove and return the session with the longest context between these limits, the newest one of several."""
        place = bisect(self.by_context, most_tokens, key=lambda entry: entry[0]) - 1
        if place < 0 or self.by_context[place][0] < least_tokens:
            return None
        session = self.by_time[self.by_context[place][1]]
        self._remove(session)
        return session

    def _remove(self, session: _OpenSession) -> None:
        del self.by_time[session.number]
        del self.by_context[bisect(self.by_context, (session.context_tokens, session.number)) - 1]


def with_prefixes(
    lengths: Iterable[tuple[int, int]], seed: int, block_tokens: int, profile: Profile = CHAT
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Give prefix structure to the requests of a trace, as a stream.

    For each request a message length is drawn from the profile. With the profile's probability that a session goes on,
    the request continues one of the open sessions: that whose context comes closest to the input less the message, from
    below, unless it leaves more than the profile's longest message to be new. All else begin a session: the shared
    system prompt, as much of it as fits besides the message, then private text. A context is always strictly shorter
    than the input that continues it.

    Continuing the longest context that fits, without a message, would leave next to nothing new in most prompts, and
    hit ratios beyond those of any chat.

    A request costs some bisections of the open sessions and a digest for each eight of its blocks.

    Args:
        lengths: For each request the tokens of its input, 1 or more, and of its output.
        seed: Seed of the choices, and of the ids of private blocks. Ranks that share a trace need the same one.
        block_tokens: Tokens of a block.
        profile: What the sessions are like: its `mean_turns`, `message_tokens` and `system_prompt_tokens` are used.

    Yields:
        For each request the number of its session, its turn within it, and the ids of its full blocks.
    """
    draw = source(f"prefixes {seed}")
    system_prompt = shared_block_ids(profile.name, profile.system_prompt_tokens, block_tokens)
    open_sessions = _OpenSessions()
    sessions = 0
    for input_tokens, output_tokens in lengths:
        message_tokens = min(profile.message_tokens.tokens(draw), input_tokens)
        goes_on = draw() * profile.mean_turns >= 1.0
        session = None
        if goes_on:
            least_tokens = input_tokens - profile.message_tokens.most
            session = open_sessions.take(least_tokens, input_tokens - message_tokens)
        if session is None:
            shared_tokens = min(profile.system_prompt_tokens, input_tokens - message_tokens)
            session = _OpenSession(
                number=sessions, turns=0, context_tokens=0, shared_blocks=shared_tokens // block_tokens
            )
            sessions += 1
        chain = Chain(
            islice(system_prompt, session.shared_blocks),
            f"trace {seed} {session.number} of {profile.name} {block_tokens}",
        )
        yield session.number, session.turns, chain.first(input_tokens // block_tokens)
        open_sessions.add(
            _OpenSession(
                number=session.number,
                turns=session.turns + 1,
                context_tokens=input_tokens + output_tokens,
                shared_blocks=session.shared_blocks,
            )
        )
