"""Payloads: what is in the pages of an object, and what a check of them finds."""

import hashlib
import pickle
import struct
import zlib
from collections.abc import Iterator

import pytest

from mlpstorage.errors import MLPStorageError
from mlpstorage.storage.base import aligned_memory, padded_bytes
from mlpstorage.storage.payload import BASE_BYTES, ObjectKeys, Payload, VerifyError

NAMESPACE = "tiny-1b|0|full"
STORED_BYTES = 16 * 24_576
"""An object of tiny-1b at 16 tokens: 96 pages."""


def pages(memory: memoryview | bytes) -> Iterator[bytes]:
    """The pages of an object."""
    for start in range(0, len(memory), 4096):
        yield bytes(memory[start : start + 4096])


def expected_stamps(namespace: str, block_id: int, count: int) -> list[tuple[int, int]]:
    """The stamps that the format's description asks for, worked out anew."""
    key = hashlib.blake2b(f"{namespace}|{block_id}".encode(), digest_size=16).digest()
    (stamp,) = struct.unpack("<Q", key[:8])
    return [(stamp, page) for page in range(count)]


def found_stamps(memory: memoryview | bytes) -> list[tuple[int, int]]:
    """The first two words of each page."""
    return [struct.unpack("<QQ", page[:16]) for page in pages(memory)]


@pytest.fixture
def payload() -> Payload:
    """Payloads of 96 pages."""
    return Payload(NAMESPACE, STORED_BYTES)


@pytest.mark.parametrize("block_id", [0, 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stored_bytes", [4096, 2 * 4096, STORED_BYTES, 501 * 4096, 1024 * 4096])
def test_pages_bear_object_stamp_and_page_number(block_id: int, stored_bytes: int) -> None:
    """Every page begins with the first eight bytes of the object's key and its own number, little-endian."""
    written = Payload(NAMESPACE, stored_bytes).new_buffer().to_write(block_id).memory
    assert found_stamps(written) == expected_stamps(NAMESPACE, block_id, stored_bytes // 4096)


def test_name_is_the_key_in_hex() -> None:
    """The name is the 128-bit blake2b digest of namespace and block id, and its beginning is the stamp."""
    keys = ObjectKeys("llama|3|full")
    digest = hashlib.blake2b(b"llama|3|full|18446744073709551615", digest_size=16).hexdigest()
    assert keys.name(2**64 - 1) == digest
    assert keys.stamp(2**64 - 1).to_bytes(8, "little").hex() == digest[:16]


def test_all_pages_of_many_objects_differ(payload: Payload) -> None:
    """No two pages of 400 objects, written by two threads' buffers, are equal."""
    seen: set[bytes] = set()
    for buffer, first in ((payload.new_buffer(), 0), (payload.new_buffer(), 200)):
        for block_id in range(first, first + 200):
            seen.update(
                hashlib.sha1(page, usedforsecurity=False).digest() for page in pages(buffer.to_write(block_id).memory)
            )
    assert len(seen) == 400 * 96


@pytest.mark.parametrize("stored_bytes", [4096, STORED_BYTES, 5 << 20])
def test_random_bytes_do_not_repeat_within_the_base(stored_bytes: int) -> None:
    """What lies between the stamps is new in every page until 8 MiB are written, within objects and between them."""
    buffer = Payload(NAMESPACE, stored_bytes).new_buffer()
    objects = -(-BASE_BYTES // stored_bytes)
    bodies = [page[16:] for block_id in range(objects) for page in pages(buffer.to_write(block_id).memory)]
    assert len(set(bodies)) == len(bodies) >= BASE_BYTES // 4096


@pytest.mark.parametrize("stored_bytes", [4096, STORED_BYTES, 9 << 20])
def test_payload_does_not_compress(stored_bytes: int) -> None:
    """Deflate saves less than one per cent of one object and of ten in a row."""
    buffer = Payload(NAMESPACE, stored_bytes).new_buffer()
    data = b"".join(bytes(buffer.to_write(block_id).memory) for block_id in range(10))
    for sample in (data[:stored_bytes], data):
        assert len(zlib.compress(sample, level=1)) >= 0.99 * len(sample)


def test_check_accepts_what_was_stamped(payload: Payload) -> None:
    """A whole object is found right, page by page, in any buffer that holds it."""
    written = payload.new_buffer().to_write(5).memory
    reader = payload.new_buffer()
    reader.to_read().memory[:] = written
    assert reader.check(5) == STORED_BYTES
    assert payload.check(written, 5) == STORED_BYTES


@pytest.mark.parametrize("page", [0, 1, 50, 95])
@pytest.mark.parametrize("byte", [0, 7, 8, 15])
def test_one_flipped_bit_in_a_stamp_is_found(payload: Payload, page: int, byte: int) -> None:
    """A single wrong bit in either word of one page fails the check, which names the page."""
    written = payload.new_buffer().to_write(5).memory
    written[page * 4096 + byte] ^= 1
    with pytest.raises(VerifyError) as caught:
        payload.check(written, 5)
    assert caught.value.page == page
    assert caught.value.object_name == ObjectKeys(NAMESPACE).name(5)
    assert caught.value.expected == expected_stamps(NAMESPACE, 5, 96)[page]
    assert caught.value.found == found_stamps(written)[page]
    assert f"page {page}:" in str(caught.value)


def test_swapped_pages_are_found(payload: Payload) -> None:
    """Pages of the right object in the wrong order fail the check at the first that is out of place."""
    written = payload.new_buffer().to_write(5).memory
    parts = list(pages(written))
    parts[3], parts[60] = parts[60], parts[3]
    written[:] = b"".join(parts)
    with pytest.raises(VerifyError) as caught:
        payload.check(written, 5)
    assert (caught.value.page, caught.value.found[1]) == (3, 60)


def test_another_object_is_found(payload: Payload) -> None:
    """An object of another id, or of another namespace, fails the check at its first page."""
    written = bytearray(payload.new_buffer().to_write(6).memory)
    with pytest.raises(VerifyError) as caught:
        payload.check(memoryview(written), 5)
    assert caught.value.page == 0
    foreign = bytearray(Payload("tiny-1b|1|full", STORED_BYTES).new_buffer().to_write(5).memory)
    with pytest.raises(VerifyError):
        payload.check(memoryview(foreign), 5)


def test_page_of_another_object_is_found(payload: Payload) -> None:
    """One stale page among right ones fails the check, beyond the part that is stamped in one call too."""
    long = Payload(NAMESPACE, 1024 * 4096)
    written = long.new_buffer().to_write(5).memory
    other = payload.new_buffer().to_write(6).memory
    written[777 * 4096 : 778 * 4096] = other[:4096]
    with pytest.raises(VerifyError) as caught:
        long.check(written, 5)
    assert caught.value.page == 777
    assert caught.value.found == expected_stamps(NAMESPACE, 6, 1)[0]


def test_verify_error_crosses_processes() -> None:
    """The error is one of the tool's, ends the run with code 6, and survives pickling."""
    error = VerifyError("ab", 3, (1, 3), (2, 4))
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own data
    assert isinstance(error, MLPStorageError)
    assert isinstance(copy, VerifyError)
    assert copy.exit_code == 6
    assert str(copy) == str(error)
    assert (copy.page, copy.expected, copy.found) == (3, (1, 3), (2, 4))


def test_stamp_keeps_the_rest() -> None:
    """Stamping changes the first 16 bytes of each page and nothing else."""
    memory = aligned_memory(3 * 4096)
    memory[:] = b"\xa5" * len(memory)
    Payload(NAMESPACE, 3 * 4096).stamp(memory, 9)
    assert found_stamps(memory) == expected_stamps(NAMESPACE, 9, 3)
    assert all(page[16:] == b"\xa5" * 4080 for page in pages(memory))


def test_failed_read_is_no_base_for_a_payload() -> None:
    """A large object is written from the memory that others are read to, but never from what failed its check."""
    stored_bytes = 8 << 20
    buffer = Payload(NAMESPACE, stored_bytes).new_buffer()
    buffer.to_read().memory[:] = bytes(stored_bytes)
    with pytest.raises(VerifyError):
        buffer.check(1)
    written = bytes(buffer.to_write(2).memory)
    assert len(zlib.compress(written, level=1)) >= 0.99 * stored_bytes


def test_small_objects_are_not_written_from_what_was_read(payload: Payload) -> None:
    """Two threads that read the same object write different bytes all the same."""
    shared = bytes(payload.new_buffer().to_write(1).memory)
    bodies: list[bytes] = []
    for block_id in (2, 3):
        buffer = payload.new_buffer()
        buffer.to_read().memory[:] = shared
        buffer.check(1)
        bodies += [page[16:] for page in pages(buffer.to_write(block_id).memory)]
    bodies += [page[16:] for page in pages(shared)]
    assert len(set(bodies)) == 3 * 96


@pytest.mark.parametrize(
    ("payload_bytes", "stored_bytes"), [(1, 4096), (4096, 4096), (4097, 8192), (1_124_352, 1_126_400), (0, 0)]
)
def test_padding_fills_the_last_page(payload_bytes: int, stored_bytes: int) -> None:
    """Padding goes to the next multiple of 4,096: a DeepSeek block of 16 tokens takes 275 pages."""
    assert padded_bytes(payload_bytes) == stored_bytes
