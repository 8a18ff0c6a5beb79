"""What objects hold, so that a read can prove that it got the right bytes.

Each 4 KiB page of an object begins with a header of three little-endian 64-bit words: the object's stamp (see
`storage.keys`), the page's number with the number of the write in its upper half, and the xxh3 hash of the page's other
4,072 bytes. Those are random. Writes are numbered so that a page of an older version of the same object is told from
one of the version that was written last (see `WriteNumbers`). No two pages
are equal, so that deduplication finds nothing. The random bytes are drawn, and hashed, once: `BASE_BYTES` for all
buffers together; to make an object of them costs its stamps only. Successive writes of a thread take successive parts
of its share, so that a compressor that sees the writes in order needs a window larger than that to find any of them
again.

All headers are written whole in every mode of verification, so that a cache that is kept can be checked by another.
"""

import enum
import itertools
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from mlpstorage.config import MIB, PAGE_BYTES, Verify
from mlpstorage.errors import RunError
from mlpstorage.storage.base import aligned_memory, written_parts
from mlpstorage.storage.keys import ObjectKeys

if TYPE_CHECKING:
    import numpy.typing as npt

HEADER_BYTES = 24
"""Stamp, page number and checksum at the beginning of each page."""

_WORD = np.dtype("<u8")
_PAGE_WORDS = PAGE_BYTES // _WORD.itemsize
_STAMP_WORD, _NUMBER_WORD, _CHECKSUM_WORD = range(3)
_WRITE_SHIFT = 32
"""Where in its word the number of a write begins, behind that of the page: objects are smaller than 16 TiB."""
_WRITE_MASK = (1 << 32) - 1
_STAMP = np.dtype("V16")
"""Stamp and page number as one item, so that gathering them costs one access to memory a page."""
_DRAWN_WORDS = MIB // _WORD.itemsize
"""Words that are drawn; the rest of a payload is these, combined (XOR) with one more word for each such stretch. That
costs a tenth of drawing them all, and to a compressor the stretches have no bytes in common."""
_PART_PAGES = 500
"""Pages stamped, gathered or numbered in one call. Above that numpy gives up the interpreter lock for the few
microseconds that it takes, and threads that have to take it back from each other spend more on that than on the stamps
(twice as much, for an object of 512 pages among eight threads). Checksums are worked out for as many (about 0.1 ms)
before a thread that waits for the lock may have it."""


class VerifyError(RunError):
    """A page that was read is not the page that was written.

    Attributes:
        object_name: Name of the object that was asked for.
        page: Number of the first page in it that is wrong.
        expected: The two words (stamp; page and write) that belong there; if only the checksum is wrong, the one in the
            page.
        found: The two words that were found there; if only the checksum is wrong, that of the bytes found.
        object_id: The object that was asked for.
        checksum: Whether only the checksum is wrong: the right page, with other bytes in it than were written.
    """

    def __init__(
        self,
        object_name: str,
        page: int,
        expected: Sequence[int],
        found: Sequence[int],
        object_id: int | None = None,
        checksum: bool = False,  # noqa: FBT002 - positional, for exceptions are pickled with their arguments
    ) -> None:
        super().__init__(object_name, page, expected, found, object_id, checksum)
        self.object_name = object_name
        self.page = page
        self.expected = tuple(expected)
        self.found = tuple(found)
        self.object_id = object_id
        self.checksum = checksum

    def __str__(self) -> str:
        where = f"object {self.object_name}, page {self.page}"
        if self.checksum:
            return (
                f"{where}: expected checksum {self.expected[0]:016x}, as the page says itself, found "
                f"{self.found[0]:016x}; the stamp is right, but the storage changed bytes of the page"
            )
        return (
            f"{where}: expected {_header_text(self.expected)}, found {_header_text(self.found)}; the storage returned "
            "other data than was written to it"
        )


def _header_text(words: Sequence[int]) -> str:
    return f"stamp {words[0]:016x} page {words[1] & _WRITE_MASK} write {words[1] >> _WRITE_SHIFT}"


class WriteNumbers:
    """Numbers of the writes of a rank, and which write each object on storage is of.

    They begin anywhere, so that what an earlier run left is not taken for what this one wrote. A read of an object
    whose number is not known (it was there before the rank began) must find one number in all pages, and that is then
    the object's. About 150 bytes an object.

    Args:
        shared: Other ranks write the same objects: no number is remembered, since the next read may find another's.
    """

    __slots__ = ("_next", "_of", "_shared")

    def __init__(self, *, shared: bool = False) -> None:
        self._shared = shared
        self._next = itertools.count(secrets.randbits(_WRITE_SHIFT))
        self._of: dict[int, int] = {}

    def begin(self, object_id: int) -> int:
        """The number of a new write of an object, 0 to 2^32 - 1."""
        number = next(self._next) & _WRITE_MASK
        if not self._shared:
            self._of[object_id] = number
        return number

    def of(self, object_id: int) -> int | None:
        """The number of an object's last write; None where it is not known."""
        return self._of.get(object_id)

    def learn(self, object_id: int, number: int) -> None:
        """Take the number that a read has found as an object's, where none is known."""
        if not self._shared:
            self._of.setdefault(object_id, number)

    def forget(self, object_id: int) -> None:
        """An object is gone."""
        self._of.pop(object_id, None)


class Payload:
    """Payloads of one size; threads share it and take a buffer each.

    Args:
        keys: Whose stamps the pages bear.
        stored_bytes: Size of an object on storage, full pages.
        verify: What of an object is checked.
        buffers: How many buffers will be made; they share `storage.base.BASE_BYTES` of random bytes.
        writes: Tells old versions of an object from the last; without it pages of different writes are found only
            beside each other.
    """

    __slots__ = ("buffers", "keys", "stored_bytes", "verify", "writes")

    def __init__(
        self,
        keys: ObjectKeys,
        stored_bytes: int,
        verify: Verify = Verify.STAMP,
        *,
        buffers: int = 8,
        writes: WriteNumbers | None = None,
    ) -> None:
        self.keys = keys
        self.stored_bytes = stored_bytes
        self.verify = verify
        self.buffers = buffers
        self.writes = writes

    def new_buffer(self) -> "PayloadBuffer":
        """A buffer for one operation at a time; see `storage.base.buffer_bytes` for what it takes of memory."""
        return PayloadBuffer(self)

    def stamp(self, memory: memoryview, object_id: int) -> None:
        """Write stamp and number of each page of `memory` as those of an object; all else, checksums too, stays."""
        PagedMemory(memory).stamp(self.keys.stamp(object_id))

    def check(self, memory: memoryview, object_id: int) -> int:
        """Check all pages of `memory` as far as `verify` asks; returns the bytes of the pages found right.

        Those are all or, where nothing is to be checked, none.

        Raises:
            VerifyError: A page is not the object's.
        """
        return 0 if self.verify is Verify.OFF else self.check_pages(PagedMemory(memory), object_id)

    def check_pages(self, pages: "PagedMemory", object_id: int, write: int | None = None) -> int:
        """The same as `check`, for memory that is prepared for it; None for any `write`, if all pages are of one."""
        if self.verify is Verify.OFF:
            return 0
        wrong = pages.first_wrong(self.keys.stamp(object_id), write, checksums=self.verify is Verify.FULL)
        if wrong is None:
            return pages.memory.nbytes
        raise VerifyError(self.keys.name(object_id), wrong.page, wrong.expected, wrong.found, object_id, wrong.checksum)


class WrongPage(NamedTuple):
    """The first wrong page of some memory; the attributes are those of `VerifyError`."""

    page: int
    expected: tuple[int, ...]
    found: tuple[int, ...]
    checksum: bool


class PagedMemory:
    """Memory for one object, with all that stamping and checking its pages need prepared.

    Attributes:
        memory: Full pages.
    """

    __slots__ = ("_check", "_headers", "_words", "memory")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self._words: npt.NDArray[np.uint64] = np.frombuffer(memory, _WORD).reshape(-1, _PAGE_WORDS)
        numbers = np.arange(len(self._words), dtype=_WORD)
        self._headers = [
            (self._words[part, _STAMP_WORD], self._words[part, _NUMBER_WORD], numbers[part])
            for part in _parts(len(self._words))
        ]
        self._check: _StampCheck | None = None

    @property
    def write(self) -> int:
        """The number of the write that the first page says it is of."""
        return int(self._words[0, _NUMBER_WORD]) >> _WRITE_SHIFT

    def stamp(self, stamp: int, write: int = 0) -> None:
        """Write the stamps and the numbers of the pages."""
        shifted = np.uint64(write << _WRITE_SHIFT)
        for stamps, numbers, pages in self._headers:
            stamps.fill(stamp)
            np.add(pages, shifted, out=numbers)

    def seal(self) -> None:
        """Write the checksums of the pages: the part of their headers that does not depend on the object."""
        for part in _parts(len(self._words)):
            self._words[part, _CHECKSUM_WORD] = self._checksums(part)

    def fill(self) -> None:
        """Fill the memory with random bytes, and seal it.

        They come from the system's entropy: which blocks are written follows from the run's seed, what is in them need
        not, and should not be what an earlier run left on the same storage.
        """
        draw = np.random.SFC64().random_raw
        words = self._words.reshape(-1)
        drawn = words[:_DRAWN_WORDS]
        drawn[:] = draw(drawn.size)
        for start in range(_DRAWN_WORDS, words.size, _DRAWN_WORDS):
            part = words[start : start + _DRAWN_WORDS]
            np.bitwise_xor(drawn[: part.size], np.uint64(draw()), out=part)
        self.seal()

    def first_wrong(self, stamp: int, write: int | None, *, checksums: bool) -> WrongPage | None:
        """Check stamps and numbers of all pages and, if asked to, every other byte; None where all are right."""
        if self._check is None:  # most memory is only written from
            self._check = _StampCheck(self.memory)
        wrong_stamp = self._check.first_wrong(stamp, write)
        if not checksums:
            return wrong_stamp
        end = len(self._words) if wrong_stamp is None else wrong_stamp.page
        return self._first_wrong_checksum(end) or wrong_stamp

    def copy_from(self, source: memoryview) -> None:
        """Copy an object into the memory."""
        np.copyto(self._words.reshape(-1), np.frombuffer(source, _WORD))

    def copy_to(self, target: memoryview) -> None:
        """Copy the memory to `target`."""
        np.copyto(np.frombuffer(target, _WORD), self._words.reshape(-1))

    def _checksums(self, part: slice) -> list[int]:
        return [xxh3_64_intdigest(rest) for rest in self._words[part, HEADER_BYTES // _WORD.itemsize :]]

    def _first_wrong_checksum(self, end: int) -> WrongPage | None:
        for part in _parts(len(self._words)):
            written: list[int] = self._words[part, _CHECKSUM_WORD].tolist()
            found = self._checksums(part)
            if written == found:
                continue
            page = next(number for number, (one, other) in enumerate(zip(written, found, strict=True)) if one != other)
            if part.start + page >= end:
                return None
            return WrongPage(part.start + page, (written[page],), (found[page],), checksum=True)
        return None


class _StampCheck:
    """Compares the stamps and numbers of all pages of some memory with those that belong there.

    What is found is gathered, and compared as a whole: at 2 MiB half of the time goes into waiting for memory.
    """

    __slots__ = ("_expected", "_found", "_found_numbers", "_parts")

    def __init__(self, memory: memoryview) -> None:
        pages = memory.nbytes // PAGE_BYTES
        self._expected = bytearray(pages * _STAMP.itemsize)
        self._found = bytearray(pages * _STAMP.itemsize)
        self._found_numbers = _pairs(self._found)[:, 1]
        stamps = np.frombuffer(memory, _STAMP)[:: PAGE_BYTES // _STAMP.itemsize]
        found = np.frombuffer(self._found, _STAMP)
        expected, numbers = _pairs(self._expected), np.arange(pages, dtype=_WORD)
        self._parts = [
            (stamps[part], found[part], expected[part, 0], expected[part, 1], numbers[part]) for part in _parts(pages)
        ]

    def first_wrong(self, stamp: int, write: int | None) -> WrongPage | None:
        """The first page with another stamp or number; None for any `write`, if all pages are of one."""
        for stamps, found, _, _, _ in self._parts:
            found[...] = stamps
        shifted = np.uint64((self._likely_write() if write is None else write) << _WRITE_SHIFT)
        for _, _, expected_stamps, expected_numbers, numbers in self._parts:
            expected_stamps.fill(stamp)
            np.add(numbers, shifted, out=expected_numbers)
        if self._found == self._expected:
            return None
        expected, found = _pairs(self._expected), _pairs(self._found)
        page = int((found != expected).any(axis=1).argmax())
        return WrongPage(page, tuple(expected[page].tolist()), tuple(found[page].tolist()), checksum=False)

    def _likely_write(self) -> int:
        """The write that two of the first, the middle and the last page are of; else that of the first."""
        pages = len(self._found_numbers)
        first, middle, last = (int(self._found_numbers[page]) >> _WRITE_SHIFT for page in (0, pages // 2, pages - 1))
        return last if middle == last else first


def _pairs(stamps: bytearray) -> "npt.NDArray[np.uint64]":
    return np.frombuffer(stamps, _WORD).reshape(-1, 2)


def _parts(pages: int) -> list[slice]:
    return [slice(start, start + _PART_PAGES) for start in range(0, pages, _PART_PAGES)]


class _Content(enum.Enum):
    """What the memory that objects are read into, and large ones written from, holds."""

    UNKNOWN = enum.auto()
    """Nothing yet, or what failed to be read or to be right: no payload."""
    UNSEALED = enum.auto()
    """An object that was read; that its checksums are right was not looked at."""
    SEALED = enum.auto()
    """Random bytes and their checksums."""


class PayloadBuffer:
    """Memory of one operation at a time: a part to read objects into, and the random bytes that it writes.

    Objects of `storage.base.SHARED_PART_BYTES` and more are read into the only part there is. Smaller ones are read
    into a part of their own: were what is read written again, threads that read the same object would write the same
    bytes. Memory is taken as parts are first used, in all `storage.base.buffer_bytes`.

    What was read into the only part and not fully verified is given new checksums before it is written, or an object
    that storage had changed would be written with checksums that do not fit, and a later check would blame the wrong
    write. That takes about 60 ms of processor time per GB, for a write that follows a read.
    """

    __slots__ = ("_content", "_memory", "_next", "_parts", "_payload", "_read")

    def __init__(self, payload: Payload) -> None:
        count = written_parts(payload.stored_bytes, payload.buffers)
        self._payload = payload
        self._memory = aligned_memory((1 + count) * payload.stored_bytes)
        self._read = PagedMemory(self._memory[: payload.stored_bytes])
        self._parts: list[PagedMemory | None] = [None] * count
        self._content = _Content.UNKNOWN
        self._next = 0

    def to_read(self) -> PagedMemory:
        """Memory to read an object into; what it is given must then be checked by `check`."""
        self._content = _Content.UNKNOWN
        return self._read

    def check(self, object_id: int, *, numbered: bool = True) -> int:
        """Check what was read; see `Payload.check`. What was not written to storage is not `numbered`.

        Raises:
            VerifyError: A page is not the object's.
        """
        writes = self._payload.writes if numbered else None
        write = None if writes is None else writes.of(object_id)
        verified_bytes = self._payload.check_pages(self._read, object_id, write)
        if writes is not None and write is None:
            writes.learn(object_id, self._read.write)
        self._content = _Content.SEALED if self._payload.verify is Verify.FULL else _Content.UNSEALED
        return verified_bytes

    def to_write(self, object_id: int, *, numbered: bool = True) -> PagedMemory:
        """Memory that holds a payload for an object; of a write with a number of its own, if it goes to storage."""
        part = self._next_part() if self._parts else self._only_part()
        writes = self._payload.writes if numbered else None
        part.stamp(self._payload.keys.stamp(object_id), 0 if writes is None else writes.begin(object_id))
        return part

    def _only_part(self) -> PagedMemory:
        # Any object that was read and found right is as good as random bytes. What failed to be read is not.
        if self._content is _Content.UNKNOWN:
            self._read.fill()
        elif self._content is _Content.UNSEALED:
            self._read.seal()
        self._content = _Content.SEALED
        return self._read

    def _next_part(self) -> PagedMemory:
        number = self._next
        self._next = (number + 1) % len(self._parts)
        part = self._parts[number]
        if part is None:
            start = (1 + number) * self._payload.stored_bytes
            part = self._parts[number] = PagedMemory(self._memory[start : start + self._payload.stored_bytes])
            part.fill()
        return part
