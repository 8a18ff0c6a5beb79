"""A store without data: it knows which objects are there, and touches no buffer."""

import errno
import mmap

import pytest

from mlpstorage.storage.base import BlockStore, Capabilities, Capacity, Listing, Moved, StoreFullError, aligned_memory
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.null_store import NullStore

KEYS = ObjectKeys("tiny-1b|0|0")


@pytest.fixture
def store() -> NullStore:
    """A store with room for three objects."""
    store = NullStore(KEYS, 5000, limit_objects=3)
    store.open()
    return store


def test_says_what_it_is(store: NullStore) -> None:
    """It is a `BlockStore` that keeps sizes only, for as long as the process lives."""
    contract: BlockStore = store
    assert (contract.object_bytes, contract.stored_bytes) == (5000, 8192)
    assert contract.capabilities == Capabilities(
        direct=False, aligned=False, descriptors=False, shared=False, lasting=False, holds_data=False
    )


def test_remembers_what_is_there(store: NullStore) -> None:
    """What was written can be read and deleted; what was not, or no longer is, is missing, by its name."""
    memory = aligned_memory(8192)
    assert store.write(1, memory) == store.read(1, memory) == Moved()
    assert store.exists([1, 2]) == [True, False]
    assert store.delete(1) == Moved()
    with pytest.raises(FileNotFoundError, match=KEYS.name(1)):
        store.read(1, memory)
    with pytest.raises(FileNotFoundError, match=KEYS.name(1)):
        store.delete(1)


def test_touches_no_buffer(store: NullStore) -> None:
    """Reads leave the buffer as it is; neither reads nor writes need one of any size."""
    memory = memoryview(bytearray(b"\xa5" * mmap.PAGESIZE))
    store.write(1, memory[:0])
    store.read(1, memory)
    assert bytes(memory) == b"\xa5" * mmap.PAGESIZE


def test_listing_is_in_the_order_of_writing(store: NullStore) -> None:
    """An object that is written again moves to the end."""
    for object_id in (3, 1, 2, 3):
        store.write(object_id, aligned_memory(8192))
    assert store.listing() == Listing(object_ids=(1, 2, 3), damaged=0, foreign=0)


def test_limit(store: NullStore) -> None:
    """With a limit there is so much room, and one object more is refused as on a full disk."""
    memory = aligned_memory(8192)
    for object_id in (1, 2, 3, 3):
        store.write(object_id, memory)
    assert store.capacity() == Capacity(total_bytes=3 * 8192, free_bytes=0)
    with pytest.raises(StoreFullError, match="3 objects") as caught:
        store.write(4, memory)
    assert caught.value.errno == errno.ENOSPC
    store.delete(1)
    assert store.capacity() == Capacity(total_bytes=3 * 8192, free_bytes=8192)
    store.write(4, memory)


def test_no_limit() -> None:
    """Without one the room is unknown."""
    assert NullStore(KEYS, 1).capacity() == Capacity(total_bytes=None, free_bytes=None)
