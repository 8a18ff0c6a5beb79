"""Room of files: reserved before it is written, and given back in the middle of a file. By fallocate(2).

Not by posix_fallocate(3): where the file system cannot reserve, the C library would write to every block, through the
page cache.
"""

import ctypes
import errno
import os
from functools import cache

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Why a file cannot be as long as wanted: because of the file system, the user's quota, or the file's own limit."""

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_REFUSALS = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


def reserve(descriptor: int, size_bytes: int) -> bool:
    """Reserve the first bytes of a file, which becomes at least so long; False where the file system cannot.

    Then, and where it fails, the file is as long as before.

    Raises:
        OSError: There is no room, or the file may not become so long.
    """
    before_bytes = os.fstat(descriptor).st_size
    try:
        return _fallocate(descriptor, 0, 0, size_bytes)
    except OSError:
        os.ftruncate(descriptor, before_bytes)
        raise


def punch_hole(descriptor: int, offset_bytes: int, length_bytes: int) -> bool:
    """Give back a part (full pages) of a file, which is zeros from then on; False where the file system cannot."""
    return _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset_bytes, length_bytes)


def _fallocate(descriptor: int, mode: int, offset_bytes: int, length_bytes: int) -> bool:
    while _libc().fallocate(descriptor, mode, offset_bytes, length_bytes):
        number = ctypes.get_errno()
        if number in _REFUSALS:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc
