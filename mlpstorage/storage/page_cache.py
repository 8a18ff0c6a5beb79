"""How much of a file the page cache of this host holds.

What is counted is the most that a buffered read can have taken from memory. What is not: caches behind the file system.
A network or FUSE file system has a server or a daemon with a cache of its own, a disk has one too, and ZFS keeps what
was read in its own cache, outside the page cache. The figure is right for the page cache also there; of those others
it tells nothing.

Not every file system answers: `cachestat` of a file on overlayfs is of the overlay's own pages, of which there are
none, and where a file system bypasses the page cache (ZFS, FUSE with direct I/O) the count is 0 whatever happens.
`cached_bytes_counter` finds out by doing it.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache

CachedBytes = Callable[[int, int, int], int | None]
"""Takes a descriptor, an offset and a length (more than 0), in bytes; returns the bytes of these that the page cache
holds, None where it cannot be known."""

_CACHESTAT = 451
"""System call number of cachestat(2), Linux 6.5; the same on all architectures but Alpha."""

_Words2, _Words5 = ctypes.c_uint64 * 2, ctypes.c_uint64 * 5
_MAP_FAILED = ctypes.c_void_p(-1).value


def cached_bytes(descriptor: int, offset_bytes: int, length_bytes: int) -> int | None:
    """Bytes of a part of an open file that the page cache holds, from cachestat(2), else mincore(2); None if unknown.

    A file system that answers neither truly is not noticed here: see `cached_bytes_counter`.
    """
    found = cached_by_cachestat(descriptor, offset_bytes, length_bytes)
    return cached_by_mincore(descriptor, offset_bytes, length_bytes) if found is None else found


def cached_bytes_counter(descriptor: int, fresh_bytes: int) -> CachedBytes:
    """The way of counting that tells the truth of a file's file system.

    Args:
        descriptor: A file whose first bytes were just written through the page cache, and are therefore in it.
        fresh_bytes: How many; full pages.
    """
    for count in (cached_by_cachestat, cached_by_mincore):
        if count(descriptor, 0, fresh_bytes) == fresh_bytes:
            return count
    return _unknown


def cached_by_cachestat(descriptor: int, offset_bytes: int, length_bytes: int) -> int | None:
    """See `CachedBytes`; by cachestat(2). None where the kernel has it not, or denies it."""
    part = _Words2(offset_bytes, length_bytes)
    pages = _Words5()  # cached, dirty, in writeback, evicted, recently evicted
    if _libc().syscall(_CACHESTAT, descriptor, part, pages, 0):
        return None
    return min(pages[0] * mmap.PAGESIZE, length_bytes)


def cached_by_mincore(descriptor: int, offset_bytes: int, length_bytes: int) -> int | None:
    """See `CachedBytes`; by mincore(2) on a mapping.

    None also for files of others: of those the kernel says, since Linux 5.2, that all of them is cached.
    """
    if os.fstat(descriptor).st_uid != os.geteuid() != 0:
        return None
    libc = _libc()
    before_bytes = offset_bytes % mmap.PAGESIZE
    mapped_bytes = before_bytes + length_bytes
    start = libc.mmap(None, mapped_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset_bytes - before_bytes)
    if start == _MAP_FAILED:
        return None
    try:
        pages = (ctypes.c_ubyte * -(-mapped_bytes // mmap.PAGESIZE))()
        if libc.mincore(start, mapped_bytes, pages):
            return None
    finally:
        libc.munmap(start, mapped_bytes)
    return min(bytes(pages).count(1) * mmap.PAGESIZE, length_bytes)


def _unknown(_descriptor: int, _offset_bytes: int, _length_bytes: int) -> None:
    return None


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    size, word, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = (ctypes.c_long, word, pointer, pointer, ctypes.c_uint)
    libc.mmap.restype = pointer
    libc.mmap.argtypes = (pointer, size, word, word, word, ctypes.c_int64)
    libc.mincore.argtypes = (pointer, size, pointer)
    libc.munmap.argtypes = (pointer, size)
    return libc
