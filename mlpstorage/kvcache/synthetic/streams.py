"""Synthetic users: each holds one session after the other, of the kinds that a mix gives, and awaits every answer."""

import math
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, count

from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.synthetic.block_ids import Chain, shared_block_ids
from mlpstorage.kvcache.synthetic.documents import Corpus
from mlpstorage.kvcache.synthetic.draws import Draw, source
from mlpstorage.kvcache.synthetic.profile import Profile
from mlpstorage.kvcache.synthetic.profiles import PROFILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Which kinds of sessions users hold.

    Attributes:
        weights: Share of each profile in the *sessions*, by its name, relative to the sum. Since sessions differ in
            length, shares of requests and of tokens are others.
        rag_num_docs: Documents of the corpus that profiles with retrieval share.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"chat": 1.0})
    rag_num_docs: int = 10

    def __post_init__(self) -> None:
        """Refuse a mix that cannot be drawn from.

        Raises:
            ValueError: A profile is unknown, a weight is not a positive number, or there is no profile or document.
        """
        if not self.weights:
            raise ValueError("a mix needs at least one profile")
        for name, weight in self.weights.items():
            if name not in PROFILES:
                raise ValueError(f"no profile is called {name!r}: give some of {', '.join(PROFILES)}")
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"the weight of {name} must be a number above 0, not {weight}")
        if self.rag_num_docs < 1:
            raise ValueError(f"rag_num_docs must be 1 or more, not {self.rag_num_docs}")

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The profiles, in the order of `PROFILES`, whatever that of the weights."""
        return tuple(profile for name, profile in PROFILES.items() if name in self.weights)

    def __str__(self) -> str:
        """What is played, in one line that is the same for mixes that mean the same."""
        total = math.fsum(self.weights.values())
        shares = [f"{profile.name} {self.weights[profile.name] / total:.6f}" for profile in self.profiles]
        if any(profile.documents is not None for profile in self.profiles):
            shares.append(f"{self.rag_num_docs} documents")
        return ", ".join(shares)


def user_requests(mix: Mix, seed: int, user: int, block_tokens: int, *, multi_turn: bool = True) -> Iterator[Request]:
    """The endless stream of one user's requests, session after session.

    The blocks of a turn are the first blocks of the session's next one. The very first request comes after a random
    part of a pause between turns, so that users who start together do not ask together.

    Args:
        mix: Which kinds of sessions.
        seed: Seed of the rank.
        user: Number of the user within the rank. Each has a random stream of its own, so that the streams do not hang
            on the number of users or on the order in which they are drawn.
        block_tokens: Tokens of a block.
        multi_turn: False ends every session after its first request.
    """
    draw = source(f"user {seed} {user}")
    profiles = mix.profiles
    weights = list(accumulate(mix.weights[profile.name] for profile in profiles))
    for session in count():
        # With one profile no number is spent on the choice.
        place = bisect(weights, draw() * weights[-1], hi=len(weights) - 1) if len(profiles) > 1 else 0
        profile = profiles[place]
        if session:
            think_s = (profile.between_s or profile.think_s).sample(draw)
        else:
            think_s = draw() * profile.think_s.sample(draw)
        shared, context_tokens = _beginning(profile, mix.rag_num_docs, block_tokens, draw)
        chain = Chain(shared, f"session {seed} {user} {session} of {profile.name} {block_tokens}")
        for turn in count():
            prompt_tokens = context_tokens + profile.message_tokens.tokens(draw)
            output_tokens = profile.answer_tokens.tokens(draw)
            context_tokens = prompt_tokens + output_tokens
            if context_tokens > profile.max_context_tokens:
                break
            yield Request(
                arrival_s=None,
                think_s=round(think_s, 6),  # so that the last bits of libm's logarithm leave no trace
                user=user,
                session=session,
                turn=turn,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                block_ids=chain.first(prompt_tokens // block_tokens),
            )
            if not multi_turn or draw() * profile.mean_turns < 1.0:
                break
            think_s = profile.think_s.sample(draw)


def _beginning(profile: Profile, rag_num_docs: int, block_tokens: int, draw: Draw) -> tuple[tuple[int, ...], int]:
    """What a session begins with, before its first message: the ids of its shared blocks, and its length in tokens."""
    tokens = profile.system_prompt_tokens
    if profile.documents is None:
        shared = shared_block_ids(profile.name, tokens, block_tokens)
    else:
        corpus = Corpus(profile.documents, rag_num_docs)
        shared, tokens = corpus.prefix(profile.name, tokens, corpus.retrieve(draw), block_tokens)
    if profile.opening_tokens is not None:
        tokens += profile.opening_tokens.tokens(draw)
    return shared, tokens
