"""Payloads: what is in the pages of an object, and what a check of them finds."""

import ctypes
import hashlib
import pickle
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
import xxhash

from mlpstorage.config import Verify
from mlpstorage.errors import MLPStorageError
from mlpstorage.storage.base import BASE_BYTES, SHARED_PART_BYTES, aligned_memory, buffer_bytes, padded_bytes
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.payload import Payload, VerifyError, WriteNumbers

NAMESPACE = "tiny-1b|0|full"
KEYS = ObjectKeys(NAMESPACE)
MIB = 1 << 20
STORED_BYTES = 16 * 24_576
"""An object of tiny-1b at 16 tokens: 96 pages."""


def pages(memory: memoryview | bytes) -> Iterator[bytes]:
    """The pages of an object."""
    for start in range(0, len(memory), 4096):
        yield bytes(memory[start : start + 4096])


def expected_stamps(object_id: int, count: int, keys: ObjectKeys = KEYS) -> list[tuple[int, int]]:
    """The first two words that the format's description asks for."""
    (stamp,) = struct.unpack("<Q", bytes.fromhex(keys.name(object_id)[:16]))
    return [(stamp, page) for page in range(count)]


def found_stamps(memory: memoryview | bytes) -> list[tuple[int, int]]:
    """The first two words of each page."""
    return [struct.unpack("<QQ", page[:16]) for page in pages(memory)]


def checksums_fit(memory: memoryview | bytes) -> bool:
    """Whether the third word of each page is the xxh3 hash of all behind it, as other tools print it."""
    return all(page[16:24] == xxhash.xxh3_64_digest(page[24:])[::-1] for page in pages(memory))


def addresses(memory: memoryview) -> range:
    """Where some memory lies."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return range(start, start + memory.nbytes)


@pytest.fixture
def payload() -> Payload:
    """Payloads of 96 pages."""
    return Payload(KEYS, STORED_BYTES)


@pytest.fixture
def full() -> Payload:
    """Payloads of 96 pages, of which every byte is checked."""
    return Payload(KEYS, STORED_BYTES, Verify.FULL)


@pytest.mark.parametrize("verify", list(Verify))
@pytest.mark.parametrize("object_id", [0, 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stored_bytes", [4096, 2 * 4096, STORED_BYTES, 501 * 4096, 1024 * 4096])
def test_pages_bear_stamp_number_and_checksum(object_id: int, stored_bytes: int, verify: Verify) -> None:
    """Every page begins with the object's stamp, its own number and its checksum, whatever will be checked."""
    written = Payload(KEYS, stored_bytes, verify).new_buffer().to_write(object_id).memory
    assert found_stamps(written) == expected_stamps(object_id, stored_bytes // 4096)
    assert checksums_fit(written)


def test_all_pages_of_many_objects_differ(payload: Payload) -> None:
    """No two pages of 400 objects, written by two threads' buffers, are equal."""
    seen: set[bytes] = set()
    for buffer, first in ((payload.new_buffer(), 0), (payload.new_buffer(), 200)):
        for object_id in range(first, first + 200):
            seen.update(
                hashlib.sha1(page, usedforsecurity=False).digest() for page in pages(buffer.to_write(object_id).memory)
            )
    assert len(seen) == 400 * 96


@pytest.mark.parametrize("buffers", [1, 8, 32])
@pytest.mark.parametrize("stored_bytes", [4096, STORED_BYTES, 5 * MIB])
def test_random_bytes_do_not_repeat_within_a_buffers_share(stored_bytes: int, buffers: int) -> None:
    """What lies behind the headers is new in every page until a buffer has written its share of 64 MiB."""
    buffer = Payload(KEYS, stored_bytes, buffers=buffers).new_buffer()
    share_bytes = max(64 * MIB // buffers, stored_bytes)
    objects = -(-share_bytes // stored_bytes)
    bodies = {
        hashlib.sha1(page[24:], usedforsecurity=False).digest()
        for object_id in range(objects)
        for page in pages(buffer.to_write(object_id).memory)
    }
    assert len(bodies) == objects * stored_bytes // 4096 >= share_bytes // 4096


@pytest.mark.parametrize("stored_bytes", [4096, STORED_BYTES, 9 * MIB])
def test_payload_does_not_compress(stored_bytes: int) -> None:
    """Neither deflate nor zstd saves one per cent of one object or of ten in a row."""
    buffer = Payload(KEYS, stored_bytes).new_buffer()
    data = b"".join(bytes(buffer.to_write(object_id).memory) for object_id in range(10))
    for sample in (data[:stored_bytes], data):
        assert len(zlib.compress(sample, level=1)) >= 0.99 * len(sample)
    zstd = shutil.which("zstd")
    if zstd is None:
        pytest.skip("deflate alone was tried: zstd is not installed")
    squeezed = subprocess.run([zstd, "-1", "--stdout"], input=data, stdout=subprocess.PIPE, check=True).stdout
    assert len(squeezed) >= 0.99 * len(data)


@pytest.mark.parametrize(("verify", "verified_bytes"), [("off", 0), ("stamp", STORED_BYTES), ("full", STORED_BYTES)])
def test_check_accepts_what_was_written(payload: Payload, verify: str, verified_bytes: int) -> None:
    """A whole object is found right, page by page, in any buffer that holds it; or not looked at."""
    written = payload.new_buffer().to_write(5).memory
    reading = Payload(KEYS, STORED_BYTES, Verify(verify))
    reader = reading.new_buffer()
    reader.to_read().memory[:] = written
    assert reader.check(5) == verified_bytes
    assert reading.check(written, 5) == verified_bytes


def test_nothing_is_checked_where_verification_is_off() -> None:
    """Zeros pass for an object, and no byte of them counts as verified."""
    off = Payload(KEYS, STORED_BYTES, Verify.OFF)
    assert off.check(aligned_memory(STORED_BYTES), 5) == 0
    buffer = off.new_buffer()
    buffer.to_read()
    assert buffer.check(5) == 0


@pytest.mark.parametrize("verify", [Verify.STAMP, Verify.FULL])
@pytest.mark.parametrize("page", [0, 1, 50, 95])
@pytest.mark.parametrize("byte", [0, 7, 8, 15])
def test_one_flipped_bit_in_a_stamp_is_found(page: int, byte: int, verify: Verify) -> None:
    """A single wrong bit in either of the first words of one page fails the check, which names the page."""
    payload = Payload(KEYS, STORED_BYTES, verify)
    written = payload.new_buffer().to_write(5).memory
    written[page * 4096 + byte] ^= 1
    with pytest.raises(VerifyError) as caught:
        payload.check(written, 5)
    error = caught.value
    assert (error.page, error.object_id, error.object_name) == (page, 5, KEYS.name(5))
    assert error.expected == expected_stamps(5, 96)[page]
    assert error.found == found_stamps(written)[page]
    assert not error.checksum
    assert f"object {KEYS.name(5)}, page {page}: expected stamp {error.expected[0]:016x} page {page}" in str(error)


@pytest.mark.parametrize("page", [0, 1, 499, 500, 1023])
@pytest.mark.parametrize("byte", [16, 23, 24, 25, 2048, 4095])
def test_one_flipped_bit_anywhere_is_found_by_a_full_check(page: int, byte: int) -> None:
    """A wrong bit in a page's checksum or in its random bytes is not seen by the stamps, and fails a full check."""
    stored_bytes = 1024 * 4096
    written = Payload(KEYS, stored_bytes).new_buffer().to_write(5).memory
    before = bytes(written[page * 4096 : (page + 1) * 4096])
    written[page * 4096 + byte] ^= 0x80
    after = bytes(written[page * 4096 : (page + 1) * 4096])
    assert Payload(KEYS, stored_bytes).check(written, 5) == stored_bytes
    with pytest.raises(VerifyError) as caught:
        Payload(KEYS, stored_bytes, Verify.FULL).check(written, 5)
    error = caught.value
    assert (error.page, error.object_id, error.checksum) == (page, 5, True)
    assert error.expected == struct.unpack("<Q", after[16:24])
    assert error.found == (xxhash.xxh3_64(after[24:]).intdigest(),)
    assert (error.expected == struct.unpack("<Q", before[16:24])) is (byte >= 24)
    assert f"object {KEYS.name(5)}, page {page}: expected checksum {error.expected[0]:016x}" in str(error)


@pytest.mark.parametrize(("stamp_page", "checksum_page"), [(3, 60), (60, 3), (7, 7)])
def test_first_wrong_page_is_named(full: Payload, stamp_page: int, checksum_page: int) -> None:
    """Of a page with a wrong stamp and one with a wrong byte the first is named; in one page the stamp is."""
    written = full.new_buffer().to_write(5).memory
    written[stamp_page * 4096] ^= 1
    written[checksum_page * 4096 + 100] ^= 1
    with pytest.raises(VerifyError) as caught:
        full.check(written, 5)
    assert caught.value.page == min(stamp_page, checksum_page)
    assert caught.value.checksum is (checksum_page < stamp_page)


@pytest.mark.parametrize("verify", [Verify.STAMP, Verify.FULL])
def test_swapped_pages_are_found(verify: Verify) -> None:
    """Pages of the right object in the wrong order fail the check at the first that is out of place."""
    payload = Payload(KEYS, STORED_BYTES, verify)
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
    foreign = bytearray(Payload(ObjectKeys("tiny-1b|1|full"), STORED_BYTES).new_buffer().to_write(5).memory)
    with pytest.raises(VerifyError):
        payload.check(memoryview(foreign), 5)


def test_page_of_another_object_is_found(payload: Payload) -> None:
    """One stale page among right ones fails the check, beyond the part that is stamped in one call too."""
    long = Payload(KEYS, 1024 * 4096)
    written = long.new_buffer().to_write(5).memory
    other = payload.new_buffer().to_write(6).memory
    written[777 * 4096 : 778 * 4096] = other[:4096]
    with pytest.raises(VerifyError) as caught:
        long.check(written, 5)
    assert caught.value.page == 777
    assert caught.value.found == expected_stamps(6, 1)[0]


def test_a_good_read_follows_a_bad_one(full: Payload) -> None:
    """What one check has found wrong does not stick to the memory."""
    buffer = full.new_buffer()
    written = bytes(buffer.to_write(5).memory)
    buffer.to_read().memory[:] = bytes(STORED_BYTES)
    with pytest.raises(VerifyError):
        buffer.check(5)
    buffer.to_read().memory[:] = written
    with pytest.raises(VerifyError):
        buffer.check(6)
    assert buffer.check(5) == STORED_BYTES


@pytest.mark.parametrize(
    "error", [VerifyError("ab", 3, (1, 3), (2, 4), 77), VerifyError("ab", 3, (1,), (2,), object_id=77, checksum=True)]
)
def test_verify_error_crosses_processes(error: VerifyError) -> None:
    """The error is one of the tool's, ends the run with code 6, and survives pickling."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own data
    assert isinstance(error, MLPStorageError)
    assert isinstance(copy, VerifyError)
    assert copy.exit_code == 6
    assert str(copy) == str(error)
    assert (copy.page, copy.expected, copy.found, copy.object_id) == (3, error.expected, error.found, 77)
    assert copy.checksum is error.checksum


def test_stamp_keeps_the_rest() -> None:
    """Stamping changes the first 16 bytes of each page and nothing else."""
    memory = aligned_memory(3 * 4096)
    memory[:] = b"\xa5" * len(memory)
    Payload(KEYS, 3 * 4096).stamp(memory, 9)
    assert found_stamps(memory) == expected_stamps(9, 3)
    assert all(page[16:] == b"\xa5" * 4080 for page in pages(memory))


@pytest.mark.parametrize("verify", list(Verify))
def test_failed_read_is_no_base_for_a_payload(verify: Verify) -> None:
    """A large object is written from the memory that others are read to, but never from what was not read whole."""
    buffer = Payload(KEYS, SHARED_PART_BYTES, verify).new_buffer()
    assert checksums_fit(buffer.to_write(1).memory)
    buffer.to_read().memory[:] = bytes(SHARED_PART_BYTES)
    if verify is not Verify.OFF:
        with pytest.raises(VerifyError):
            buffer.check(1)
    written = bytes(buffer.to_write(2).memory)
    assert checksums_fit(written)
    assert len(zlib.compress(written, level=1)) >= 0.99 * SHARED_PART_BYTES


@pytest.mark.parametrize("verify", [Verify.OFF, Verify.STAMP])
def test_what_was_read_unverified_is_written_with_new_checksums(verify: Verify) -> None:
    """A byte that storage changed in one large object makes no other fail a later full check."""
    full = Payload(KEYS, SHARED_PART_BYTES, Verify.FULL)
    damaged = bytearray(full.new_buffer().to_write(1).memory)
    damaged[1234 * 4096 + 1000] ^= 1
    with pytest.raises(VerifyError):
        full.check(memoryview(damaged), 1)
    buffer = Payload(KEYS, SHARED_PART_BYTES, verify).new_buffer()
    for object_id in (2, 3):
        read = buffer.to_read().memory
        read[:] = damaged
        buffer.check(1)
        written = buffer.to_write(object_id).memory
        assert full.check(written, object_id) == SHARED_PART_BYTES
        assert bytes(written[1234 * 4096 + 24 : 1235 * 4096]) == damaged[1234 * 4096 + 24 : 1235 * 4096]


def test_what_was_read_and_fully_verified_is_written_as_it_is() -> None:
    """A large object that was found right is the payload of the next: the same bytes under new stamps."""
    full = Payload(KEYS, SHARED_PART_BYTES, Verify.FULL)
    stored = bytes(full.new_buffer().to_write(1).memory)
    buffer = full.new_buffer()
    buffer.to_read().memory[:] = stored
    assert buffer.check(1) == SHARED_PART_BYTES
    written = buffer.to_write(2).memory
    assert full.check(written, 2) == SHARED_PART_BYTES
    assert all(one[16:] == other[16:] for one, other in zip(pages(written), pages(stored), strict=True))


def test_small_objects_are_not_written_from_what_was_read(payload: Payload) -> None:
    """Two threads that read the same object write different bytes all the same."""
    shared = bytes(payload.new_buffer().to_write(1).memory)
    bodies: list[bytes] = []
    for object_id in (2, 3):
        buffer = payload.new_buffer()
        buffer.to_read().memory[:] = shared
        buffer.check(1)
        bodies += [page[16:] for page in pages(buffer.to_write(object_id).memory)]
    bodies += [page[16:] for page in pages(shared)]
    assert len(set(bodies)) == 3 * 96


@pytest.mark.parametrize(
    ("stored_mib", "buffers", "expected_mib"),
    [(2, 8, 10), (2, 32, 4), (2, 64, 4), (1, 8, 9), (5, 8, 15), (5, 32, 10), (8, 8, 8), (8, 1, 8), (32, 32, 32)],
)
def test_memory_of_a_buffer(stored_mib: int, buffers: int, expected_mib: int) -> None:
    """An object to read into and a share of 64 MiB in whole objects; of 8 MiB and more, one object."""
    assert buffer_bytes(stored_mib * MIB, buffers) == expected_mib * MIB
    buffer = Payload(KEYS, stored_mib * MIB, buffers=buffers).new_buffer()
    written = [addresses(buffer.to_write(object_id).memory) for object_id in range(20)]
    taken = [addresses(buffer.to_read().memory), *written]
    assert {len(one) for one in taken} == {stored_mib * MIB}
    assert max(one.stop for one in taken) - min(one.start for one in taken) == expected_mib * MIB


@pytest.mark.parametrize("stored_kib", [4, 128, 384, 2048])
@pytest.mark.parametrize("buffers", [1, 7, 8, 32])
def test_random_bytes_of_all_buffers_are_bounded(stored_kib: int, buffers: int) -> None:
    """All buffers together write from 64 MiB, rounded up to whole objects a buffer; the rest is what they read into."""
    stored_bytes = stored_kib << 10
    written_bytes = buffers * (buffer_bytes(stored_bytes, buffers) - stored_bytes)
    assert BASE_BYTES == 64 * MIB
    assert written_bytes <= BASE_BYTES + buffers * stored_bytes
    assert written_bytes >= BASE_BYTES - buffers


@pytest.mark.parametrize("verify", list(Verify))
@pytest.mark.parametrize("stored_bytes", [STORED_BYTES, 9 * MIB])
def test_no_object_is_copied(stored_bytes: int, verify: Verify) -> None:
    """Once a buffer has used all of its memory, stamping and checking take a small part of an object's size."""
    buffer = Payload(KEYS, stored_bytes, verify).new_buffer()
    objects = buffer_bytes(stored_bytes, 8) // stored_bytes
    for object_id in range(objects):
        buffer.to_write(object_id)
    buffer.to_read().memory[:] = bytes(Payload(KEYS, stored_bytes).new_buffer().to_write(5).memory)
    buffer.check(5)
    tracemalloc.start()
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        for object_id in range(20):
            assert buffer.check(5) == (0 if verify is Verify.OFF else stored_bytes)
            if stored_bytes < SHARED_PART_BYTES:
                buffer.to_write(object_id)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes - before_bytes < stored_bytes / 8


@pytest.mark.parametrize(
    ("payload_bytes", "stored_bytes"), [(1, 4096), (4096, 4096), (4097, 8192), (1_124_352, 1_126_400), (0, 0)]
)
def test_padding_fills_the_last_page(payload_bytes: int, stored_bytes: int) -> None:
    """Padding goes to the next multiple of 4,096: a DeepSeek block of 16 tokens takes 275 pages."""
    assert padded_bytes(payload_bytes) == stored_bytes


def test_page_of_an_older_write_is_found() -> None:
    """One page of the object's own older version, or all of them, fail the check; the last version passes."""
    payload = Payload(KEYS, STORED_BYTES, writes=WriteNumbers())
    buffer = payload.new_buffer()
    old = bytes(buffer.to_write(5).memory)
    new = bytes(buffer.to_write(5).memory)
    mixed = bytearray(new)
    mixed[7 * 4096 : 8 * 4096] = old[7 * 4096 : 8 * 4096]
    for content, page in ((bytes(mixed), 7), (old, 0)):
        buffer.to_read().memory[:] = content
        with pytest.raises(VerifyError) as caught:
            buffer.check(5)
        assert caught.value.page == page
        assert caught.value.found[1] >> 32 == (old_write := struct.unpack_from("<QII", old)[2])
        assert caught.value.expected[1] >> 32 == (old_write + 1) % (1 << 32)
        assert "write" in str(caught.value)
    buffer.to_read().memory[:] = new
    assert buffer.check(5) == STORED_BYTES


def test_number_of_an_unknown_write_is_learned() -> None:
    """Of an object that was there before, one stale page is found at once; once read whole, an old version is, too."""
    earlier = Payload(KEYS, STORED_BYTES, writes=WriteNumbers()).new_buffer()
    first, second = bytes(earlier.to_write(5).memory), bytes(earlier.to_write(5).memory)
    buffer = Payload(KEYS, STORED_BYTES, writes=WriteNumbers()).new_buffer()
    for page in (0, 50, 95):
        mixed = bytearray(second)
        mixed[page * 4096 : (page + 1) * 4096] = first[page * 4096 : (page + 1) * 4096]
        buffer.to_read().memory[:] = bytes(mixed)
        with pytest.raises(VerifyError) as caught:
            buffer.check(5)
        assert caught.value.page == page
    buffer.to_read().memory[:] = second
    assert buffer.check(5) == STORED_BYTES
    buffer.to_read().memory[:] = first
    with pytest.raises(VerifyError):
        buffer.check(5)


def test_deleted_object_has_no_number() -> None:
    """After a delete any one version passes again; what is no write to storage leaves the numbers alone."""
    writes = WriteNumbers()
    buffer = Payload(KEYS, STORED_BYTES, writes=writes).new_buffer()
    old = bytes(buffer.to_write(5).memory)
    known = writes.of(5)
    assert known is not None
    buffer.to_write(5, numbered=False)
    assert writes.of(5) == known
    buffer.to_write(5)
    writes.forget(5)
    buffer.to_read().memory[:] = old
    assert buffer.check(5) == STORED_BYTES
    assert writes.of(5) == known


def test_where_others_write_the_same_object_any_whole_version_is_right() -> None:
    """A rank that shares storage takes another's later write, and its own after that; never one mixed of both."""
    mine = Payload(KEYS, STORED_BYTES, writes=WriteNumbers(shared=True)).new_buffer()
    theirs = Payload(KEYS, STORED_BYTES, writes=WriteNumbers(shared=True)).new_buffer()
    versions = [bytes(buffer.to_write(7).memory) for buffer in (mine, theirs, mine)]
    assert len({version[12:16] for version in versions}) == 3
    for version in versions:
        mine.to_read().memory[:] = version
        mine.check(7)
    mine.to_read().memory[:] = versions[0][:4096] + versions[1][4096:]
    with pytest.raises(VerifyError):
        mine.check(7)
