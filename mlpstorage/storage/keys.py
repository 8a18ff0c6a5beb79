"""How objects are named and stamped, and how a name or a stamp is turned back into the object's id.

An object's id is `block_id x kv_ranks + kv_rank`: a block of a model that runs tensor-parallel is one object a kv rank
(`namespaces` of them, "model|kv_rank|group"). Its key is 16 bytes: the *stamp*, which begins each of its pages, and the
*tag* of its namespace. The key in hex is its name.

    tag    first eight bytes of blake2b(namespace)
    stamp  the block id, mixed by a bijection of 64-bit words that the namespace chooses

As the mixing can be undone, no two objects of a namespace share a stamp, and a listing of names, or a table of keys,
tells the ids.
"""

from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16
"""Length of an object's key; its name is twice as many hex digits."""

STAMP_BYTES = 8
"""How much of its beginning is the stamp, little-endian."""

_MASK = (1 << 64) - 1
# Constants of the finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FIRST_INVERSE, _SECOND_INVERSE = pow(_FIRST, -1, 1 << 64), pow(_SECOND, -1, 1 << 64)


class ObjectKeys:
    """The one place that derives keys from object ids, and ids from keys.

    Args:
        namespaces: One for each kv rank; all different.
    """

    __slots__ = ("_part_of_tag", "_salts", "_tags", "parts")

    def __init__(self, *namespaces: str) -> None:
        self.parts = len(namespaces)
        self._tags = [blake2b(one.encode(), digest_size=KEY_BYTES - STAMP_BYTES).digest() for one in namespaces]
        self._salts = [
            int.from_bytes(blake2b(one.encode(), digest_size=STAMP_BYTES, person=b"stamp").digest(), "little")
            for one in namespaces
        ]
        self._part_of_tag = {tag: part for part, tag in enumerate(self._tags)}

    def key(self, object_id: int) -> bytes:
        """The object's key, `KEY_BYTES` long."""
        block_id, part = divmod(object_id, self.parts)
        return _mixed(block_id ^ self._salts[part]).to_bytes(STAMP_BYTES, "little") + self._tags[part]

    def name(self, object_id: int) -> str:
        """The object's name."""
        return self.key(object_id).hex()

    def stamp(self, object_id: int) -> int:
        """The word that begins each page of the object."""
        block_id, part = divmod(object_id, self.parts)
        return _mixed(block_id ^ self._salts[part])

    def object_id(self, key: bytes) -> int | None:
        """The object that has this key; None where it is of another namespace."""
        part = self._part_of_tag.get(key[STAMP_BYTES:])
        if part is None:
            return None
        block_id = _unmixed(int.from_bytes(key[:STAMP_BYTES], "little")) ^ self._salts[part]
        return block_id * self.parts + part

    def block_objects(self, block_id: int) -> Sequence[int]:
        """The ids of a block's objects, one a kv rank."""
        first = block_id * self.parts
        return range(first, first + self.parts)


def _mixed(word: int) -> int:
    word = (word ^ word >> 30) * _FIRST & _MASK
    word = (word ^ word >> 27) * _SECOND & _MASK
    return word ^ word >> 31


def _unmixed(word: int) -> int:
    word = (word ^ word >> 31 ^ word >> 62) * _SECOND_INVERSE & _MASK
    word = (word ^ word >> 27 ^ word >> 54) * _FIRST_INVERSE & _MASK
    return word ^ word >> 30 ^ word >> 60
