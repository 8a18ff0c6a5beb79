"""What objects are named and what they hold, so that a read can prove that it got the right bytes.

An object's key is the 128-bit blake2b digest of its namespace ("model|kv_rank|group") and its block id. The key in hex
is the file name; its first eight bytes, little-endian, are the object stamp.

Each 4 KiB page of an object holds random bytes behind a stamp of two little-endian 64-bit words: the object stamp and
the page's number. No two pages are equal, so that deduplication finds nothing. The random bytes are drawn once, for
`BASE_BYTES` a thread, and successive writes of a thread take successive parts of them, so that a compressor that sees
the writes in order needs a window larger than that to find any of them again.
"""

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from mlpstorage.config import MIB, PAGE_BYTES
from mlpstorage.errors import RunError
from mlpstorage.storage.base import aligned_memory

if TYPE_CHECKING:
    import numpy.typing as npt

BASE_BYTES = 8 * MIB
"""Random bytes that a thread writes, at least, before it repeats itself."""

_WORD = np.dtype("<u8")
_STAMP = np.dtype("V16")
_PAGE_STAMPS = PAGE_BYTES // _STAMP.itemsize
_DRAWN_WORDS = MIB // _WORD.itemsize
"""Words that are drawn; the rest of a payload is these, combined (XOR) with one more word for each such stretch. That
costs a tenth of drawing them all, and to a compressor the stretches have no bytes in common."""
_PART_PAGES = 500
"""Pages stamped or gathered in one call. Above that numpy gives up the interpreter lock for the few microseconds that
it takes, and threads that have to take it back from each other spend more on that than on the stamps."""

KEY_BYTES = 16
"""Length of an object's key; its name is twice as many hex digits."""

STAMP_BYTES = 8
"""How much of its beginning is the object stamp."""


class VerifyError(RunError):
    """A page that was read is not the page that was written.

    Attributes:
        object_name: Name of the object that was asked for.
        page: Number of the first page in it that is wrong.
        expected: The object stamp and the page number that belong there.
        found: The two words that were found there.
    """

    def __init__(self, object_name: str, page: int, expected: tuple[int, int], found: tuple[int, int]) -> None:
        super().__init__(object_name, page, expected, found)
        self.object_name = object_name
        self.page = page
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return (
            f"object {self.object_name}, page {self.page}: expected stamp {self.expected[0]:016x} page "
            f"{self.expected[1]}, found stamp {self.found[0]:016x} page {self.found[1]}; the storage returned other "
            "data than was written to it"
        )


class ObjectKeys:
    """The one place that derives names and stamps from block ids."""

    __slots__ = ("_prefix",)

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{namespace}|".encode()

    def key(self, block_id: int) -> bytes:
        """The object's key, `KEY_BYTES` long."""
        return blake2b(b"%s%d" % (self._prefix, block_id), digest_size=KEY_BYTES).digest()

    def name(self, block_id: int) -> str:
        """The object's file name."""
        return self.key(block_id).hex()

    def stamp(self, block_id: int) -> int:
        """The word that begins each page of the object."""
        return int.from_bytes(self.key(block_id)[:STAMP_BYTES], "little")


class Payload:
    """Payloads of one namespace and size; threads share it and take a buffer each."""

    __slots__ = ("keys", "stored_bytes")

    def __init__(self, namespace: str, stored_bytes: int) -> None:
        self.keys = ObjectKeys(namespace)
        self.stored_bytes = stored_bytes

    def new_buffer(self) -> "PayloadBuffer":
        """A buffer for one thread."""
        return PayloadBuffer(self.keys, self.stored_bytes)

    def stamp(self, memory: memoryview, block_id: int) -> None:
        """Stamp the pages of `memory` as those of an object; the bytes between the stamps stay."""
        PagedMemory(memory).stamp(self.keys.key(block_id))

    def check(self, memory: memoryview, block_id: int) -> int:
        """Check the stamps of all pages of `memory`; returns the bytes of the pages found right, which is all of them.

        Raises:
            VerifyError: A page is not the object's.
        """
        return PagedMemory(memory).check(self.keys.key(block_id))


class PagedMemory:
    """Memory for one object, with all that stamping and checking its pages need prepared."""

    __slots__ = ("_bytes", "_expected", "_found", "_pages", "_parts", "_stamp_words", "memory")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self._pages = memory.nbytes // PAGE_BYTES
        self._expected: npt.NDArray[np.uint64] = np.zeros((self._pages, 2), _WORD)
        self._expected[:, 1] = np.arange(self._pages, dtype=_WORD)
        self._stamp_words = self._expected.data.cast("B").cast("Q")[::2]
        self._found = np.empty(self._pages, _STAMP)
        # Both words of a stamp are one 16-byte item, so that a page costs one access to memory.
        expected = self._expected.reshape(-1).view(_STAMP)
        stamps = np.frombuffer(memory, _STAMP)[::_PAGE_STAMPS]
        parts = [slice(start, start + _PART_PAGES) for start in range(0, self._pages, _PART_PAGES)]
        self._parts = [(stamps[part], expected[part], self._found[part]) for part in parts]

    def stamp(self, key: bytes) -> None:
        """Stamp the pages as those of the object with this key."""
        self._expect(key)
        for stamps, expected, _found in self._parts:
            stamps[:] = expected

    def check(self, key: bytes) -> int:
        """Check the stamps; returns the bytes of the pages found right, which is all of them.

        Raises:
            VerifyError: A page is not the object's.
        """
        self._expect(key)
        for stamps, _expected, found in self._parts:
            found[:] = stamps
        if self._found.tobytes() == self._expected.tobytes():
            return self.memory.nbytes
        pairs = self._found.view(_WORD).reshape(-1, 2)
        page = int((pairs != self._expected).any(axis=1).argmax())
        expected = (int(self._expected[page, 0]), int(self._expected[page, 1]))
        raise VerifyError(key.hex(), page, expected, (int(pairs[page, 0]), int(pairs[page, 1])))

    def fill(self) -> None:
        """Fill the memory with random bytes.

        They come from the system's entropy: which blocks are written follows from the run's seed, what is in them need
        not, and should not be what an earlier run left on the same storage.
        """
        draw = np.random.SFC64().random_raw
        words = self._bytes.view(_WORD)
        drawn = words[:_DRAWN_WORDS]
        drawn[:] = draw(drawn.size)
        for start in range(_DRAWN_WORDS, words.size, _DRAWN_WORDS):
            part = words[start : start + _DRAWN_WORDS]
            np.bitwise_xor(drawn[: part.size], np.uint64(draw()), out=part)

    def copy_from(self, source: memoryview) -> None:
        """Copy an object into the memory; of a source without padding the end of the last page stays as it was."""
        np.copyto(self._bytes[: source.nbytes], np.frombuffer(source, np.uint8))

    def copy_to(self, target: memoryview) -> None:
        """Copy the memory to `target`, which may lack the padding."""
        np.copyto(np.frombuffer(target, np.uint8), self._bytes[: target.nbytes])

    def _expect(self, key: bytes) -> None:
        self._stamp_words[:] = memoryview(key[:STAMP_BYTES] * self._pages).cast("Q")


class PayloadBuffer:
    """A thread's memory: one part to read objects into, and the random bytes that it writes.

    Objects of `BASE_BYTES` and more are read into the only part there is. Smaller ones are read into a part of their
    own: were what is read written again, threads that read the same object would write the same bytes. Memory is taken
    as parts are first used, in all less than `BASE_BYTES` and two objects, or one object.
    """

    __slots__ = ("_filled", "_keys", "_memory", "_next", "_parts", "_read", "_stored_bytes")

    def __init__(self, keys: ObjectKeys, stored_bytes: int) -> None:
        # The part for reading, and as many to write from as make up the base.
        count = 1 if stored_bytes >= BASE_BYTES else 1 - (-BASE_BYTES // stored_bytes)
        self._keys = keys
        self._stored_bytes = stored_bytes
        self._memory = aligned_memory(count * stored_bytes)
        self._read = PagedMemory(self._memory[:stored_bytes])
        self._parts: list[PagedMemory | None] = [self._read, *[None] * (count - 1)]
        self._filled = False
        self._next = 0

    def to_read(self) -> PagedMemory:
        """Memory to read an object into; what it is given must then be checked by `check`."""
        self._filled = False
        return self._read

    def check(self, block_id: int) -> int:
        """Check what was read; returns the bytes of the pages found right, which is all of them.

        Raises:
            VerifyError: A page is not the object's.
        """
        verified_bytes = self._read.check(self._keys.key(block_id))
        self._filled = True
        return verified_bytes

    def to_write(self, block_id: int) -> PagedMemory:
        """Memory that holds a payload for an object."""
        part = self._written_part() if len(self._parts) > 1 else self._only_part()
        part.stamp(self._keys.key(block_id))
        return part

    def _only_part(self) -> PagedMemory:
        # Any object that was read and found right is as good as random bytes. What failed to be read is not.
        if not self._filled:
            self._read.fill()
            self._filled = True
        return self._read

    def _written_part(self) -> PagedMemory:
        self._next = self._next % (len(self._parts) - 1) + 1
        part = self._parts[self._next]
        if part is None:
            start = self._next * self._stored_bytes
            part = self._parts[self._next] = PagedMemory(self._memory[start : start + self._stored_bytes])
            part.fill()
        return part
