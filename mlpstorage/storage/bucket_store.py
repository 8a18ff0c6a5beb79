"""Objects appended to files of bounded size, as Mooncake does it.

`bucket-NNNNNNNN` takes up to 256 MB or 500 objects, at offsets that are multiples of a page. Then it is closed to
writes and the next one is begun; nothing is ever written over. The space of a bucket is reserved when it is begun,
where the file system can, so that writes that are under way at once need not wait for each other to make it longer.

Where an object is deleted, or a write is given up, a hole is punched; a file whose last object is gone is removed.
Mooncake itself frees whole buckets only. So does this store where the file system cannot punch holes.

`bucket.index` says which object lies where. After a restart the buckets that are there take no more objects; what of
them no object takes is given back.
"""

import os
import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from mlpstorage.config import PAGE_BYTES, DirectMode, Layout, WriteSync
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import Capacity, padded_bytes
from mlpstorage.storage.fallocate import NO_ROOM, punch_hole, reserve
from mlpstorage.storage.key_table import KeyTable
from mlpstorage.storage.keys import KEY_BYTES, ObjectKeys
from mlpstorage.storage.names import BUCKET_INDEX_NAME, BUCKET_NAME
from mlpstorage.storage.packed_store import PackedStore
from mlpstorage.storage.pending_sync import PendingSync

BUCKET_BYTES = 256_000_000
"""Where a bucket ends, in bytes. Mooncake's default (`BucketBackendConfig::bucket_size_limit`) is called 256 MB and is
256 x 1024 x 1024, 5 % more."""

BUCKET_OBJECTS = 500
"""Where a bucket ends, in objects; Mooncake's default (`BucketBackendConfig::bucket_keys_limit`)."""

OPEN_BUCKETS = 256
"""Files that are held open, beside those in use; what is beyond is opened anew. They are a quarter of the 1,024 files
that a process may usually open, and 64 GB of full buckets."""

_RECORD = struct.Struct(f"<{KEY_BYTES}sQQ")
"""Key, number of the bucket, offset there in bytes."""


class _Bucket:
    """A file of objects.

    Attributes:
        number: Which one.
        given: How many places were given out; none of them is given out again.
        live: How many of these hold an object or are being written.
        descriptor: The open file; -1 where it is not open.
        users: How many transfers use the open file.
        unsynced: What of it is not synced.
    """

    __slots__ = ("descriptor", "given", "live", "number", "unsynced", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.given = 0
        self.live = 0
        self.descriptor = -1
        self.users = 0
        self.unsynced = PendingSync()


class BucketStore(PackedStore):
    """A block store over buckets in the directory `root`; a place is the number of a record of the table.

    Attributes:
        punches_holes: Whether the file system gives back the space of single objects; True until it refuses.
    """

    __slots__ = (
        "_beginning",
        "_bucket_objects",
        "_buckets",
        "_filling",
        "_found_bytes",
        "_free_places",
        "_next_number",
        "_numbers",
        "_offsets",
        "_open",
        "punches_holes",
    )

    def __init__(
        self,
        root: Path,
        keys: ObjectKeys,
        object_bytes: int,
        *,
        direct: DirectMode = DirectMode.AUTO,
        write_sync: WriteSync = WriteSync.NONE,
        bucket_bytes: int = BUCKET_BYTES,
        bucket_objects: int = BUCKET_OBJECTS,
    ) -> None:
        """A bucket ends before `bucket_bytes` or `bucket_objects` are exceeded, but takes one object at least."""
        stored_bytes = padded_bytes(object_bytes)
        sizes = {"stored_bytes": stored_bytes}
        table = KeyTable(root / BUCKET_INDEX_NAME, "bucket index", keys, _RECORD.size, sizes)
        super().__init__(
            root, keys, object_bytes, layout=Layout.BUCKET, table=table, direct=direct, write_sync=write_sync
        )
        self.punches_holes = True
        self._bucket_objects = max(1, min(bucket_objects, bucket_bytes // stored_bytes))
        # Held while a bucket is begun, which is I/O: those that write wait for it, those that read do not.
        self._beginning = threading.Lock()
        self._forget()

    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`; of the file system. What is reserved for a bucket is not free."""
        found = os.statvfs(self.root)
        return Capacity(total_bytes=found.f_blocks * found.f_frsize, free_bytes=found.f_bavail * found.f_frsize)

    def _forget(self) -> None:
        # Of each place, its bucket and its offset there. A place that is free keeps the numbers it had.
        self._numbers, self._offsets = array("Q"), array("Q")
        self._free_places: list[int] = []
        self._buckets: dict[int, _Bucket] = {}
        self._open: OrderedDict[int, _Bucket] = OrderedDict()  # the least recently used first
        self._filling: _Bucket | None = None
        self._next_number = 0
        self._found_bytes: dict[int, int] = {}

    def _open_files(self) -> None:
        """Look at the buckets.

        Raises:
            ConfigurationError: There are some, and the table was cut off: what it no longer names would be removed.
        """
        self._forget()
        with os.scandir(self.root) as entries:
            for entry in entries:
                if BUCKET_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    number = int(entry.name.rpartition("-")[2])
                    self._found_bytes[number] = entry.stat(follow_symlinks=False).st_size
        if self._found_bytes and self._table.is_cut_off():
            raise ConfigurationError(
                f"{self._table.path} was cut off, and without the rest nobody knows what the buckets beside it hold; "
                "remove the directory by hand, or choose another with --cache-dir; nothing was deleted"
            )

    def _adopt(self, place: int, record: bytes) -> bool:
        _, number, offset_bytes = _RECORD.unpack(record)
        missing = place + 1 - len(self._numbers)
        self._numbers.extend([0] * missing)
        self._offsets.extend([0] * missing)
        if offset_bytes % PAGE_BYTES or offset_bytes + self.stored_bytes > self._found_bytes.get(number, 0):
            return False
        self._numbers[place], self._offsets[place] = number, offset_bytes
        bucket = self._buckets.setdefault(number, _Bucket(number))
        bucket.given = self._bucket_objects
        bucket.live += 1
        return True

    def _begin(self) -> None:
        """Give back what of the buckets holds no object, and find the free places."""
        self._next_number = max(self._found_bytes, default=-1) + 1
        taken: dict[int, list[int]] = {number: [] for number in self._found_bytes}
        for place in self._places.values():
            taken[self._numbers[place]].append(self._offsets[place])
        for number, offsets in taken.items():
            if not offsets:
                self._bucket_path(number).unlink(missing_ok=True)
            elif len(offsets) * self.stored_bytes < self._found_bytes[number]:
                self._punch_gaps(number, sorted(offsets))
        places = set(self._places.values())
        self._free_places = [place for place in reversed(range(len(self._numbers))) if place not in places]

    def _punch_gaps(self, number: int, offsets: list[int]) -> None:
        """Punch what lies between the objects of a bucket (`offsets`, ascending) and behind them."""
        begins = [*offsets, self._found_bytes[number]]
        ends = [0, *(offset_bytes + self.stored_bytes for offset_bytes in offsets)]
        descriptor = self._open_file(self._bucket_path(number), 0)
        try:
            for end_bytes, begin_bytes in zip(ends, begins, strict=True):
                self._punch(descriptor, end_bytes, begin_bytes - end_bytes)
        finally:
            os.close(descriptor)

    def _punch(self, descriptor: int, offset_bytes: int, length_bytes: int) -> None:
        if length_bytes > 0 and self.punches_holes:
            self.punches_holes = punch_hole(descriptor, offset_bytes, length_bytes)

    def _close_files(self) -> None:
        for bucket in self._open.values():
            os.close(bucket.descriptor)
        self._forget()

    def _take(self, object_id: int) -> int:
        """The next place of the bucket that is being filled, or the first of a new one."""
        del object_id
        with self._beginning:
            with self._lock:
                bucket = self._filling
                if bucket is not None and bucket.given < self._bucket_objects:
                    return self._take_from(bucket)
            bucket = self._make_bucket()
            with self._lock:
                self._filling = self._buckets[bucket.number] = self._open[bucket.number] = bucket
                place, surplus = self._take_from(bucket), self._take_surplus()
        _close_all(surplus)
        return place

    def _take_from(self, bucket: _Bucket) -> int:
        """Give out a bucket's next place; under the lock."""
        if not self._free_places:
            self._free_places.append(len(self._numbers))
            self._numbers.append(0)
            self._offsets.append(0)
        place = self._free_places.pop()
        self._numbers[place], self._offsets[place] = bucket.number, bucket.given * self.stored_bytes
        bucket.given += 1
        bucket.live += 1
        return place

    def _make_bucket(self) -> _Bucket:
        """Begin a bucket; by one thread at a time."""
        bucket = _Bucket(self._next_number)
        path, size_bytes = self._bucket_path(bucket.number), self._bucket_objects * self.stored_bytes
        bucket.descriptor = self._open_file(path, os.O_CREAT | os.O_EXCL)
        self._next_number += 1
        try:
            if not _is_reserved(bucket.descriptor, size_bytes):
                os.ftruncate(bucket.descriptor, size_bytes)
        except BaseException:
            os.close(bucket.descriptor)
            path.unlink(missing_ok=True)
            raise
        return bucket

    def _give_back(self, place: int) -> None:
        """Punch a hole, or remove the bucket if this was its last object."""
        bucket, offset_bytes = self._buckets[self._numbers[place]], self._offsets[place]
        with self._lock:
            gone = self._remove_if_last(bucket)
        if not gone:
            # The place counts as live meanwhile, so that nobody else removes the bucket.
            descriptor = self._acquire(place)
            try:
                self._punch(descriptor, offset_bytes, self.stored_bytes)
            finally:
                self._release(place)
            with self._lock:
                gone = self._remove_if_last(bucket)
                bucket.live -= not gone
        if gone:
            _close_all([bucket.descriptor])
            self._bucket_path(bucket.number).unlink(missing_ok=True)
        with self._lock:
            self._free_places.append(place)

    def _remove_if_last(self, bucket: _Bucket) -> bool:
        """Forget a bucket that has one live place; under the lock."""
        if bucket.live != 1:
            return False
        del self._buckets[bucket.number]
        self._open.pop(bucket.number, None)
        if self._filling is bucket:
            self._filling = None
        return True

    def _acquire(self, place: int) -> int:
        number = self._numbers[place]
        with self._lock:
            bucket = self._buckets[number]
            bucket.users += 1
            if bucket.descriptor >= 0:
                self._open.move_to_end(number)
                return bucket.descriptor
        try:
            descriptor = self._open_file(self._bucket_path(number), 0)
        except BaseException:
            self._release(place)
            raise
        with self._lock:
            surplus = [descriptor]
            if bucket.descriptor < 0:  # unless another thread was faster
                bucket.descriptor = descriptor
                self._open[number] = bucket
                surplus = self._take_surplus()
            descriptor = bucket.descriptor
        _close_all(surplus)
        return descriptor

    def _take_surplus(self) -> list[int]:
        """Take the files that are to be closed, as too many are open; under the lock."""
        unused = (bucket for bucket in self._open.values() if not bucket.users)
        buckets = list(islice(unused, max(0, len(self._open) - OPEN_BUCKETS)))
        descriptors = [bucket.descriptor for bucket in buckets]
        for bucket in buckets:
            bucket.descriptor = -1
            del self._open[bucket.number]
        return descriptors

    def _release(self, place: int) -> None:
        with self._lock:
            self._buckets[self._numbers[place]].users -= 1

    def _position(self, place: int) -> tuple[int, int]:
        return self._numbers[place], self._offsets[place]

    def _path(self, place: int) -> Path:
        return self._bucket_path(self._numbers[place])

    def _record(self, object_id: int, place: int) -> bytes:
        return _RECORD.pack(self._keys.key(object_id), *self._position(place))

    def _pending(self, place: int) -> PendingSync:
        return self._buckets[self._numbers[place]].unsynced

    def _bucket_path(self, number: int) -> Path:
        return self.root / f"bucket-{number:08d}"


def _is_reserved(descriptor: int, size_bytes: int) -> bool:
    """Try to reserve a bucket's space. Where there is no room for all of it, there may be for some objects."""
    try:
        return reserve(descriptor, size_bytes)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
    return False


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
