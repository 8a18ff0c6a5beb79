"""The conformance suite of block stores: what every store must do, as tests that a backend's author subclasses.

    class TestMyStore(BlockStoreSuite):
        def make_store(self, place, keys, object_bytes, objects):
            return MyStore(place, keys, object_bytes)

in a test file is the whole of it for a store that keeps its objects in files below `place`. Another one replaces the
`raw_*` hooks too, which reach the stored bytes by another way than the store, or sets `raw_access` to False and goes
without the tests that need them (see `StoreHooks`). A store that has to be told more than `make_store` gets, such as a
server's address, takes it from the environment, as some tests make the store in other processes.

Which tests apply follows from the store's capabilities; the others are skipped, with the reason. Contents are made and
compared by `testing.content`, by no code of the product. Every test gets a new, empty place. pytest's explanations of
what failed need `pytest.register_assert_rewrite(*SUITE_MODULES)` in a conftest.py.
"""

from mlpstorage.testing.suite_hooks import StoreHooks
from mlpstorage.testing.suite_objects import ObjectTests
from mlpstorage.testing.suite_places import PlaceTests
from mlpstorage.testing.suite_threads import ThreadTests

SUITE_MODULES = tuple(f"mlpstorage.testing.suite_{part}" for part in ("hooks", "objects", "places", "threads"))
"""The modules with the suite's assertions."""


class BlockStoreSuite(ObjectTests, ThreadTests, PlaceTests):
    """All tests of the contract `storage.base.BlockStore`; the hooks are those of `StoreHooks`."""


__all__ = ["SUITE_MODULES", "BlockStoreSuite", "StoreHooks"]
