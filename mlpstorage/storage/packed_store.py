"""Stores that keep many objects in one file: what the layouts `slab` and `bucket` have in common.

An object lies at a *place*, which has a number; a table on storage (`storage.key_table`) says which object each place
holds. A place is written, then entered in the table; it is taken out of the table, then given back. So a process that
is killed leaves a table in which each object is whole. After a power failure a place may hold something else than the
table says, which `listing` finds by the stamps.

An object that is replaced gets another place, so that readers see the old one, whole, until the new one is written. A
place that is being read is given back when the last of its readers has ended, whoever deletes its object meanwhile.
"""

import contextlib
import errno
import os
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlpstorage.config import PAGE_BYTES, DirectMode, Layout, WriteSync
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import Capabilities, Capacity, Listing, Moved, aligned_memory, padded_bytes
from mlpstorage.storage.descriptor import DescriptorStore, Transfer, name_place
from mlpstorage.storage.key_table import KeyTable
from mlpstorage.storage.keys import KEY_BYTES, STAMP_BYTES, ObjectKeys
from mlpstorage.storage.names import LEAF_NAMES, PROBE_NAME
from mlpstorage.storage.page_cache import CachedBytes, cached_bytes
from mlpstorage.storage.pending_sync import PendingSync
from mlpstorage.storage.probe import probe_access

_LISTING_THREADS = 8
_LISTING_OBJECTS = 256
"""Objects that a thread looks at in one go."""

_NO_FILE_OPENED = Moved()


class PackedStore(DescriptorStore):
    """A block store over files of the directory `root`, which `open` creates if need be, for one process at a time.

    Whoever opens it must hold the directory (`storage.cache_dir`): two processes on it would overwrite each other.

    Attributes:
        root: Directory of the files. Its parent must exist.
        object_bytes: Bytes of an object's payload.
        stored_bytes: Bytes of an object's place: the payload, padded to full pages.
        direct: Whether files are opened for direct I/O; decided by `open`, never changed later.
        direct_refusal: Why the file system does not take it; None where it does, or was not asked.
    """

    __slots__ = (
        "_cached_bytes",
        "_damaged",
        "_keys",
        "_layout",
        "_lock",
        "_mode",
        "_moved",
        "_places",
        "_readers",
        "_table",
        "_unread",
        "_write_sync",
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
        layout: Layout,
        table: KeyTable,
        direct: DirectMode,
        write_sync: WriteSync,
    ) -> None:
        self.root = root
        self.object_bytes = object_bytes
        self.stored_bytes = padded_bytes(object_bytes)
        self.direct = False
        self.direct_refusal: str | None = None
        self._keys = keys
        self._layout = layout
        self._table = table
        self._mode = direct
        self._write_sync = write_sync
        self._cached_bytes: CachedBytes = cached_bytes
        self._moved = Moved(direct=False)
        self._damaged = 0
        # One lock for what follows, and for what subclasses keep of places. No I/O is done under it.
        self._lock = threading.Lock()
        self._places: dict[int, int] = {}  # object id to place, in the order in which they were written
        self._readers: dict[int, int] = {}  # places that are being read, and by how many
        self._unread: set[int] = set()  # places to be given back when the last reader has ended

    @abstractmethod
    def _open_files(self) -> None:
        """Open or look at the files that are there; before the table is read."""

    @abstractmethod
    def _adopt(self, place: int, record: bytes) -> bool:
        """Take up a place from the table; False where the files do not reach so far."""

    @abstractmethod
    def _begin(self) -> None:
        """Make ready for use; after the table was read."""

    @abstractmethod
    def _close_files(self) -> None:
        """Close all files."""

    @abstractmethod
    def _take(self, object_id: int) -> int:
        """A place for an object that is to be written."""

    @abstractmethod
    def _give_back(self, place: int) -> None:
        """Give back a place that is in no table and that nobody reads."""

    @abstractmethod
    def _acquire(self, place: int) -> int:
        """The open file of a place; to be ended by `_release`."""

    @abstractmethod
    def _release(self, place: int) -> None:
        """Let go of what `_acquire` took."""

    @abstractmethod
    def _position(self, place: int) -> tuple[int, int]:
        """The number of the file of a place and its offset there, in bytes; ascending in the order of writing."""

    @abstractmethod
    def _path(self, place: int) -> Path:
        """The file of a place."""

    @abstractmethod
    def _record(self, object_id: int, place: int) -> bytes:
        """What the table holds of an object."""

    @abstractmethod
    def _pending(self, place: int) -> PendingSync:
        """What of the file of a place is not synced."""

    @abstractmethod
    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`."""

    @property
    def capabilities(self) -> Capabilities:
        """See `BlockStore.capabilities`. What is where is known in memory: other processes see nothing of it."""
        return Capabilities(
            direct=self.direct, aligned=True, descriptors=True, shared=False, lasting=True, holds_data=True
        )

    def open(self) -> None:
        """Make or open the files, find out whether the file system takes direct I/O, and read the table.

        Raises:
            ConfigurationError: What is there is of other sizes or namespaces; or direct I/O was asked for always and is
                refused.
            OSError: The files cannot be made or read.
        """
        self.close()
        self.root.mkdir(exist_ok=True)
        access = probe_access(self.root, self._mode)
        self.direct, self.direct_refusal, self._cached_bytes = access.direct, access.refusal, access.cached_bytes
        self._moved = Moved(direct=access.direct)
        self._refuse_lost_table()
        try:
            self._table.open()
            self._open_files()
            self._read_table()
            self._begin()
        except BaseException:
            self.close()
            raise

    def _refuse_lost_table(self) -> None:
        """Refuse files of objects without the table that says what is in them: opening would delete them."""
        table = self._table.path
        if table.is_file() and table.stat().st_size:
            return
        with os.scandir(self.root) as entries:
            for entry in entries:
                is_ours = entry.name != table.name and LEAF_NAMES[self._layout].fullmatch(entry.name)
                if is_ours and entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size:
                    raise ConfigurationError(
                        f"{table} is missing or empty, and without it nobody knows what {entry.name} beside it holds; "
                        "remove the directory by hand, or choose another with --cache-dir; nothing was deleted"
                    )

    def where(self, transfer: Transfer) -> str:
        """The object's file, and where in it the object begins."""
        assert isinstance(transfer.place, int), "a place, as begin_read and begin_write give it"
        return f"{self._path(transfer.place)} at byte {transfer.offset_bytes}"

    def begin_read(self, object_id: int) -> Transfer:
        """See `DescriptorStore.begin_read`."""
        place, descriptor = self._pin(object_id)
        _, offset_bytes = self._position(place)
        if self.direct:
            return Transfer(object_id, descriptor, offset_bytes, place, self._moved)
        try:
            found_bytes = self._cached_bytes(descriptor, offset_bytes, self.stored_bytes)
        except BaseException:
            self._unpin(place)
            raise
        return Transfer(object_id, descriptor, offset_bytes, place, Moved(direct=False, page_cache_bytes=found_bytes))

    def end_read(self, transfer: Transfer) -> None:
        """See `DescriptorStore.end_read`."""
        assert isinstance(transfer.place, int), "a place, as begin_read gives it"
        self._unpin(transfer.place)

    def begin_write(self, object_id: int) -> Transfer:
        """See `DescriptorStore.begin_write`.

        Raises:
            StoreFullError: There is no place.
        """
        place = self._take(object_id)
        try:
            descriptor = self._acquire(place)
        except BaseException:
            self._give_back(place)
            raise
        _, offset_bytes = self._position(place)
        return Transfer(object_id, descriptor, offset_bytes, place, self._moved)

    def commit_write(self, transfer: Transfer) -> None:
        """See `DescriptorStore.commit_write`."""
        object_id, place = transfer.object_id, transfer.place
        assert isinstance(place, int), "a place, as begin_write gives it"
        try:
            if self._write_sync is WriteSync.FILE:
                os.fdatasync(transfer.descriptor)
            # A process that is killed between this and the removal of the old record leaves the object twice, both
            # whole; reading the table takes one of them.
            self._table.put(place, self._record(object_id, place))
        except BaseException as error:
            self.abort_write(transfer)
            if isinstance(error, OSError):
                name_place(self, transfer, error)
            raise
        if self._write_sync is WriteSync.BATCH:
            self._pending(place).add(object_id)
        self._release(place)
        with self._lock:
            replaced = self._places.pop(object_id, None)
            self._places[object_id] = place
        if replaced is not None:
            self._retire(replaced)

    def abort_write(self, transfer: Transfer) -> None:
        """See `DescriptorStore.abort_write`."""
        assert isinstance(transfer.place, int), "a place, as begin_write gives it"
        self._release(transfer.place)
        with contextlib.suppress(OSError):  # what made the write fail is the error to tell
            self._give_back(transfer.place)

    def delete(self, object_id: int) -> Moved:
        """See `BlockStore.delete`. What fails leaves a place that is not used again."""
        with self._lock:
            place = self._places.pop(object_id, None)
        if place is None:
            raise self._missing(object_id)
        self._retire(place)
        return _NO_FILE_OPENED

    def sync(self, object_id: int) -> None:
        """See `BlockStore.sync`; by fdatasync of the object's file, which covers all that was written to it before.

        Where writes are not synced in batches nobody keeps count of them: the file is synced at each call. With
        `WriteSync.FILE` there is nothing left to do.
        """
        with self._pinned(object_id) as (place, descriptor):
            try:
                if self._write_sync is WriteSync.BATCH:
                    self._pending(place).sync(object_id, descriptor)
                elif self._write_sync is WriteSync.NONE:
                    os.fdatasync(descriptor)
            except OSError as error:
                error.filename = str(self._path(place))
                raise

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """See `BlockStore.exists`; from memory."""
        return [object_id in self._places for object_id in object_ids]

    def listing(self) -> Listing:
        """See `BlockStore.listing`; from the table, each object checked by the stamps of its first and last page.

        Also counted as damaged is what `open` found to lie beyond the end of its file.

        Raises:
            OSError: A file cannot be read.
        """
        objects = list(self._places.items())
        parts = [objects[first : first + _LISTING_OBJECTS] for first in range(0, len(objects), _LISTING_OBJECTS)]
        with ThreadPoolExecutor(_LISTING_THREADS) as threads:
            broken = [object_id for part in threads.map(self._broken, parts) for object_id in part]
        for object_id in broken:
            self.delete(object_id)
        damaged, self._damaged = self._damaged + len(broken), 0
        return Listing(object_ids=tuple(self._places), damaged=damaged, foreign=self._count_foreign())

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:
        """See `BlockStore.drop_page_cache`; by fdatasync, as what is not yet on storage cannot be dropped, and fadvise.

        Pages that another process maps, or that are the storage itself (tmpfs), stay. Direct I/O leaves none to drop.
        """
        if self.direct:
            return 0
        dropped: list[int | None] = []
        synced: set[Path] = set()
        for object_id in object_ids:
            with contextlib.suppress(FileNotFoundError), self._for_dropping(object_id) as (place, descriptor):
                if self._path(place) not in synced:
                    os.fdatasync(descriptor)
                    synced.add(self._path(place))
                dropped.append(self._drop(descriptor, self._position(place)[1]))
        known = [one for one in dropped if one is not None]
        return sum(known) if len(known) == len(dropped) else None

    def _for_dropping(self, object_id: int) -> contextlib.AbstractContextManager[tuple[int, int]]:
        """The place of an object and its open file, to drop its pages."""
        return self._pinned(object_id)

    def flush(self) -> None:
        """Make durable what was written, and the table: for a cache that is kept."""
        for path in {self._path(place) for place in self._places.values()}:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._table.flush()

    def close(self) -> None:
        """See `BlockStore.close`."""
        self._close_files()
        self._table.close()
        self._places = {}

    def _open_file(self, path: Path, flags: int) -> int:
        """Open a file of places for reading and writing."""
        flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
        descriptor = os.open(path, flags, 0o644)
        if not self.direct:
            # What is read ahead would be the neighbour of an object, whose own read would then be from memory.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def _read_table(self) -> None:
        """Take up all objects of the table that the files reach to; of an object that is there twice, a whole one."""
        self._damaged, self._places, self._readers, self._unread = 0, {}, {}, set()
        for place, record in self._table.records():
            object_id = self._keys.object_id(record[:KEY_BYTES])
            if object_id is None or not self._adopt(place, record):
                self._table.clear(place)
                self._damaged += 1
                continue
            earlier = self._places.setdefault(object_id, place)
            if earlier != place:
                keep_earlier = not self._broken([(object_id, earlier)])
                self._places[object_id] = earlier if keep_earlier else place
                self._retire(place if keep_earlier else earlier)
        self._places = dict(sorted(self._places.items(), key=lambda item: self._position(item[1])))

    def _pin(self, object_id: int) -> tuple[int, int]:
        """An object's place, which is not given back before `_unpin`, and its open file."""
        with self._lock:
            place = self._places.get(object_id)
            if place is not None:
                self._readers[place] = self._readers.get(place, 0) + 1
        if place is None:
            raise self._missing(object_id)
        try:
            return place, self._acquire(place)
        except BaseException:
            self._end_reader(place)
            raise

    def _unpin(self, place: int) -> None:
        self._release(place)
        self._end_reader(place)

    @contextlib.contextmanager
    def _pinned(self, object_id: int) -> Iterator[tuple[int, int]]:
        place, descriptor = self._pin(object_id)
        try:
            yield place, descriptor
        finally:
            self._unpin(place)

    def _end_reader(self, place: int) -> None:
        with self._lock:
            left = self._readers[place] - 1
            if left:
                self._readers[place] = left
                return
            del self._readers[place]
            if place not in self._unread:
                return
            self._unread.remove(place)
        self._give_back(place)

    def _retire(self, place: int) -> None:
        """Take a place out of the table, and give it back as soon as nobody reads it."""
        self._table.clear(place)
        with self._lock:
            if place in self._readers:
                self._unread.add(place)
                return
        self._give_back(place)

    def _broken(self, objects: Sequence[tuple[int, int]]) -> list[int]:
        """Those objects that are not whole."""
        page = aligned_memory(PAGE_BYTES)
        return [object_id for object_id, place in objects if not self._is_whole(object_id, place, page)]

    def _is_whole(self, object_id: int, place: int, page: memoryview) -> bool:
        """Whether the first and the last page of a place bear the object's stamp and their numbers, of any write."""
        stamp = self._keys.key(object_id)[:STAMP_BYTES]
        _, offset_bytes = self._position(place)
        descriptor = self._acquire(place)
        try:
            for number in sorted({0, self.stored_bytes // PAGE_BYTES - 1}):
                found_bytes = os.preadv(descriptor, (page,), offset_bytes + number * PAGE_BYTES)
                if found_bytes != PAGE_BYTES or page[:12] != stamp + number.to_bytes(4, "little"):
                    return False
        except OSError as error:
            error.filename = str(self._path(place))
            raise
        finally:
            self._release(place)
        return True

    def _drop(self, descriptor: int, offset_bytes: int) -> int | None:
        """Drop a place's pages; returns the bytes that were cached and are no longer."""
        part = descriptor, offset_bytes, self.stored_bytes
        before_bytes = self._cached_bytes(*part)
        os.posix_fadvise(*part, os.POSIX_FADV_DONTNEED)
        after_bytes = self._cached_bytes(*part)
        return None if before_bytes is None or after_bytes is None else before_bytes - after_bytes

    def _count_foreign(self) -> int:
        """Count what is in the directory and not the store's; a probe of a process that died is removed."""
        foreign = 0
        with os.scandir(self.root) as entries:
            for entry in entries:
                is_file = entry.is_file(follow_symlinks=False)
                if is_file and PROBE_NAME.fullmatch(entry.name):
                    (self.root / entry.name).unlink(missing_ok=True)
                elif not is_file or not LEAF_NAMES[self._layout].fullmatch(entry.name):
                    foreign += 1
        return foreign

    def _missing(self, object_id: int) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "there is no such object", f"{self.root}: object {object_id}")
