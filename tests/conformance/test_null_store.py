"""Layout `null` passes the suite, as far as a store without data can."""

from pathlib import Path

from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.null_store import NullStore
from mlpstorage.testing.conformance import BlockStoreSuite


class TestNullStore(BlockStoreSuite):
    """Without a limit."""

    raw_access = False

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del place, objects
        return NullStore(keys, object_bytes)


class TestLimitedNullStore(BlockStoreSuite):
    """With room for so many objects."""

    raw_access = False
    largest_bytes = 2 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del place
        return NullStore(keys, object_bytes, limit_objects=objects)
