"""The reference block store: a dictionary. The conformance suite is tried on it first."""

import errno
import threading
from collections.abc import Sequence

from mlpstorage.storage.base import (
    Capabilities,
    Capacity,
    Listing,
    Moved,
    StoreFullError,
    padded_bytes,
)
from mlpstorage.storage.keys import ObjectKeys


class MemoryStore:
    """A block store in the memory of the process, gone with it.

    Args:
        keys: Names of the objects.
        object_bytes: Bytes of an object's payload.
        limit_objects: How many objects there is room for; None for as many as memory holds.
    """

    __slots__ = ("_keys", "_limit_objects", "_lock", "_objects", "object_bytes", "stored_bytes")

    def __init__(self, keys: ObjectKeys, object_bytes: int, *, limit_objects: int | None = None) -> None:
        self.object_bytes = object_bytes
        self.stored_bytes = padded_bytes(object_bytes)
        self._keys = keys
        self._limit_objects = limit_objects
        self._lock = threading.Lock()
        self._objects: dict[bytes, bytes] = {}

    @property
    def capabilities(self) -> Capabilities:
        """See `BlockStore.capabilities`."""
        return Capabilities(
            direct=False, aligned=False, descriptors=False, shared=False, lasting=False, holds_data=True
        )

    def open(self) -> None:
        """See `BlockStore.open`."""

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.read`."""
        content = self._objects.get(self._keys.key(object_id))
        if content is None:
            raise _missing(object_id)
        buffer[:] = content
        return Moved()

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.write`.

        Raises:
            StoreFullError: There is no room for one more object.
        """
        key, content = self._keys.key(object_id), bytes(buffer)
        with self._lock:
            if key not in self._objects and len(self._objects) == self._limit_objects:
                raise StoreFullError(errno.ENOSPC, f"all {self._limit_objects} places are taken")
            self._objects.pop(key, None)
            self._objects[key] = content
        return Moved()

    def delete(self, object_id: int) -> Moved:
        """See `BlockStore.delete`."""
        if self._objects.pop(self._keys.key(object_id), None) is None:
            raise _missing(object_id)
        return Moved()

    def sync(self, object_id: int) -> None:
        """See `BlockStore.sync`; there is no storage to wait for."""

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """See `BlockStore.exists`."""
        return [self._keys.key(object_id) in self._objects for object_id in object_ids]

    def listing(self) -> Listing:
        """See `BlockStore.listing`."""
        found = [self._keys.object_id(key) for key in self._objects]
        return Listing(object_ids=tuple(one for one in found if one is not None), damaged=0, foreign=0)

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:  # noqa: ARG002 - the contract's name
        """See `BlockStore.drop_page_cache`; there is none."""
        return 0

    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`."""
        if self._limit_objects is None:
            return Capacity(total_bytes=None, free_bytes=None)
        free_objects = self._limit_objects - len(self._objects)
        return Capacity(
            total_bytes=self._limit_objects * self.stored_bytes, free_bytes=free_objects * self.stored_bytes
        )

    def close(self) -> None:
        """See `BlockStore.close`."""


def _missing(object_id: int) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such object", f"object {object_id}")
