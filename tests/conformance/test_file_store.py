"""Layout `file` passes the suite: directly, through the page cache, synced, and at several depths of directories."""

from pathlib import Path

import pytest

from mlpstorage.config import DirectMode, WriteSync
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.conformance import BlockStoreSuite
from mlpstorage.testing.suite_hooks import OpenStore


class TestFileStore(BlockStoreSuite):
    """As the product opens it, with two levels of directories."""

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return FileStore(place, keys, object_bytes)

    def test_is_not_skipped(self, open_store: OpenStore) -> None:
        """The store has every capability that tests of the suite ask for."""
        capabilities = open_store().capabilities
        assert capabilities.aligned
        assert capabilities.descriptors
        assert capabilities.shared
        assert capabilities.lasting
        assert capabilities.holds_data


class TestBufferedFileStore(BlockStoreSuite):
    """Through the page cache, each file synced, in one flat directory."""

    largest_bytes = 32 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        direct, write_sync = DirectMode.NEVER, WriteSync.FILE
        return FileStore(place, keys, object_bytes, direct=direct, write_sync=write_sync, levels=())

    def test_is_buffered(self, open_store: OpenStore) -> None:
        """The class tests what it says."""
        assert not open_store().capabilities.direct


class TestDeepFileStore(BlockStoreSuite):
    """Directories of three and two digits, made as they are needed; what was written is synced later."""

    largest_bytes = 2 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return FileStore(place, keys, object_bytes, write_sync=WriteSync.BATCH, levels=(3, 2))


class TestFileStoreInMemory(BlockStoreSuite):
    """On tmpfs, which takes direct I/O or refuses it, depending on the kernel; nothing of it is on a device."""

    largest_bytes = 2 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return FileStore(place, keys, object_bytes)

    @pytest.fixture
    def place(self, tmpfs: Path) -> Path:
        """A directory of a file system in memory."""
        return tmpfs / "store place"
