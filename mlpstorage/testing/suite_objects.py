"""The conformance suite of block stores, first part: one object after the other."""

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from mlpstorage.config import MIB, PAGE_BYTES
from mlpstorage.storage.base import (
    BlockStore,
    Listing,
    Moved,
    ShortObjectError,
    aligned_memory,
    padded_bytes,
)
from mlpstorage.storage.descriptor import DescriptorStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.content import difference, make_content
from mlpstorage.testing.suite_hooks import (
    OBJECTS,
    OpenStore,
    StoreHooks,
    assert_gone,
    assert_holds,
    half_unreadable,
    has_fixed_room,
    requires,
    write,
)

SIZES_BYTES = (1, 4095, 4096, 4097, 393_216, 1_124_352, 2 * MIB + 1, 32 * MIB, 256 * MIB)
"""Of payloads. 1,124,352 B are 16 tokens of DeepSeek V3: 61 layers x 576 values x 2 B, not a multiple of 4 KiB."""

LARGE_BYTES = 32 * MIB
"""From here on an object is tried only where there is room and memory."""


class ObjectTests(StoreHooks):
    """Sizes, reading, writing, deleting, and what the store says of itself."""

    @pytest.mark.parametrize("object_bytes", SIZES_BYTES)
    def test_size(self, open_store: OpenStore, keys: ObjectKeys, place: Path, object_bytes: int) -> None:
        """Objects of any size come back byte by byte, padded to full pages on storage."""
        self._skip_without_room(place, object_bytes)
        store = open_store(object_bytes, objects=2)
        assert (store.object_bytes, store.stored_bytes) == (object_bytes, padded_bytes(object_bytes))
        write(store, keys, [1, 2])
        assert_holds(store, keys, [2, 1])

    def _skip_without_room(self, place: Path, object_bytes: int) -> None:
        if object_bytes > self.largest_bytes:
            pytest.skip(f"objects beyond {self.largest_bytes} bytes are not tried on this store")
        if object_bytes < LARGE_BYTES:
            return
        free_memory_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if shutil.disk_usage(place.parent).free < 4 * object_bytes or free_memory_bytes < 6 * object_bytes:
            pytest.skip(f"no room or memory for some objects of {object_bytes} bytes")

    def test_empty_place(self, store: BlockStore) -> None:
        """A new store has no objects, and says so in every way."""
        assert store.listing() == Listing(object_ids=(), damaged=0, foreign=0)
        assert_gone(store, [0, 1, 2**64 - 1])

    def test_object_ids(self, store: BlockStore, keys: ObjectKeys) -> None:
        """Objects of all kv ranks, with small and large ids, are told apart."""
        object_ids = [0, 1, 2, 3, 2**32, 2**64 - 2, 2**64 - 1]
        write(store, keys, object_ids)
        assert_holds(store, keys, object_ids)
        assert_gone(store, [4, 2**32 + 1])

    @pytest.mark.parametrize("lead_pages", [0, 1, 3])
    def test_buffer_at_any_page(self, store: BlockStore, keys: ObjectKeys, lead_pages: int) -> None:
        """Buffers begin at any page of some memory; what lies before and behind them is not touched."""
        lead_bytes, guard = lead_pages * PAGE_BYTES, b"\xa5" * PAGE_BYTES
        memory = aligned_memory(lead_bytes + store.stored_bytes + PAGE_BYTES)
        buffer = memory[lead_bytes : lead_bytes + store.stored_bytes]
        content = make_content(keys, 1, store.stored_bytes)
        memory[:lead_bytes], memory[-PAGE_BYTES:] = guard * lead_pages, guard
        buffer[:] = content
        store.write(1, buffer)
        assert buffer == content, "writing changed the buffer"
        buffer[:] = bytes(store.stored_bytes)
        store.read(1, buffer)
        assert (bytes(memory[:lead_bytes]), bytes(memory[-PAGE_BYTES:])) == (guard * lead_pages, guard)
        if store.capabilities.holds_data:
            assert difference(buffer, content) is None

    def test_data_is_where_it_belongs(
        self, open_store: OpenStore, raw: StoreHooks, keys: ObjectKeys, place: Path
    ) -> None:
        """What is written can be found in the place by another way, whole and once."""
        store = open_store()
        requires(store.capabilities, "holds_data")
        content = make_content(keys, 1, store.stored_bytes)
        assert raw.raw_count(place, content) == 0
        write(store, keys, [1])
        store.sync(1)
        assert raw.raw_count(place, content) == 1

    def test_overwrite(self, store: BlockStore, keys: ObjectKeys) -> None:
        """A second write of an object takes the first one's place, many times over; its neighbours stay."""
        write(store, keys, [1, 2, 3])
        for version in range(1, 2 * OBJECTS):
            write(store, keys, [2], version)
        assert_holds(store, keys, [2], 2 * OBJECTS - 1)
        assert_holds(store, keys, [1, 3])
        assert sorted(store.listing().object_ids) == [1, 2, 3]

    def test_delete(self, store: BlockStore, keys: ObjectKeys) -> None:
        """A deleted object is gone, its neighbours are not, and it can be written anew."""
        write(store, keys, [1, 2, 3])
        store.delete(2)
        assert_gone(store, [2])
        assert_holds(store, keys, [1, 3])
        assert sorted(store.listing().object_ids) == [1, 3]
        write(store, keys, [2], 1)
        assert_holds(store, keys, [2], 1)

    def test_delete_gives_room_back(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """Many more objects than there is room for can be written, if as many are deleted."""
        store = open_store(objects=4)
        write(store, keys, range(3))
        for object_id in range(3, 40):
            write(store, keys, [object_id])
            store.delete(object_id - 3)
        assert store.exists(range(40)) == [False] * 37 + [True] * 3
        assert_holds(store, keys, [37, 38, 39])

    def test_missing_object(self, store: BlockStore, keys: ObjectKeys) -> None:
        """Reading or deleting what is not there is `FileNotFoundError` with its errno; nothing else suffers."""
        write(store, keys, [1])
        memory = aligned_memory(store.stored_bytes)
        with pytest.raises(FileNotFoundError) as of_read:
            store.read(2, memory)
        with pytest.raises(FileNotFoundError) as of_delete:
            store.delete(2)
        assert of_read.value.errno == of_delete.value.errno == errno.ENOENT
        assert_holds(store, keys, [1])

    def test_exists(self, store: BlockStore, keys: ObjectKeys) -> None:
        """A batch of questions is answered in its order, also an empty one and one that asks twice."""
        write(store, keys, [2, 5])
        assert store.exists([]) == []
        assert store.exists([5, 1, 2, 5, 9, 2**64]) == [True, False, True, True, False, False]

    def test_sync(self, store: BlockStore, keys: ObjectKeys) -> None:
        """What was written can be synced, once and again, and is then still there."""
        write(store, keys, [1, 2])
        for object_id in (1, 2, 1):
            store.sync(object_id)
        assert_holds(store, keys, [1, 2])

    @pytest.mark.parametrize("left_bytes", [0, 1, 4095, 4096, 8192, 5 * 4096 - 1])
    def test_truncated_object(
        self, open_store: OpenStore, raw: StoreHooks, keys: ObjectKeys, place: Path, left_bytes: int
    ) -> None:
        """An object that lost its end is an error when it is read, wherever it was cut; what comes before it is not."""
        store = open_store()
        requires(store.capabilities, "holds_data")
        write(store, keys, [1, 2])
        raw.raw_truncate(place, keys, 2, make_content(keys, 2, store.stored_bytes), left_bytes)
        memory = aligned_memory(store.stored_bytes)
        with pytest.raises(ShortObjectError):
            store.read(2, memory)
        assert_holds(store, keys, [1])

    def test_unfinished_write(self, open_store: OpenStore, keys: ObjectKeys, place: Path) -> None:
        """Nobody finds an object that is still being written; given up, it leaves nothing behind."""
        store = open_store()
        requires(store.capabilities, "descriptors")
        assert isinstance(store, DescriptorStore)
        write(store, keys, [1])
        things, free_bytes = self.raw_things(place), store.capacity().free_bytes
        memory = aligned_memory(store.stored_bytes)
        memory[:] = make_content(keys, 2, store.stored_bytes)
        transfer = store.begin_write(2)
        os.pwritev(transfer.descriptor, (memory[:PAGE_BYTES],), transfer.offset_bytes)
        assert_gone(store, [2])
        store.abort_write(transfer)
        assert_gone(store, [2])
        assert_holds(store, keys, [1])
        assert self.raw_things(place) == things
        if has_fixed_room(store, OBJECTS):
            assert store.capacity().free_bytes == free_bytes

    @pytest.mark.parametrize("there_before", [False, True])
    def test_write_that_fails_half_way(
        self, open_store: OpenStore, keys: ObjectKeys, place: Path, *, there_before: bool
    ) -> None:
        """A write that fails after half of its bytes leaves nothing behind, at most the object that was there."""
        store = open_store()
        requires(store.capabilities, "descriptors")
        write(store, keys, [1, 2])
        if not there_before:
            store.delete(2)
        things, free_bytes = self.raw_things(place), store.capacity().free_bytes
        with pytest.raises(OSError, match="address") as caught:
            store.write(2, half_unreadable(make_content(keys, 2, store.stored_bytes, 1)))
        assert caught.value.errno == errno.EFAULT
        if store.exists([2])[0]:
            assert there_before
            assert_holds(store, keys, [2])
        else:
            assert_gone(store, [2])
        if not there_before:
            assert self.raw_things(place) == things
            if has_fixed_room(store, OBJECTS):
                assert store.capacity().free_bytes == free_bytes
        assert_holds(store, keys, [1])
        write(store, keys, [2], 2)
        assert_holds(store, keys, [2], 2)

    def test_reader_keeps_a_deleted_object(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """A read that began before its object was deleted gets that object, whoever writes meanwhile."""
        store = open_store(objects=4)
        requires(store.capabilities, "descriptors")
        assert isinstance(store, DescriptorStore)
        write(store, keys, [1, 2, 3])
        transfer = store.begin_read(2)
        store.delete(2)
        assert_gone(store, [2])
        for object_id in range(4, 14):
            write(store, keys, [object_id])
            store.delete(object_id)
        memory = aligned_memory(store.stored_bytes)
        os.preadv(transfer.descriptor, (memory,), transfer.offset_bytes)
        store.end_read(transfer)
        assert difference(memory, make_content(keys, 2, store.stored_bytes)) is None
        write(store, keys, [2, 4], 1)
        assert_holds(store, keys, [2, 4], 1)

    def test_capacity(self, store: BlockStore, keys: ObjectKeys) -> None:
        """Room is told in whole numbers that fit together, and where the store alone decides it, exactly."""
        before = store.capacity()
        write(store, keys, [1, 2, 3])
        full = store.capacity()
        store.delete(2)
        after = store.capacity()
        for room in (before, full, after):
            if room.total_bytes is not None and room.free_bytes is not None:
                assert 0 <= room.free_bytes <= room.total_bytes
        if has_fixed_room(store, OBJECTS):
            free = [room.free_bytes for room in (before, full, after)]
            assert free == [(OBJECTS - used) * store.stored_bytes for used in (0, 3, 2)]

    def test_fixed_room(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """A store with a fixed number of places takes so many objects; one more is ENOSPC and harms none of them."""
        store = open_store(objects=4)
        if not has_fixed_room(store, 4):
            pytest.skip("the store has no fixed number of places")
        write(store, keys, range(4))
        assert store.capacity().free_bytes == 0
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is looked at
            write(store, keys, [4])
        assert caught.value.errno == errno.ENOSPC
        assert_gone(store, [4])
        assert_holds(store, keys, range(4))
        store.delete(2)
        write(store, keys, [4])
        assert_holds(store, keys, [0, 1, 3, 4])

    def test_what_is_told_of_a_transfer(self, store: BlockStore, keys: ObjectKeys) -> None:
        """Reads, writes and deletes of healthy storage need no second try, and agree with the capabilities."""
        requires_direct = {store.capabilities.direct} if store.capabilities.descriptors else {None, False, True}
        memory = aligned_memory(store.stored_bytes)
        memory[:] = make_content(keys, 1, store.stored_bytes)
        written, read, deleted = store.write(1, memory), store.read(1, memory), store.delete(1)
        assert {type(moved) for moved in (written, read, deleted)} == {Moved}
        assert [moved.retries for moved in (written, read, deleted)] == [0, 0, 0]
        assert {written.direct, read.direct} <= requires_direct
        assert (written.page_cache_bytes, deleted.page_cache_bytes) == (0, 0)
        if store.capabilities.direct:
            assert read.page_cache_bytes == 0

    def test_page_cache(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """Dropped pages are read from storage again; objects that are gone are passed over; data stays right."""
        store = open_store(64 * PAGE_BYTES)
        write(store, keys, [1, 2])
        for object_id in (1, 2):
            store.sync(object_id)
        warm, cold = aligned_memory(store.stored_bytes), aligned_memory(store.stored_bytes)
        store.read(1, warm)
        before = store.read(1, warm).page_cache_bytes
        dropped_bytes = store.drop_page_cache([1, 7])
        after = store.read(1, cold).page_cache_bytes
        assert bytes(warm) == bytes(cold)
        assert before is None or 0 <= before <= store.stored_bytes
        assert dropped_bytes is None or dropped_bytes >= 0
        if before and dropped_bytes:
            assert after is not None
            assert after < before
        assert_holds(store, keys, [1, 2])

    def test_descriptors_flag(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """`descriptors` and `aligned` say what an I/O engine gets: a file, and where in it a page begins."""
        store = open_store()
        assert isinstance(store, DescriptorStore) or not store.capabilities.descriptors
        requires(store.capabilities, "descriptors")
        assert isinstance(store, DescriptorStore)
        write(store, keys, [1, 2])
        for object_id in (1, 2):
            transfer = store.begin_read(object_id)
            assert transfer.object_id == object_id
            assert transfer.offset_bytes % PAGE_BYTES == 0 or not store.capabilities.aligned
            memory = aligned_memory(store.stored_bytes)
            assert os.preadv(transfer.descriptor, (memory,), transfer.offset_bytes) == store.stored_bytes
            store.end_read(transfer)
            if store.capabilities.holds_data:
                assert difference(memory, make_content(keys, object_id, store.stored_bytes)) is None

    def test_direct_flag(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """`direct` says how the kernel has the files open, for reading and for writing."""
        store = open_store()
        requires(store.capabilities, "descriptors")
        assert isinstance(store, DescriptorStore)
        write(store, keys, [1])
        reading, writing = store.begin_read(1), store.begin_write(2)
        flags = [fcntl.fcntl(transfer.descriptor, fcntl.F_GETFL) for transfer in (reading, writing)]
        told = [reading.moved.direct, writing.moved.direct]
        store.end_read(reading)
        store.abort_write(writing)
        assert [bool(flag & os.O_DIRECT) for flag in flags] == told == [store.capabilities.direct] * 2

    def test_holds_data_flag(self, store: BlockStore, keys: ObjectKeys) -> None:
        """`holds_data` says whether a read gives back what was written."""
        content = make_content(keys, 1, store.stored_bytes)
        write(store, keys, [1])
        memory = aligned_memory(store.stored_bytes)
        store.read(1, memory)
        assert (bytes(memory) == content) is store.capabilities.holds_data

    def test_close_twice(self, store: BlockStore, keys: ObjectKeys, place: Path) -> None:
        """Closing leaves no file of the place open, and a second time does nothing."""
        write(store, keys, [1])
        assert_holds(store, keys, [1])
        store.close()
        assert _open_below(place) == []
        store.close()


def _open_below(place: Path) -> list[str]:
    """Files of a place that this process has open."""
    targets: list[str] = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
            targets.append(str(entry.readlink()))
    return [target for target in targets if target.startswith(f"{place}/")]
