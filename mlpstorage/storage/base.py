"""What every block store offers, and the memory that direct I/O needs."""

import contextlib
import ctypes
import mmap
from typing import Protocol

from mlpstorage.config import MIB, PAGE_BYTES

_HUGE_PAGE_BYTES = 2 * MIB


class ShortObjectError(OSError):
    """An object on storage holds fewer bytes than were written to it."""


class BlockStore(Protocol):
    """A place for objects of one size, addressed by block id (an unsigned 64-bit integer).

    Every method blocks and may be called by many threads at once, each with a buffer of its own. Failures are raised
    as `OSError`; a failed write leaves nothing behind.
    """

    @property
    def object_bytes(self) -> int:
        """Bytes of an object's payload."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes that an object takes on storage: the payload, padded to full pages."""
        ...

    def open(self) -> None:
        """Make the store ready for use."""
        ...

    def read(self, block_id: int, buffer: memoryview) -> bool:
        """Fill `buffer` (page-aligned, `stored_bytes` long) with an object; returns whether it was read directly.

        Raises:
            ShortObjectError: The object is truncated.
        """
        ...

    def write(self, block_id: int, buffer: memoryview) -> bool:
        """Store `buffer` (page-aligned, `stored_bytes` long) as an object; returns whether it was written directly."""
        ...

    def delete(self, block_id: int) -> None:
        """Remove an object."""
        ...

    def close(self) -> None:
        """Give back what the store holds in this process; the objects stay."""
        ...


def padded_bytes(payload_bytes: int) -> int:
    """Bytes of a payload rounded up to full pages, as direct I/O wants them."""
    return -(-payload_bytes // PAGE_BYTES) * PAGE_BYTES


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
