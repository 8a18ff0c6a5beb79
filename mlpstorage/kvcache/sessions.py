"""Synthetic users: each holds one chat after the other, with a context that grows turn by turn.

All random numbers come from `random.Random.random`, the one method whose sequence Python promises to keep for a seed;
the distributions are made of it here, so that a seed means the same workload on every Python version.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

from mlpstorage.kvcache.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatProfile:
    """Shape of a chat session. The defaults describe people who talk to an assistant.

    Lengths are lognormal, as measured prompt and answer lengths are to a good approximation: many short ones, a few
    long ones. A mean is that of the distribution before its cap, which takes less than 2 % off the defaults.

    Attributes:
        system_prompt_tokens: System prompt, the same for all users, ranks and seeds. Chosen: published ones of chat
            services are some hundred to a few thousand tokens long.
        message_mean_tokens: Mean length of a user's message. ShareGPT, as measured in the PagedAttention paper (Kwon et
            al., SOSP 2023, figure 11): prompts of about 160 tokens. LMSYS-Chat-1M (Zheng et al., ICLR 2024) has
            shorter ones, about 70.
        message_sigma: Standard deviation of the logarithm of a message's length. Chosen: the median is 78 tokens, and
            one message in twenty, a pasted text, is longer than 560.
        message_max_tokens: Longest message; longer draws are cut. Chosen.
        answer_mean_tokens: Mean length of an answer. ShareGPT, same source: about 340 tokens; LMSYS-Chat-1M about 215.
        answer_sigma: Standard deviation of the logarithm of an answer's length. Chosen: answers vary less than
            messages; the median is 227 tokens.
        answer_max_tokens: Longest answer; longer draws are cut. Chosen: a usual `max_tokens` of chat services.
        mean_turns: Mean requests of a session; the number is geometric, so after each turn the session goes on with
            probability `1 - 1 / mean_turns`. CachedAttention (Gao et al., USENIX ATC 2024) finds 73 % of ShareGPT's
            conversations to have more than one turn, and a geometric distribution with that share has mean 1 / 0.27.
        think_mean_s: Mean pause of a user between an answer and the next request; exponential. Chosen: enough to skim
            an answer and type a line, short enough that a run of a minute sees several turns of each user.
        max_context_tokens: Prompt and answer together never exceed it; the session ends before. Chosen: the context of
            Mistral 7B v0.2 and Qwen3 as published; few sessions get there.
    """

    system_prompt_tokens: int = 1024
    message_mean_tokens: float = 160.0
    message_sigma: float = 1.2
    message_max_tokens: int = 4096
    answer_mean_tokens: float = 340.0
    answer_sigma: float = 0.9
    answer_max_tokens: int = 4096
    mean_turns: float = 1 / 0.27
    think_mean_s: float = 10.0
    max_context_tokens: int = 32768

    def __post_init__(self) -> None:
        """Refuse a profile whose sessions might not have room for a single turn.

        Raises:
            ValueError: The longest first turn exceeds the context.
        """
        longest = self.system_prompt_tokens + self.message_max_tokens + self.answer_max_tokens
        if longest > self.max_context_tokens:
            raise ValueError(f"a first turn of {longest} tokens exceeds max_context_tokens {self.max_context_tokens}")


CHAT = ChatProfile()
"""The default profile."""


def user_requests(
    profile: ChatProfile, seed: int, user: int, block_tokens: int, *, multi_turn: bool = True
) -> Iterator[Request]:
    """The endless stream of one user's requests, session after session.

    A prompt is the system prompt, then all earlier messages and answers of the session, then the new message. So the
    blocks of a turn are the first blocks of the next one. The first request comes after a random part of a think time,
    so that users who start together do not ask together.

    Args:
        profile: Shape of the sessions.
        seed: Seed of the rank.
        user: Number of the user within the rank. Each has a random stream of its own, so that the streams do not hang
            on the number of users or on the order in which they are drawn.
        block_tokens: Tokens of a block.
        multi_turn: False ends every session after its first request.
    """
    draw = random.Random(_hash64(f"user {seed} {user}")).random  # noqa: S311 - a workload, no secret
    shared = shared_block_ids(profile.system_prompt_tokens, block_tokens)
    message_tokens = _lognormal(draw, profile.message_mean_tokens, profile.message_sigma, profile.message_max_tokens)
    answer_tokens = _lognormal(draw, profile.answer_mean_tokens, profile.answer_sigma, profile.answer_max_tokens)
    think_s = draw() * _exponential(draw, profile.think_mean_s)
    for session in count():
        ids = list(shared)
        context_tokens = profile.system_prompt_tokens
        for turn in count():
            prompt_tokens = context_tokens + message_tokens()
            output_tokens = answer_tokens()
            context_tokens = prompt_tokens + output_tokens
            if context_tokens > profile.max_context_tokens:
                break
            chain = f"private {block_tokens} {seed} {user} {session} "
            ids += [_hash64(f"{chain}{index}") for index in range(len(ids), prompt_tokens // block_tokens)]
            yield Request(
                arrival_s=None,
                think_s=round(think_s, 6),  # so that the last bits of libm's logarithm leave no trace
                user=user,
                turn=turn,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                block_ids=tuple(ids),
            )
            think_s = _exponential(draw, profile.think_mean_s)
            if not multi_turn or draw() * profile.mean_turns < 1.0:
                break


def shared_block_ids(system_prompt_tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Ids of the blocks that lie wholly inside the system prompt: the same for all users, ranks and seeds."""
    return tuple(_hash64(f"shared {block_tokens} {index}") for index in range(system_prompt_tokens // block_tokens))


def _hash64(name: str) -> int:
    """64 bits that stand for `name`. Among 10^8 names, two collide with a probability of 0.03 %."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _exponential(draw: Callable[[], float], mean: float) -> float:
    return -mean * math.log(1.0 - draw())


def _lognormal(draw: Callable[[], float], mean: float, sigma: float, most: int) -> Callable[[], int]:
    """A source of whole lognormal numbers of the given mean, from 1 to `most`."""
    mu = math.log(mean) - sigma * sigma / 2

    def sample() -> int:
        # Box and Muller's normal variate: two uniform numbers for each, whatever their values.
        normal = math.sqrt(-2.0 * math.log(1.0 - draw())) * math.cos(math.tau * draw())
        return min(max(round(math.exp(mu + sigma * normal)), 1), most)

    return sample
