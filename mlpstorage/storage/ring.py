"""A ring of the kernel (io_uring), by the package `liburing`, and whether one can be had.

The package is an optional one (the extra `uring`) and is imported when a ring is opened.
"""

import errno
import importlib
import os
import select
from typing import Any

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.base import aligned_memory

_PROBE_TIMEOUT_MS = 5000
"""Far more than it takes to read a page of memory."""

_PROBE_TAG = 7
_PROBE_BYTE = b"\x5a"


class Ring:
    """A ring, used by one thread.

    Its functions that wait are not used: the binding keeps the interpreter lock meanwhile. Instead the kernel counts
    completions in an eventfd, for which a thread waits as it likes.

    Args:
        entries: Transfers that may be under way at once.
    """

    __slots__ = ("_binding", "_completion", "_entries", "_ring")

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._binding: Any = None
        self._completion: Any = None
        self._ring: Any = None

    def open(self, event_descriptor: int) -> None:
        """Have the kernel make the ring, and count its completions in an eventfd.

        Raises:
            ImportError: The package is not there.
            OSError: The kernel refuses.
        """
        self._binding = importlib.import_module("liburing")
        self._completion = self._binding.Cqe()
        ring = self._binding.Ring()
        self._binding.io_uring_queue_init(self._entries, ring, 0)
        self._ring = ring
        self._binding.io_uring_register_eventfd(ring, event_descriptor)

    def read(self, descriptor: int, memory: memoryview, offset_bytes: int, tag: int) -> object:
        """Begin to fill memory from a file; `completions` will tell the tag. Keep what is returned until then.

        Raises:
            OSError: The kernel takes no transfer. This one stays in the ring and would be begun with a later one.
        """
        # The binding takes only bytearrays for a plain read, which are not aligned; a vector takes any memory.
        vector = self._binding.Iovec([memory])
        entry = self._binding.io_uring_get_sqe(self._ring)
        self._binding.io_uring_prep_readv(entry, descriptor, vector, offset_bytes)
        entry.user_data = tag
        self._binding.io_uring_submit(self._ring)
        return vector

    def write(self, descriptor: int, memory: memoryview, offset_bytes: int, tag: int) -> object:
        """Begin to write memory to a file; as `read`."""
        vector = self._binding.Iovec([memory])
        entry = self._binding.io_uring_get_sqe(self._ring)
        self._binding.io_uring_prep_writev(entry, descriptor, vector, offset_bytes)
        entry.user_data = tag
        self._binding.io_uring_submit(self._ring)
        return vector

    def completions(self) -> list[tuple[int, int]]:
        """Tag and result of each transfer that ended meanwhile; the result is bytes, or a negative error number."""
        found: list[tuple[int, int]] = []
        entries = self._binding.io_uring_cqe_iter_init(self._ring)
        while self._binding.io_uring_cqe_iter_next(entries, self._completion):
            entry = self._completion[0]
            try:
                result = entry.res
            except OSError as error:  # the binding's way to give a negative result
                result = -(error.errno or errno.EIO)
            found.append((entry.user_data, result))
        if found:
            self._binding.io_uring_cq_advance(self._ring, len(found))
        return found

    def close(self) -> None:
        """Give the ring back. Calling it again does nothing."""
        ring, self._ring = self._ring, None
        if ring is not None:
            self._binding.io_uring_queue_exit(ring)


def probe_uring() -> str | None:
    """Why a ring cannot be had here; None where it can. Found out by reading a page of memory through one."""
    event, source = os.eventfd(0, os.EFD_CLOEXEC), os.memfd_create("probe", os.MFD_CLOEXEC)
    ring = Ring(1)
    try:
        os.pwrite(source, _PROBE_BYTE * PAGE_BYTES, 0)
        ring.open(event)
        return _read_failure(ring, source, event)
    except ImportError as error:
        return f"the package liburing cannot be loaded ({error}); pip install 'mlpstorage[uring]'"
    except OSError as error:
        return _refusal(error)
    finally:
        ring.close()
        os.close(event)
        os.close(source)


def _read_failure(ring: Ring, source: int, event: int) -> str | None:
    memory = aligned_memory(PAGE_BYTES)
    kept = ring.read(source, memory, 0, _PROBE_TAG)
    completed = select.poll()
    completed.register(event, select.POLLIN)
    if not completed.poll(_PROBE_TIMEOUT_MS):
        return "a read through a ring does not end"
    del kept
    found = ring.completions()
    if len(found) == 1 and found[0][1] < 0:
        return f"a read through a ring fails ({os.strerror(-found[0][1])}); the kernel may be too old"
    if found != [(_PROBE_TAG, PAGE_BYTES)] or memory != _PROBE_BYTE * PAGE_BYTES:
        return "a read through a ring does not give what is there"
    return None


def _refusal(error: OSError) -> str:
    if error.errno == errno.ENOSYS:
        return "the kernel has no io_uring, or a seccomp filter hides it"
    if error.errno in {errno.EPERM, errno.EACCES}:
        return "io_uring is not permitted here (the sysctl kernel.io_uring_disabled, or a seccomp filter)"
    return f"the kernel refuses a ring ({error.strerror})"
