"""No storage: objects are remembered, their bytes are not. What remains to be measured is the client itself."""

import errno
import threading
from collections.abc import Sequence

from mlpstorage.storage.base import Capabilities, Capacity, Listing, Moved, StoreFullError, padded_bytes
from mlpstorage.storage.keys import ObjectKeys

_NOTHING_MOVED = Moved()


class NullStore:
    """A block store that keeps which objects are there and moves no bytes; buffers are neither read nor filled.

    Args:
        keys: Names of the objects, for messages.
        object_bytes: Bytes of an object's payload.
        limit_objects: How many objects there is room for; None for as many as come.
    """

    __slots__ = ("_keys", "_limit_objects", "_lock", "_objects", "object_bytes", "stored_bytes")

    def __init__(self, keys: ObjectKeys, object_bytes: int, *, limit_objects: int | None = None) -> None:
        self.object_bytes = object_bytes
        self.stored_bytes = padded_bytes(object_bytes)
        self._keys = keys
        self._limit_objects = limit_objects
        self._lock = threading.Lock()  # for writes, of which each is several steps
        self._objects: dict[int, None] = {}  # in the order of writing

    @property
    def capabilities(self) -> Capabilities:
        """See `BlockStore.capabilities`."""
        return Capabilities(
            direct=False, aligned=False, descriptors=False, shared=False, lasting=False, holds_data=False
        )

    def open(self) -> None:
        """See `BlockStore.open`."""

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.read`; the buffer stays as it is."""
        del buffer
        if object_id not in self._objects:
            raise self._missing(object_id)
        return _NOTHING_MOVED

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.write`; the buffer is not looked at.

        Raises:
            StoreFullError: There is no room for one more object.
        """
        del buffer
        with self._lock:
            replaces = object_id in self._objects
            if not replaces and len(self._objects) == self._limit_objects:
                raise StoreFullError(errno.ENOSPC, f"there is room for {self._limit_objects} objects and no more")
            self._objects.pop(object_id, None)
            self._objects[object_id] = None
        return _NOTHING_MOVED

    def delete(self, object_id: int) -> Moved:
        """See `BlockStore.delete`."""
        try:
            del self._objects[object_id]
        except KeyError:
            raise self._missing(object_id) from None
        return _NOTHING_MOVED

    def sync(self, object_id: int) -> None:
        """See `BlockStore.sync`; there is nothing to wait for."""

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """See `BlockStore.exists`."""
        return [object_id in self._objects for object_id in object_ids]

    def listing(self) -> Listing:
        """See `BlockStore.listing`; only what this store itself was given."""
        return Listing(object_ids=tuple(self._objects), damaged=0, foreign=0)

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:
        """See `BlockStore.drop_page_cache`; nothing is cached."""
        del object_ids
        return 0

    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`; unknown where there is no limit."""
        limit = self._limit_objects
        if limit is None:
            return Capacity(total_bytes=None, free_bytes=None)
        total_bytes = limit * self.stored_bytes
        return Capacity(total_bytes=total_bytes, free_bytes=total_bytes - len(self._objects) * self.stored_bytes)

    def close(self) -> None:
        """See `BlockStore.close`."""

    def _missing(self, object_id: int) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "there is no such object", self._keys.name(object_id))
