"""What every block store offers, what it says of itself, and the memory that direct I/O needs."""

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mlpstorage.config import MIB, PAGE_BYTES

BASE_BYTES = 64 * MIB
"""Random bytes that the payloads of all buffers of a process are made of, together; more where that is less than one
object a buffer."""

SHARED_PART_BYTES = 8 * MIB
"""Objects of this size and more are written from the memory that others are read into."""

_HUGE_PAGE_BYTES = 2 * MIB


class ShortObjectError(OSError):
    """An object on storage holds fewer bytes than were written to it."""


class StoreFullError(OSError):
    """A store with a fixed number of places has none left; `errno` is ENOSPC."""


class Moved(NamedTuple):
    """How an object was moved.

    Attributes:
        direct: Whether the file was opened for direct I/O; None where no file was opened.
        page_cache_bytes: Bytes of what was read that the page cache held when the read began, which is the most that
            can have come from it; 0 for direct I/O and for all but reads; None where it cannot be known.
        retries: Tries beyond the first.
    """

    direct: bool | None = None
    page_cache_bytes: int | None = 0
    retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a store can do. Known once it is open.

    Attributes:
        direct: Whether its files are opened for direct I/O.
        aligned: Whether every object begins and ends at a page of a file or device, so that direct I/O is possible.
        descriptors: Whether it offers `begin_read` and its kin (see `storage.descriptor`), so that an I/O engine may do
            the transfer itself.
        shared: Whether other processes that open the same place see what is written, at once and whole.
        lasting: Whether objects outlive the process, to be found by `listing`.
        holds_data: Whether a read gives back what was written; False for a store that keeps sizes only.
    """

    direct: bool
    aligned: bool
    descriptors: bool
    shared: bool
    lasting: bool
    holds_data: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Room of the place that a store uses, in bytes; None where the place has no limit that it tells."""

    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a store found in its place.

    Attributes:
        object_ids: Objects that are there and look whole, the least recently written first as far as that is known.
        damaged: Objects of this store that are not whole (truncated, torn, or without the stamps that belong there);
            `listing` has removed them.
        foreign: Things that are not this store's; they were left alone.
    """

    object_ids: tuple[int, ...]
    damaged: int
    foreign: int


class BlockStore(Protocol):
    """A place for objects of one size, addressed by object id (see `storage.keys`).

    Every method blocks. Those on objects may be called by many threads at once, for different objects, each with a
    buffer of its own; reads of one object may overlap. Failures are raised as `OSError`; a failed write leaves nothing
    behind and an object that was there before may be gone.
    """

    @property
    def object_bytes(self) -> int:
        """Bytes of an object's payload."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes that an object takes on storage: the payload, padded to full pages."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do."""
        ...

    def open(self) -> None:
        """Make the store ready for use, on a place that is empty or that a store of the same kind has left."""
        ...

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """Fill `buffer` (page-aligned, `stored_bytes` long) with an object.

        Raises:
            FileNotFoundError: There is no such object.
            ShortObjectError: The object is truncated.
        """
        ...

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """Store `buffer` (page-aligned, `stored_bytes` long) as an object, replacing one that is there."""
        ...

    def delete(self, object_id: int) -> Moved:
        """Remove an object.

        Raises:
            FileNotFoundError: There is no such object.
        """
        ...

    def sync(self, object_id: int) -> None:
        """Return when an object that was written is on stable storage (`--write-sync batch`)."""
        ...

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """Which of the objects are there, as one batch."""
        ...

    def listing(self) -> Listing:
        """All objects that are there: how an index is rebuilt. Call it before the first read or write."""
        ...

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:
        """Have the system forget cached pages of the objects; returns the bytes dropped, None if unknown.

        Objects that are gone meanwhile are passed over.
        """
        ...

    def capacity(self) -> Capacity:
        """Room of the place."""
        ...

    def close(self) -> None:
        """Give back what the store holds in this process; the objects stay. Calling it again does nothing."""
        ...


def padded_bytes(payload_bytes: int) -> int:
    """Bytes of a payload rounded up to full pages, as direct I/O wants them."""
    return -(-payload_bytes // PAGE_BYTES) * PAGE_BYTES


def buffer_bytes(stored_bytes: int, buffers: int) -> int:
    """Memory that one of a process's payload buffers takes at most; an I/O engine has one an operation in flight.

    That is one object of `SHARED_PART_BYTES` or more; of a smaller size an object to read into, and to write from as
    many as make up the buffer's share of `BASE_BYTES`, but at least one.

    Args:
        stored_bytes: Bytes of an object on storage.
        buffers: How many buffers there are.
    """
    return (1 + written_parts(stored_bytes, buffers)) * stored_bytes


def written_parts(stored_bytes: int, buffers: int) -> int:
    """Objects' worth of memory that a buffer has for writing alone."""
    if stored_bytes >= SHARED_PART_BYTES:
        return 0
    return max(1, -(-(BASE_BYTES // buffers) // stored_bytes))


def aligned_memory(size_bytes: int) -> memoryview:
    """Zeroed memory, private to the process, that starts at a page and takes physical memory only where it is touched.

    Its whole huge pages are asked of the kernel as such: pinning one page instead of 512 for a direct read is most of
    what can be saved there, and gathering stamps that lie 4 KiB apart misses the TLB less. The memory goes back to the
    system with its last view.
    """
    huge_bytes = size_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    slack_bytes = _HUGE_PAGE_BYTES if huge_bytes else 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, size_bytes + slack_bytes, flags=flags)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % _HUGE_PAGE_BYTES if huge_bytes else 0
    if huge_bytes:
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
    return memoryview(mapping)[start : start + size_bytes]
