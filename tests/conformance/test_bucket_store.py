"""Layout `bucket` passes the suite: directly, and through the page cache, with buckets of a few objects."""

from pathlib import Path

import pytest

from mlpstorage.config import DirectMode, WriteSync
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.bucket_store import BucketStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.conformance import BlockStoreSuite
from mlpstorage.testing.suite_hooks import OpenStore


class BucketSuite(BlockStoreSuite):
    """The hooks of a store that begins files as it needs them, and keeps a table of what is in them."""

    def raw_things(self, place: Path) -> list[str]:
        """See `StoreHooks.raw_things`; without the files of the store itself, which its own writes make and resize."""
        return [thing for thing in super().raw_things(place) if not thing.startswith("bucket")]


class TestBucketStore(BucketSuite):
    """As the product opens it: every object of a test in one bucket."""

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return BucketStore(place, keys, object_bytes)

    def test_is_not_skipped(self, open_store: OpenStore) -> None:
        """The store has the capabilities that tests of the suite ask for."""
        capabilities = open_store().capabilities
        assert capabilities.aligned
        assert capabilities.descriptors
        assert capabilities.lasting
        assert capabilities.holds_data


class TestSmallBuckets(BucketSuite):
    """Three objects a bucket, through the page cache, each write synced."""

    largest_bytes = 2 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        direct, write_sync = DirectMode.NEVER, WriteSync.FILE
        return BucketStore(place, keys, object_bytes, direct=direct, write_sync=write_sync, bucket_objects=3)


class TestBucketStoreInMemory(BucketSuite):
    """On tmpfs, one object a bucket, synced in batches."""

    largest_bytes = 2 << 20

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return BucketStore(place, keys, object_bytes, write_sync=WriteSync.BATCH, bucket_objects=1)

    @pytest.fixture
    def place(self, tmpfs: Path) -> Path:
        """A directory of a file system in memory."""
        return tmpfs / "store place"
