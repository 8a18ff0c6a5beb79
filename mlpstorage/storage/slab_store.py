"""Objects in the slots of one preallocated file, as 3FS and KVBM do it.

`slab` has a fixed number of slots of equal size, which begin and end at pages. All its space is reserved at the start,
no write changes its size, and a delete moves nothing. `slab.index` says which object each slot holds.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mlpstorage.config import DirectMode, Layout, WriteSync
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import Capacity, StoreFullError, padded_bytes
from mlpstorage.storage.fallocate import NO_ROOM, reserve
from mlpstorage.storage.key_table import KeyTable
from mlpstorage.storage.keys import KEY_BYTES, ObjectKeys
from mlpstorage.storage.names import SLAB_INDEX_NAME, SLAB_NAME
from mlpstorage.storage.packed_store import PackedStore
from mlpstorage.storage.pending_sync import PendingSync


class SlabStore(PackedStore):
    """A block store over a slab in the directory `root`; a place is the number of a slot.

    The slot that was freed last is used first: that takes constant time, and of the file no more slots are ever written
    than objects were there at once. An object that is replaced gets another slot while one is free; where none is, its
    old version is removed first and its own slot written over, so that in between readers find no such object.

    Attributes:
        allocation_refusal: Why the slab's space is not reserved, in which case a write may find the file system full;
            None where it is. Decided by `open`.
    """

    __slots__ = ("_descriptor", "_found_bytes", "_free", "_slab_path", "_slots", "_unsynced", "allocation_refusal")

    def __init__(
        self,
        root: Path,
        keys: ObjectKeys,
        object_bytes: int,
        *,
        slots: int,
        direct: DirectMode = DirectMode.AUTO,
        write_sync: WriteSync = WriteSync.NONE,
    ) -> None:
        sizes = {"slots": slots, "stored_bytes": padded_bytes(object_bytes)}
        table = KeyTable(root / SLAB_INDEX_NAME, "slab index", keys, KEY_BYTES, sizes)
        super().__init__(
            root, keys, object_bytes, layout=Layout.SLAB, table=table, direct=direct, write_sync=write_sync
        )
        self.allocation_refusal: str | None = None
        self._slots = slots
        self._slab_path = root / SLAB_NAME
        self._descriptor = -1
        self._found_bytes = 0
        self._free: list[int] = []  # the next slot to be used comes last
        self._unsynced = PendingSync()

    @property
    def prompt(self) -> bool:
        """See `DescriptorStore.prompt`: but for syncs, what is done beside transfers is a few bytes in the index."""
        return self._write_sync is not WriteSync.FILE

    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`; of the slab. A slot that is being written, or deleted but still read, is taken."""
        return Capacity(total_bytes=self._slots * self.stored_bytes, free_bytes=len(self._free) * self.stored_bytes)

    def _open_files(self) -> None:
        self._descriptor = self._open_file(self._slab_path, os.O_CREAT)
        self._found_bytes = os.fstat(self._descriptor).st_size

    def _adopt(self, place: int, record: bytes) -> bool:
        del record
        return place < self._slots and (place + 1) * self.stored_bytes <= self._found_bytes

    def _begin(self) -> None:
        """Reserve the slab's space, also what was cut off, and find the free slots.

        Raises:
            ConfigurationError: There is not enough.
        """
        needed_bytes = self._slots * self.stored_bytes
        try:
            self._table.reserve(self._slots)
            reserved = reserve(self._descriptor, needed_bytes)
        except OSError as error:
            if error.errno not in NO_ROOM:
                error.filename = str(self._slab_path)
                raise
            raise ConfigurationError(
                f"{self._slab_path}: {self._slots} slots of {self.stored_bytes} bytes need {needed_bytes} bytes "
                f"({error.strerror}); give a smaller --storage-gb, or another --cache-dir"
            ) from error
        self.allocation_refusal = None
        if not reserved:
            self.allocation_refusal = f"{self.root}: the file system cannot reserve space for a file"
            os.ftruncate(self._descriptor, needed_bytes)
        taken = set(self._places.values())
        self._free = [slot for slot in reversed(range(self._slots)) if slot not in taken]

    def _close_files(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _take(self, object_id: int) -> int:
        """A free slot; where there is none, the object's own, unless it is being read.

        Raises:
            StoreFullError: There is none.
        """
        with self._lock:
            if self._free:
                return self._free.pop()
            place = self._places.get(object_id)
            if place is None or place in self._readers:
                raise StoreFullError(errno.ENOSPC, f"all {self._slots} slots are taken", str(self._slab_path))
            del self._places[object_id]
        self._table.clear(place)
        return place

    def _give_back(self, place: int) -> None:
        with self._lock:
            self._free.append(place)

    def _acquire(self, place: int) -> int:
        del place
        return self._descriptor

    def _release(self, place: int) -> None:
        """Nothing to do: the slab stays open."""

    @contextlib.contextmanager
    def _for_dropping(self, object_id: int) -> Iterator[tuple[int, int]]:
        """Without holding the slot: it may be written anew meanwhile, and to drop those pages does no harm."""
        place = self._places.get(object_id)
        if place is None:
            raise self._missing(object_id)
        yield place, self._descriptor

    def _position(self, place: int) -> tuple[int, int]:
        return 0, place * self.stored_bytes

    def _path(self, place: int) -> Path:
        del place
        return self._slab_path

    def _record(self, object_id: int, place: int) -> bytes:
        del place
        return self._keys.key(object_id)

    def _pending(self, place: int) -> PendingSync:
        del place
        return self._unsynced
