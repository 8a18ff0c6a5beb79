"""Keys: names, stamps and tags of objects, and the way back from them."""

import hashlib
import struct

import pytest

from mlpstorage.storage.keys import KEY_BYTES, STAMP_BYTES, ObjectKeys

NAMESPACES = ("llama3.1-8b|0|full", "llama3.1-8b|1|full")
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""What SplitMix64 adds to its state before it mixes it."""


def splitmix64(word: int) -> int:
    """The mixing step of SplitMix64, written down once more on 64-bit words."""
    z = word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def expected_key(namespace: str, block_id: int) -> bytes:
    """The key that the format's description asks for, worked out anew."""
    (salt,) = struct.unpack("<Q", hashlib.blake2b(namespace.encode(), digest_size=8, person=b"stamp").digest())
    tag = hashlib.blake2b(namespace.encode(), digest_size=8).digest()
    return struct.pack("<Q", splitmix64(block_id ^ salt)) + tag


def test_mixing_is_that_of_splitmix64() -> None:
    """The generator's first outputs for the seed 1234567, as published with its reference code, come out."""
    outputs = [splitmix64((1_234_567 + turn * GOLDEN_GAMMA) % 2**64) for turn in (1, 2, 3)]
    assert outputs == [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]


@pytest.mark.parametrize("block_id", [0, 1, 7, 2**32, 2**63, 2**64 - 1])
def test_key_is_stamp_and_tag(block_id: int) -> None:
    """A key is the mixed block id and the namespace's tag; the name is its hex, the stamp its first half."""
    keys = ObjectKeys(*NAMESPACES)
    for part, namespace in enumerate(NAMESPACES):
        object_id = block_id * 2 + part
        key = expected_key(namespace, block_id)
        assert len(key) == KEY_BYTES
        assert keys.key(object_id) == key
        assert keys.name(object_id) == key.hex()
        assert keys.stamp(object_id) == int.from_bytes(key[:STAMP_BYTES], "little")
        assert keys.object_id(key) == object_id


def test_keys_stay_what_they_are() -> None:
    """Names of kept caches are found again by later versions: these were made by the first that kept any."""
    keys = ObjectKeys("tiny-1b|0|full")
    assert keys.name(0) == "1b9ca5f629952025cb1993c9ceb567cf"
    assert keys.name(2**64 - 1) == "f00be6571c584f32cb1993c9ceb567cf"


def test_key_of_another_namespace_is_no_object() -> None:
    """Neither another model's key nor one with a bit flipped in its tag is taken for an object of this one."""
    keys = ObjectKeys(*NAMESPACES)
    assert keys.object_id(ObjectKeys("tiny-1b|0|full").key(5)) is None
    key = bytearray(keys.key(5))
    key[STAMP_BYTES] ^= 1
    assert keys.object_id(bytes(key)) is None


def test_ranks_of_a_block_differ() -> None:
    """The objects of a block, one a kv rank, have ids in a row, and different stamps and tags."""
    keys = ObjectKeys(*(f"llama3.1-70b-instruct|{rank}|full" for rank in range(8)))
    object_ids = keys.block_objects(12_345)
    assert list(object_ids) == list(range(12_345 * 8, 12_346 * 8))
    assert len({keys.stamp(object_id) for object_id in object_ids}) == 8
    assert len({keys.key(object_id)[STAMP_BYTES:] for object_id in object_ids}) == 8


def test_near_ids_have_far_stamps() -> None:
    """Stamps of ids in a row differ in about half of their bits, so that names spread evenly over directories."""
    keys = ObjectKeys("tiny-1b|0|full")
    flipped = [(keys.stamp(block_id) ^ keys.stamp(block_id + 1)).bit_count() for block_id in range(1000)]
    assert 30 < sum(flipped) / len(flipped) < 34
    directories = [keys.name(block_id)[:2] for block_id in range(25_600)]
    counts = [directories.count(f"{number:02x}") for number in range(256)]
    assert min(counts) > 50
    assert max(counts) < 150
