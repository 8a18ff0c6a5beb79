"""How files of a directory are to be opened, found out by doing it."""

import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.config import PAGE_BYTES, DirectMode
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import aligned_memory
from mlpstorage.storage.page_cache import CachedBytes, cached_bytes_counter

_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAccess:
    """How files are opened, and what can be known of the page cache under them.

    Attributes:
        direct: Whether for direct I/O.
        refusal: Why not, where the file system refuses it; None where it does not, or was not asked.
        cached_bytes: Counts what the page cache holds of a file.
    """

    direct: bool
    refusal: str | None
    cached_bytes: CachedBytes

    @property
    def flags(self) -> int:
        """What to open files with: O_DIRECT or nothing."""
        return os.O_DIRECT if self.direct else 0


def probe_access(directory: Path, mode: DirectMode) -> FileAccess:
    """Find out how to open files in a directory. A file is made there and removed again.

    A file system may take O_DIRECT and go through the page cache all the same (tmpfs since Linux 6.6, ext4 that
    journals data): where a page that was moved directly is in the page cache afterwards, that is a refusal too.

    Raises:
        ConfigurationError: `mode` is ALWAYS and the file system refuses direct I/O.
        OSError: The probe fails for another reason.
    """
    path = directory / f".probe-{secrets.token_hex(4)}"
    count = _cached_bytes_counter(path)
    if mode is DirectMode.NEVER:
        return FileAccess(direct=False, refusal=None, cached_bytes=count)
    refusal = _direct_refusal(path, count)
    if refusal is None:
        return FileAccess(direct=True, refusal=None, cached_bytes=count)
    if mode is DirectMode.ALWAYS:
        raise ConfigurationError(f"--direct always: {directory}: {refusal}; use --direct auto or another --cache-dir")
    return FileAccess(direct=False, refusal=f"{directory}: {refusal}", cached_bytes=count)


def _cached_bytes_counter(path: Path) -> CachedBytes:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, bytes(PAGE_BYTES), 0)
        return cached_bytes_counter(descriptor, PAGE_BYTES)
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _direct_refusal(path: Path, count: CachedBytes) -> str | None:
    """Write and read a page directly; returns why it was refused, None if it was not."""
    written = aligned_memory(PAGE_BYTES)
    written[:] = secrets.token_bytes(PAGE_BYTES)
    found = aligned_memory(PAGE_BYTES)
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o600)
        os.pwritev(descriptor, (written,), 0)
        os.preadv(descriptor, (found,), 0)
        through_page_cache = bool(count(descriptor, 0, PAGE_BYTES))
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return f"the file system refuses direct I/O ({error.strerror})"
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        path.unlink(missing_ok=True)
    if found != written:
        raise OSError(errno.EIO, "a page read directly differs from what was written", str(path))
    if through_page_cache:
        return "the file system takes direct I/O but does it through the page cache"
    return None
