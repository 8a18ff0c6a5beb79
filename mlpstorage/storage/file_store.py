"""Objects as files of a file system: one object a file, below directories named by the first digits of its name.

As vLLM, LMCache and SGLang do it: written whole under a temporary name, then renamed; no fsync unless asked for.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

from mlpstorage.config import DirectMode, WriteSync
from mlpstorage.storage.base import Capabilities, Capacity, Listing, Moved, padded_bytes
from mlpstorage.storage.descriptor import DescriptorStore, Transfer, name_place
from mlpstorage.storage.file_listing import ObjectFiles, list_objects
from mlpstorage.storage.keys import KEY_BYTES, ObjectKeys
from mlpstorage.storage.names import HASH_DIGITS
from mlpstorage.storage.page_cache import CachedBytes, cached_bytes
from mlpstorage.storage.probe import probe_access

_EAGER_DIRECTORIES = 1024
"""Up to so many directories are made when the store is opened; of more, each where a write finds it missing."""

_DROPPING_THREADS = 8
_DROPPING_OBJECTS = 64
"""Objects whose pages a thread drops in one go."""

_NO_FILE_OPENED = Moved()


class FileStore(DescriptorStore):
    """A block store over the directory `root`, which `open` creates if need be.

    `WriteSync.FILE` syncs a file's data before it is renamed, `WriteSync.BATCH` leaves that to `sync`. The directory
    entry is not synced in either case: an object that is on stable storage may, after a power failure, be there
    under its temporary name, or not be found at all.

    Attributes:
        root: Directory of the objects. Its parent must exist.
        object_bytes: Bytes of an object's payload.
        stored_bytes: Bytes of an object's file: the payload, padded to full pages.
        direct: Whether files are opened for direct I/O; decided by `open`, never changed later.
        direct_refusal: Why the file system does not take it; None where it does, or was not asked.
    """

    __slots__ = (
        "_below_root",
        "_cached_bytes",
        "_keys",
        "_levels",
        "_mode",
        "_moved",
        "_path_length",
        "_prefix",
        "_read_flags",
        "_sync_files",
        "_temporary_numbers",
        "_token",
        "_write_flags",
        "direct",
        "direct_refusal",
        "object_bytes",
        "root",
        "stored_bytes",
    )

    def __init__(
        self,
        root: Path,
        keys: ObjectKeys,
        object_bytes: int,
        *,
        direct: DirectMode = DirectMode.AUTO,
        write_sync: WriteSync = WriteSync.NONE,
        levels: tuple[int, ...] = (1, 1),
    ) -> None:
        """`levels` are the digits of each level of directories: (1, 1) is x/y/NAME, (3, 2) xxx/yy/NAME, () is flat."""
        self.root = root
        self.object_bytes = object_bytes
        self.stored_bytes = padded_bytes(object_bytes)
        self.direct = False
        self.direct_refusal: str | None = None
        self._keys = keys
        self._levels = levels
        self._mode = direct
        self._sync_files = write_sync is WriteSync.FILE
        self._prefix = str(root)
        # What follows the prefix: "", the digits of each level, the name; joined by "/" this is the end of a path.
        ends = itertools.accumulate(levels, initial=0)
        self._below_root = itemgetter(slice(0), *itertools.starmap(slice, itertools.pairwise(ends)), slice(None))
        self._path_length = len(self._prefix) + 1 + sum(levels) + len(levels) + 2 * KEY_BYTES
        self._read_flags = os.O_RDONLY | os.O_CLOEXEC
        self._write_flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._cached_bytes: CachedBytes = cached_bytes
        self._moved = Moved(direct=False)
        # Ranks that share a directory may write the same object at once: temporary names never meet.
        self._token = secrets.token_hex(4)
        self._temporary_numbers = itertools.count()

    @property
    def capabilities(self) -> Capabilities:
        """See `BlockStore.capabilities`."""
        return Capabilities(
            direct=self.direct, aligned=True, descriptors=True, shared=True, lasting=True, holds_data=True
        )

    def open(self) -> None:
        """Create the directories and find out, by doing it, whether the file system takes direct I/O.

        Raises:
            ConfigurationError: Direct I/O was asked for always and is refused.
            OSError: The directories cannot be created, or the probe fails for another reason than a refusal of
                direct I/O.
        """
        self.root.mkdir(exist_ok=True)
        self._make_directories()
        access = probe_access(self.root, self._mode)
        self.direct, self.direct_refusal, self._cached_bytes = access.direct, access.refusal, access.cached_bytes
        self._moved = Moved(direct=access.direct)
        self._read_flags |= access.flags
        self._write_flags |= access.flags

    def path(self, object_id: int) -> Path:
        """The file that holds an object."""
        return Path(self._path(object_id))

    def where(self, transfer: Transfer) -> str:
        """The object's path."""
        return self._path(transfer.object_id)

    def begin_read(self, object_id: int) -> Transfer:
        """See `DescriptorStore.begin_read`."""
        descriptor = os.open(self._path(object_id), self._read_flags)
        if self.direct:
            return Transfer(object_id, descriptor, 0, None, self._moved)
        try:
            moved = Moved(direct=False, page_cache_bytes=self._cached_bytes(descriptor, 0, self.stored_bytes))
        except BaseException:
            os.close(descriptor)
            raise
        return Transfer(object_id, descriptor, 0, None, moved)

    def end_read(self, transfer: Transfer) -> None:
        """See `DescriptorStore.end_read`."""
        os.close(transfer.descriptor)

    def begin_write(self, object_id: int) -> Transfer:
        """See `DescriptorStore.begin_write`."""
        path = self._path(object_id)
        temporary = f"{path}.{self._token}-{next(self._temporary_numbers)}.tmp"
        try:
            descriptor = os.open(temporary, self._write_flags, 0o644)
        except FileNotFoundError:
            self._make_parents(path)
            descriptor = os.open(temporary, self._write_flags, 0o644)
        return Transfer(object_id, descriptor, 0, temporary, self._moved)

    def commit_write(self, transfer: Transfer) -> None:
        """See `DescriptorStore.commit_write`."""
        temporary = transfer.place
        assert isinstance(temporary, str), "a path, as begin_write gives it"
        try:
            try:
                if self._sync_files:
                    os.fdatasync(transfer.descriptor)
            finally:
                os.close(transfer.descriptor)
            os.rename(temporary, temporary[: self._path_length])  # noqa: PTH104 - a Path costs more than the call
        except BaseException as error:
            _remove(temporary)
            if isinstance(error, OSError):
                name_place(self, transfer, error)
            raise

    def abort_write(self, transfer: Transfer) -> None:
        """See `DescriptorStore.abort_write`."""
        assert isinstance(transfer.place, str), "a path, as begin_write gives it"
        with contextlib.suppress(OSError):  # what made the write fail is the error to tell
            os.close(transfer.descriptor)
        _remove(transfer.place)

    def delete(self, object_id: int) -> Moved:
        """See `BlockStore.delete`."""
        os.unlink(self._path(object_id))  # noqa: PTH108 - a Path costs more than the call
        return _NO_FILE_OPENED

    def sync(self, object_id: int) -> None:
        """See `BlockStore.sync`; by fsync of the object's file."""
        path = self._path(object_id)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(descriptor)

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """See `BlockStore.exists`; by the presence of files, whatever is in them."""
        return [_is_there(self._path(object_id)) for object_id in object_ids]

    def listing(self) -> Listing:
        """See `BlockStore.listing`; nobody may be writing. The order is that of the files' times of modification.

        An object is taken for whole if its file has the right size and the right stamps on its first and last page.
        Also removed, and counted as damaged, is what was being written under a temporary name.

        Raises:
            OSError: A directory or a file cannot be read, or what is damaged cannot be removed.
        """
        return list_objects(
            ObjectFiles(
                root=self._prefix,
                levels=self._levels,
                keys=self._keys,
                stored_bytes=self.stored_bytes,
                path_of=self._path,
                read_flags=self._read_flags,
            )
        )

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:
        """See `BlockStore.drop_page_cache`; by fdatasync, as what is not yet on storage cannot be dropped, and fadvise.

        Pages that another process maps, or that are the storage itself (tmpfs), stay. Direct I/O leaves none to drop.
        """
        if self.direct:
            return 0
        parts = [
            object_ids[first : first + _DROPPING_OBJECTS] for first in range(0, len(object_ids), _DROPPING_OBJECTS)
        ]
        with ThreadPoolExecutor(_DROPPING_THREADS) as threads:
            dropped = [one for part in threads.map(self._drop_part, parts) for one in part]
        known = [one for one in dropped if one is not None]
        return sum(known) if len(known) == len(dropped) else None

    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`; of the file system."""
        found = os.statvfs(self.root)
        return Capacity(total_bytes=found.f_blocks * found.f_frsize, free_bytes=found.f_bavail * found.f_frsize)

    def flush(self) -> None:
        """Make durable what was written, for a cache that is kept: one sync of the whole file system."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(self.root))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing to do: between two calls no file is open."""

    def _path(self, object_id: int) -> str:
        return self._prefix + "/".join(self._below_root(self._keys.name(object_id)))

    def _make_directories(self) -> None:
        """Make all hash directories, unless they are many."""
        ends = list(itertools.accumulate(self._levels))
        if sum(len(HASH_DIGITS) ** end for end in ends) > _EAGER_DIRECTORIES:
            return
        parents = [self.root]
        for digits in self._levels:
            names = list(map("".join, itertools.product(HASH_DIGITS, repeat=digits)))
            parents = [parent / name for parent in parents for name in names]
            for directory in parents:
                directory.mkdir(exist_ok=True)

    def _make_parents(self, path: str) -> None:
        """Make the directories between the root and an object, as far as they are missing."""
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the directory of the objects is gone", self._prefix)
        for cut in range(len(self._levels)):
            with contextlib.suppress(FileExistsError):
                Path(path).parents[len(self._levels) - 1 - cut].mkdir()

    def _drop_part(self, object_ids: Sequence[int]) -> list[int | None]:
        return [self._drop(object_id) for object_id in object_ids]

    def _drop(self, object_id: int) -> int | None:
        """Drop an object's pages; returns the bytes that were cached and are no longer."""
        path = self._path(object_id)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            before_bytes = self._cached_bytes(descriptor, 0, self.stored_bytes)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            after_bytes = self._cached_bytes(descriptor, 0, self.stored_bytes)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(descriptor)
        return None if before_bytes is None or after_bytes is None else before_bytes - after_bytes


def _is_there(path: str) -> bool:
    try:
        os.stat(path)  # noqa: PTH116 - a Path costs more than the call
    except FileNotFoundError:
        return False
    return True


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # what made the write fail is the error to tell
        os.unlink(path)  # noqa: PTH108 - a Path costs more than the call
