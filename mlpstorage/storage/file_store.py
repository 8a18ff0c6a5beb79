"""Objects as files of a file system: one object a file, two levels of hash directories.

As vLLM, LMCache and SGLang do it: written whole under a temporary name, then renamed; no fsync.
"""

import errno
import itertools
import os
import re
import secrets
from pathlib import Path

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.base import ShortObjectError, aligned_memory, padded_bytes
from mlpstorage.storage.payload import KEY_BYTES, ObjectKeys

HASH_DIGITS = "0123456789abcdef"
"""Names of the directories at each of the two levels; an object lies below the first two digits of its name."""

OBJECT_NAME = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}(\.[0-9a-f]{{8}}-[0-9]+\.tmp)?")
"""An object, or an object being written (its temporary name)."""

PROBE_NAME = re.compile(r"\.probe-[0-9a-f]{8}")
"""The file in a store's root with which direct I/O is tried."""

_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


class FileStore:
    """A block store over the directory `root`, which `open` creates if need be.

    Attributes:
        root: Directory of the objects. Its parent must exist.
        object_bytes: Bytes of an object's payload.
        stored_bytes: Bytes of an object's file: the payload, padded to full pages.
        direct: Whether files are opened for direct I/O; decided by `open`, never changed later.
        direct_refusal: Why they are not; None where they are.
    """

    __slots__ = (
        "_keys",
        "_prefix",
        "_read_flags",
        "_temporary_numbers",
        "_token",
        "_write_flags",
        "direct",
        "direct_refusal",
        "object_bytes",
        "root",
        "stored_bytes",
    )

    def __init__(self, root: Path, namespace: str, object_bytes: int) -> None:
        self.root = root
        self.object_bytes = object_bytes
        self.stored_bytes = padded_bytes(object_bytes)
        self.direct = False
        self.direct_refusal: str | None = None
        self._keys = ObjectKeys(namespace)
        self._prefix = f"{root}/"
        self._read_flags = os.O_RDONLY | os.O_CLOEXEC
        self._write_flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        # Ranks that share a directory may write the same object at once: temporary names never meet.
        self._token = secrets.token_hex(4)
        self._temporary_numbers = itertools.count()

    def open(self) -> None:
        """Create the directories and find out, by doing it, whether the file system takes direct I/O.

        Raises:
            OSError: The directories cannot be created, or the probe fails for another reason than a refusal of
                direct I/O.
        """
        self.root.mkdir(exist_ok=True)
        for first in HASH_DIGITS:
            self.root.joinpath(first).mkdir(exist_ok=True)
            for second in HASH_DIGITS:
                self.root.joinpath(first, second).mkdir(exist_ok=True)
        self.direct_refusal = self._probe_direct()
        self.direct = self.direct_refusal is None
        if self.direct:
            self._read_flags |= os.O_DIRECT
            self._write_flags |= os.O_DIRECT

    def path(self, block_id: int) -> Path:
        """The file that holds an object."""
        return Path(self._path(block_id))

    def read(self, block_id: int, buffer: memoryview) -> bool:
        """Read a whole object into `buffer`; returns whether the file was opened for direct I/O.

        Raises:
            FileNotFoundError: There is no such object.
            ShortObjectError: The file is shorter than an object.
            OSError: The file system says so. A refusal of direct I/O at this point is an error like any other.
        """
        path = self._path(block_id)
        descriptor = os.open(path, self._read_flags)
        try:
            done_bytes = os.preadv(descriptor, (buffer,), 0)
            if done_bytes != self.stored_bytes:
                self._read_rest(descriptor, buffer, done_bytes, path)
        finally:
            os.close(descriptor)
        return self.direct

    def write(self, block_id: int, buffer: memoryview) -> bool:
        """Write `buffer` as an object, replacing one that is there; returns whether directly.

        Raises:
            OSError: The file system says so; nothing is left behind.
        """
        path = self._path(block_id)
        temporary = f"{path}.{self._token}-{next(self._temporary_numbers)}.tmp"
        descriptor = os.open(temporary, self._write_flags, 0o644)
        try:
            try:
                done_bytes = os.pwritev(descriptor, (buffer,), 0)
                while done_bytes != self.stored_bytes:
                    done_bytes += os.pwritev(descriptor, (buffer[done_bytes:],), done_bytes)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)  # noqa: PTH104 - a Path costs more than the call
        except BaseException:
            os.unlink(temporary)  # noqa: PTH108 - likewise
            raise
        return self.direct

    def delete(self, block_id: int) -> None:
        """Remove an object.

        Raises:
            FileNotFoundError: There is no such object.
            OSError: The file system says so.
        """
        os.unlink(self._path(block_id))  # noqa: PTH108 - a Path costs more than the call

    def close(self) -> None:
        """Nothing to do: between two calls no file is open."""

    def _path(self, block_id: int) -> str:
        name = self._keys.name(block_id)
        return f"{self._prefix}{name[0]}/{name[1]}/{name}"

    def _read_rest(self, descriptor: int, buffer: memoryview, done_bytes: int, path: str) -> None:
        while done_bytes != self.stored_bytes:
            # After an odd number of bytes comes the file's end, and direct I/O could not go on from there anyway.
            ended = self.direct and done_bytes % PAGE_BYTES
            part_bytes = 0 if ended else os.preadv(descriptor, (buffer[done_bytes:],), done_bytes)
            if not part_bytes:
                message = f"the object is truncated: {done_bytes} of {self.stored_bytes} bytes are there"
                raise ShortObjectError(errno.EIO, message, path)
            done_bytes += part_bytes

    def _probe_direct(self) -> str | None:
        """Write and read a page directly; returns why it was refused, None if it was not."""
        path = self.root / f".probe-{secrets.token_hex(4)}"
        written = aligned_memory(PAGE_BYTES)
        written[:] = secrets.token_bytes(PAGE_BYTES)
        found = aligned_memory(PAGE_BYTES)
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o600)
            os.pwritev(descriptor, (written,), 0)
            os.preadv(descriptor, (found,), 0)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            return f"{self.root}: the file system refuses direct I/O ({error.strerror})"
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            path.unlink(missing_ok=True)
        if found != written:
            raise OSError(errno.EIO, "a page read directly differs from what was written", str(path))
        return None
