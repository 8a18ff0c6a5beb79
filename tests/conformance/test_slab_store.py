"""Layout `slab` passes the suite: directly, and through the page cache with every write synced."""

from pathlib import Path

import pytest

from mlpstorage.config import DirectMode, WriteSync
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.testing.conformance import BlockStoreSuite
from mlpstorage.testing.suite_hooks import OBJECTS, OpenStore, has_fixed_room


class TestSlabStore(BlockStoreSuite):
    """As the product opens it."""

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        return SlabStore(place, keys, object_bytes, slots=objects)

    def test_is_not_skipped(self, open_store: OpenStore) -> None:
        """The store has the capabilities and the fixed room that tests of the suite ask for."""
        store = open_store()
        assert store.capabilities.aligned
        assert store.capabilities.descriptors
        assert store.capabilities.lasting
        assert store.capabilities.holds_data
        assert has_fixed_room(store, OBJECTS)


class TestBufferedSlabStore(BlockStoreSuite):
    """Through the page cache, each write synced."""

    largest_bytes = 2 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        direct, write_sync = DirectMode.NEVER, WriteSync.FILE
        return SlabStore(place, keys, object_bytes, slots=objects, direct=direct, write_sync=write_sync)

    def test_is_buffered(self, open_store: OpenStore) -> None:
        """The class tests what it says."""
        assert not open_store().capabilities.direct


class TestSlabStoreInMemory(BlockStoreSuite):
    """On tmpfs, synced in batches."""

    largest_bytes = 2 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        return SlabStore(place, keys, object_bytes, slots=objects, write_sync=WriteSync.BATCH)

    @pytest.fixture
    def place(self, tmpfs: Path) -> Path:
        """A directory of a file system in memory."""
        return tmpfs / "store place"
