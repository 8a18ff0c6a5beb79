"""Ids of synthetic blocks: hashes of where a block stands, since there is no text to hash.

An id stands for a block's tokens and all before them. Here the name of a chain stands for the tokens, so an id is a
hash of the chain's name and of the block's place. One digest of 64 bytes holds the ids of eight places, so that each
costs an eighth of a digest. Of 10^8 ids, two are equal with a probability of 0.03 %.
"""

import struct
from array import array
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

_GROUP = struct.Struct("<8Q")
_GROUP_IDS = 8


def hash64(name: str) -> int:
    """64 bits that stand for `name`."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


class Chain:
    """The ids of one prompt's blocks, in order, which can only become longer.

    A turn of a session adds to what its earlier turns hashed; nothing is hashed twice.
    """

    __slots__ = ("_ids", "_name")

    def __init__(self, shared: Iterable[int], name: str) -> None:
        """`shared` are the ids of the first blocks, of another chain; `name` is that of the blocks after them."""
        # A list takes five times the memory, and an agent's context has up to 12,500 blocks of 16 tokens.
        self._ids = array("Q", shared)
        self._name = name

    def first(self, number: int) -> tuple[int, ...]:
        """The ids of the first `number` blocks."""
        ids = self._ids
        while len(ids) < number:
            group, place = divmod(len(ids), _GROUP_IDS)
            # The groups count from the prompt's first block, not from that of the chain.
            ids.extend(_GROUP.unpack(blake2b(f"{self._name} {group}".encode()).digest())[place:])
        return tuple(ids[:number])


@lru_cache(maxsize=64)
def shared_block_ids(profile_name: str, tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Ids of the blocks that lie wholly inside the first `tokens` of a profile's system prompt.

    They are the same for all users, ranks and seeds, and differ from those of every other profile and block size.
    """
    return Chain((), f"system prompt of {profile_name} {block_tokens}").first(tokens // block_tokens)
