"""The shape of a kind of session, and the targets that its requests are held to."""

from dataclasses import dataclass

from mlpstorage.kvcache.synthetic.documents import Retrieval
from mlpstorage.kvcache.synthetic.draws import Distribution, Lognormal

TARGET_SEED = 42
"""Seed of the users that targets are of."""

TARGET_USERS = 20
"""Number of the users that targets are of."""

Range = tuple[float, float]
"""The least and the most that a number may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the requests of a profile must look like, in a cache without limit that is empty at the beginning.

    The requests are those of the first sessions of `TARGET_USERS` users of the seed `TARGET_SEED`. Their numbers are
    drawn in a test and compared with the ranges; docs/workloads.md shows both.

    Attributes:
        source: Where the ranges come from.
        sessions: Sessions of each user.
        block_tokens: Tokens of a block.
        turns_mean: Requests of a session.
        prompt_tokens_median: Length of a prompt.
        output_tokens_mean: Length of an answer.
        cached_tokens_median: Tokens of a prompt that are found.
        new_tokens_median: Tokens of a prompt that are not found.
        hit_ratio_tokens: Tokens found, of all tokens of prompts.
        reads_per_write: Bytes found for each byte that is stored: tokens found, over tokens of new full blocks.
    """

    source: str
    sessions: int
    block_tokens: int
    turns_mean: Range
    prompt_tokens_median: Range
    output_tokens_mean: Range
    cached_tokens_median: Range
    new_tokens_median: Range
    hit_ratio_tokens: Range
    reads_per_write: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Shape of a kind of session.

    A session's first prompt is the system prompt, the documents that were retrieved for it, its opening, and a message.
    Each further prompt is the one before, its answer, and a new message.

    Attributes:
        name: What the profile is called in options and files; part of the ids of what its sessions share.
        description: What it stands for, in a line.
        system_prompt_tokens: System prompt and tools, the same for all users, ranks and seeds.
        documents: Shared documents that follow the system prompt; None for none.
        opening_tokens: Private text that a session brings along before its first message; None for none.
        message_tokens: What a turn adds to the context: a user's message, or the result of a tool.
        answer_tokens: Length of an answer.
        mean_turns: Mean requests of a session; the number is geometric, so after each turn the session goes on with
            probability `1 - 1 / mean_turns`, unless its context is full.
        think_s: Pause between an answer and the session's next request, seconds.
        between_s: Pause before a session's first request, seconds; None to draw it like the others.
        max_context_tokens: Prompt and answer together never exceed it; the session ends before.
        targets: What its requests must look like.
    """

    name: str
    description: str
    system_prompt_tokens: int
    documents: Retrieval | None = None
    opening_tokens: Lognormal | None = None
    message_tokens: Lognormal
    answer_tokens: Lognormal
    mean_turns: float
    think_s: Distribution
    between_s: Distribution | None = None
    max_context_tokens: int
    targets: Targets

    def __post_init__(self) -> None:
        """Refuse a profile whose sessions might not have room for a single turn.

        Raises:
            ValueError: The longest first turn exceeds the context, or sessions end before they begin.
        """
        longest = self.system_prompt_tokens + self.message_tokens.most + self.answer_tokens.most
        if self.documents is not None:
            longest += self.documents.per_request * self.documents.document_tokens.most
        if self.opening_tokens is not None:
            longest += self.opening_tokens.most
        if longest > self.max_context_tokens:
            raise ValueError(f"a first turn of {longest} tokens exceeds max_context_tokens {self.max_context_tokens}")
        if self.mean_turns < 1:
            raise ValueError(f"mean_turns {self.mean_turns} is less than the one request that every session has")
