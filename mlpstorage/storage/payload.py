"""What objects are named and what they hold, so that a read can prove that it got the right bytes.

An object's key is the 128-bit blake2b digest of its namespace ("model|kv_rank|group") and its block id. The key in hex
is the file name; its first eight bytes, little-endian, are the object stamp.

Each 4 KiB page of an object holds random bytes behind a stamp of two little-endian 64-bit words: the object stamp and
the page's number. Each write has random bytes of its own: the buffer is combined with a fresh 64-bit key (XOR), which
costs a fifth of drawing random numbers and leaves neither a deduplicating nor a compressing store anything to find,
however large its window and whatever was read into the buffer before.
"""

import random
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from mlpstorage.config import PAGE_BYTES
from mlpstorage.errors import RunError
from mlpstorage.storage.base import aligned_memory

if TYPE_CHECKING:
    import numpy.typing as npt

_WORD = np.dtype("<u8")
_STAMP = np.dtype("V16")
_PAGE_STAMPS = PAGE_BYTES // _STAMP.itemsize
_FILL_WORDS = 1 << 15
"""Words drawn at a time, few enough to stay in the processor's cache."""

KEY_BYTES = 16
"""Length of an object's key; its name is twice as many hex digits."""


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
        return int.from_bytes(self.key(block_id)[:8], "little")


class Payload:
    """Payloads of one namespace and size; threads share it and take a buffer each."""

    __slots__ = ("keys", "stored_bytes")

    def __init__(self, namespace: str, stored_bytes: int) -> None:
        self.keys = ObjectKeys(namespace)
        self.stored_bytes = stored_bytes

    def new_buffer(self) -> "PayloadBuffer":
        """A buffer for one thread, with memory of its own that is good for direct I/O."""
        return PayloadBuffer(self.keys, aligned_memory(self.stored_bytes))

    def stamp(self, memory: memoryview, block_id: int) -> None:
        """Stamp the pages of `memory` as those of an object."""
        PayloadBuffer(self.keys, memory).stamp(block_id)

    def check(self, memory: memoryview, block_id: int) -> int:
        """Check the stamps of all pages of `memory`; returns the bytes of the pages found right.

        Raises:
            VerifyError: A page is not the object's.
        """
        return PayloadBuffer(self.keys, memory).check(block_id)


class PayloadBuffer:
    """Memory for one object with all that stamping and checking it need prepared; for one thread at a time."""

    __slots__ = ("_bytes", "_expected", "_expected_stamps", "_is_random", "_keys", "_stamps", "_words", "memory")

    def __init__(self, keys: ObjectKeys, memory: memoryview) -> None:
        pages = memory.nbytes // PAGE_BYTES
        self.memory = memory
        self._keys = keys
        self._is_random = False
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(memory, _WORD)
        self._stamps: npt.NDArray[np.void] = np.frombuffer(memory, _STAMP)[::_PAGE_STAMPS]
        self._expected: npt.NDArray[np.uint64] = np.zeros((pages, 2), _WORD)
        self._expected[:, 1] = np.arange(pages, dtype=_WORD)
        self._expected_stamps: npt.NDArray[np.void] = self._expected.reshape(-1).view(_STAMP)

    def prepare(self, block_id: int) -> None:
        """Fill the memory with a payload for an object, unlike any other."""
        if self._is_random:
            words = self._words
            np.bitwise_xor(words, np.uint64(random.getrandbits(64)), out=words)
        else:
            self._fill()
        self.stamp(block_id)

    def stamp(self, block_id: int) -> None:
        """Stamp the pages as those of an object; the bytes between the stamps stay."""
        self._expected[:, 0] = self._keys.stamp(block_id)
        # Both words of a stamp are one 16-byte item, so that a page costs one access to memory.
        self._stamps[:] = self._expected_stamps

    def check(self, block_id: int) -> int:
        """Check the stamps of all pages; returns the bytes of the pages found right, which is all of them.

        Raises:
            VerifyError: A page is not the object's.
        """
        self._expected[:, 0] = self._keys.stamp(block_id)
        found = self._stamps.tobytes()
        if found == self._expected_stamps.tobytes():
            self._is_random = True
            return self.memory.nbytes
        pairs = np.frombuffer(found, _WORD).reshape(-1, 2)
        page = int((pairs != self._expected).any(axis=1).argmax())
        expected = (int(self._expected[page, 0]), int(self._expected[page, 1]))
        raise VerifyError(self._keys.name(block_id), page, expected, (int(pairs[page, 0]), int(pairs[page, 1])))

    def load(self, source: memoryview) -> None:
        """Copy an object into the memory; of a source without padding the end of the last page stays as it was."""
        np.copyto(self._bytes[: source.nbytes], np.frombuffer(source, np.uint8))

    def save(self, target: memoryview) -> None:
        """Copy the memory to `target`, which may lack the padding."""
        np.copyto(np.frombuffer(target, np.uint8), self._bytes[: target.nbytes])

    def discard(self) -> None:
        """Forget what the memory holds: until it is checked, what is read into it is no base for a payload."""
        self._is_random = False

    def _fill(self) -> None:
        # Seeded by the system: which blocks are read and written follows from the run's seed, what is in them need not.
        draw = np.random.SFC64().random_raw
        words = self._words
        for start in range(0, words.size, _FILL_WORDS):
            part = words[start : start + _FILL_WORDS]
            part[:] = draw(part.size)
        self._is_random = True
