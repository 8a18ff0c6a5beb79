"""Layout `object` passes the suite against a real S3 server: as it is, and with parts and ranges."""

import os
from hashlib import blake2b
from pathlib import Path

import pytest

from mlpstorage.config import MIB
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.object_store import ObjectStore
from mlpstorage.testing.conformance import BlockStoreSuite
from tests.swift import RawClient

_BUCKET = "CONFORMANCE_BUCKET"
"""Environment variable with the bucket's name, where processes of the suite find it."""


class S3Suite(BlockStoreSuite):
    """The hooks of a store in a bucket; stored bytes are reached by the tests' own small client."""

    # Objects come to pass whole.
    lists_by_stamps = False
    rounds = 4

    @pytest.fixture(autouse=True)
    def bucket(self, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bucket for each test; the environment tells of the server."""
        monkeypatch.setenv(_BUCKET, s3_bucket)

    def location(self, place: Path) -> S3Location:
        """The prefix that stands for a place."""
        return S3Location(os.environ[_BUCKET], blake2b(bytes(place), digest_size=8).hexdigest())

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return ObjectStore(self.location(place), keys, object_bytes)

    def raw_things(self, place: Path) -> list[str]:
        """See `StoreHooks.raw_things`."""
        location = self.location(place)
        sizes = _raw().sizes(location.bucket, f"{location.prefix}/")
        return sorted(f"{key.removeprefix(location.prefix)} {size}" for key, size in sizes.items())

    def raw_count(self, place: Path, content: bytes) -> int:
        """See `StoreHooks.raw_count`."""
        location = self.location(place)
        found = [_raw().get(location.bucket, key) for key in _raw().sizes(location.bucket, f"{location.prefix}/")]
        return found.count(content)

    def raw_truncate(self, place: Path, keys: ObjectKeys, object_id: int, content: bytes, left_bytes: int) -> None:
        """See `StoreHooks.raw_truncate`: S3 has no such thing, so a shorter object is put in its place."""
        self.raw_replace(place, keys, object_id, content, content[:left_bytes])

    def raw_replace(self, place: Path, keys: ObjectKeys, object_id: int, content: bytes, changed: bytes) -> None:
        """See `StoreHooks.raw_replace`."""
        location = self.location(place)
        key = f"{location.prefix}/{keys.name(object_id)}"
        assert _raw().get(location.bucket, key) == content
        _raw().put(location.bucket, key, changed)

    def raw_add_foreign(self, place: Path) -> list[str]:
        """See `StoreHooks.raw_add_foreign`."""
        location = self.location(place)
        for name in ("notes.txt", "deeper/notes.txt"):
            _raw().put(location.bucket, f"{location.prefix}/{name}", b"kept by somebody else\n")
        return ["/deeper/notes.txt 22", "/notes.txt 22"]


def _raw() -> RawClient:
    return RawClient(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))


class TestObjectStore(S3Suite):
    """As the product opens it."""


class TestObjectStoreInParts(S3Suite):
    """Objects above 5 MiB are moved in parts of 5 MiB."""

    largest_bytes = 32 * MIB

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return ObjectStore(self.location(place), keys, object_bytes, part_bytes=5 * MIB)
