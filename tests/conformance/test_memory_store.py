"""The reference store passes the suite: the suite asks for nothing that a plain dictionary cannot give."""

from pathlib import Path

from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.conformance import BlockStoreSuite
from mlpstorage.testing.memory_store import MemoryStore


class TestMemoryStore(BlockStoreSuite):
    """Objects in a dictionary, without a limit."""

    raw_access = False

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del place, objects
        return MemoryStore(keys, object_bytes)


class TestLimitedMemoryStore(BlockStoreSuite):
    """Objects in a dictionary of so many places."""

    raw_access = False

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del place
        return MemoryStore(keys, object_bytes, limit_objects=objects)
