"""Which of several ranks serves a prompt, as routers choose that look at its beginning."""

from collections.abc import Sequence
from hashlib import blake2b

PREFIX_TOKENS = 1024
"""How much of a prompt decides, in whole blocks: more than the system prompt that most prompts of a service share (in
the Mooncake conversation trace all share the first 512 tokens), less than most conversations."""


def rank_of_prefix(block_ids: Sequence[int], block_tokens: int, ranks: int) -> int | None:
    """The rank that serves all prompts with this beginning; None where there is no full block.

    The id of one block decides, which stands for all tokens before it, too: that of the block with which the first
    `PREFIX_TOKENS` tokens end (the first block where it is larger), or the last full block of a shorter prompt. So a
    conversation that is shorter at first may change its rank once.

    Args:
        block_ids: Ids of the prompt's full blocks.
        block_tokens: Tokens of a block.
        ranks: How many ranks there are.
    """
    if not block_ids:
        return None
    decisive = block_ids[: max(PREFIX_TOKENS // block_tokens, 1)][-1]
    digest = blake2b(decisive.to_bytes(8, "little"), digest_size=8, person=b"placement").digest()
    return int.from_bytes(digest, "little") % ranks
