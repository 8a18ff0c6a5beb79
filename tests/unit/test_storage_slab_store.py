"""Objects in slots of one file: room, reuse of slots, writing over, and what goes wrong."""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpstorage.config import DirectMode
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import Capacity, StoreFullError, aligned_memory
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.testing.content import make_content
from mlpstorage.testing.suite_hooks import assert_holds, write

KEYS = ObjectKeys("tiny-1b|0|0")
OBJECT_BYTES = 5 * 4096 - 100
STORED_BYTES = 5 * 4096
SLOTS = 4

OpenSlab = Callable[..., SlabStore]


@pytest.fixture
def open_slab(tmp_path: Path) -> Iterator[OpenSlab]:
    """Opens slabs, and closes them in the end."""
    opened: list[SlabStore] = []

    def open_one(root: Path = tmp_path / "objects", slots: int = SLOTS) -> SlabStore:
        opened.append(SlabStore(root, KEYS, OBJECT_BYTES, slots=slots))
        opened[-1].open()
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def slots(store: SlabStore) -> list[int | None]:
    """The object in each slot, as the table in its file says."""
    table = (store.root / "slab.index").read_bytes()[4096:]
    keys = [table[at : at + 16] for at in range(0, len(table), 16)]
    return [KEYS.object_id(key) if any(key) else None for key in keys]


def free_slots(store: SlabStore) -> int:
    """Free slots, as the capacity says."""
    room = store.capacity()
    assert room.free_bytes is not None
    return room.free_bytes // STORED_BYTES


def test_all_room_is_reserved_at_the_start(open_slab: OpenSlab) -> None:
    """The slab has its full size and all its blocks before anything is written, and no write changes that."""
    store = open_slab()
    path = store.root / "slab"
    assert store.allocation_refusal is None
    before = path.stat()
    assert before.st_size == SLOTS * STORED_BYTES <= before.st_blocks * 512
    write(store, KEYS, [1, 2, 3, 4])
    store.delete(2)
    after = path.stat()
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
    assert sorted(path.name for path in store.root.iterdir()) == ["slab", "slab.index"]
    assert store.capacity() == Capacity(total_bytes=SLOTS * STORED_BYTES, free_bytes=STORED_BYTES)


def test_last_freed_slot_is_used_first(open_slab: OpenSlab) -> None:
    """A new slab is filled from its beginning; then the slot that was freed last comes first."""
    store = open_slab()
    write(store, KEYS, [1, 2, 3])
    store.delete(1)
    store.delete(3)
    write(store, KEYS, [4])
    assert slots(store) == [None, 2, 4, None]
    write(store, KEYS, [5, 6])
    assert slots(store) == [5, 2, 4, 6]


def test_replaced_object_takes_another_slot(open_slab: OpenSlab) -> None:
    """While a slot is free, an object that is written again moves; its old slot is free then."""
    store = open_slab()
    write(store, KEYS, [1, 2])
    write(store, KEYS, [1], 1)
    assert slots(store) == [None, 2, 1, None]
    assert free_slots(store) == 2


def test_full_slab(open_slab: OpenSlab) -> None:
    """An object beyond the last slot is refused with ENOSPC and the slab's name."""
    store = open_slab()
    write(store, KEYS, [1, 2, 3, 4])
    with pytest.raises(StoreFullError, match="all 4 slots are taken") as caught:
        write(store, KEYS, [5])
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(store.root / "slab")
    assert slots(store) == [1, 2, 3, 4]


def test_object_of_a_full_slab_is_written_over(open_slab: OpenSlab) -> None:
    """Where no slot is free the object's own is used: it is gone, in the table too, before a byte is written."""
    store = open_slab()
    write(store, KEYS, [1, 2, 3, 4])
    transfer = store.begin_write(2)
    assert transfer.offset_bytes == STORED_BYTES
    assert slots(store) == [1, None, 3, 4]
    with pytest.raises(FileNotFoundError):
        store.read(2, aligned_memory(STORED_BYTES))
    store.abort_write(transfer)
    assert free_slots(store) == 1
    write(store, KEYS, [2], 1)
    write(store, KEYS, [2], 2)
    assert_holds(store, KEYS, [2], 2)
    assert slots(store) == [1, 2, 3, 4]


def test_slot_that_is_read_is_not_written_over(open_slab: OpenSlab) -> None:
    """With no slot free and its own being read, a write is refused as in a full slab; the object stays."""
    store = open_slab()
    write(store, KEYS, [1, 2, 3, 4])
    transfer = store.begin_read(2)
    with pytest.raises(StoreFullError):
        write(store, KEYS, [2], 1)
    assert_holds(store, KEYS, [2])
    store.end_read(transfer)
    write(store, KEYS, [2], 1)
    assert_holds(store, KEYS, [2], 1)


def test_slot_is_free_when_its_last_reader_has_ended(open_slab: OpenSlab) -> None:
    """A deleted object's slot is taken until all who read it have ended, in whatever order; then it is free, once."""
    store = open_slab()
    write(store, KEYS, [1, 2, 3, 4])
    first, second = store.begin_read(2), store.begin_read(2)
    store.delete(2)
    assert slots(store) == [1, None, 3, 4]
    assert free_slots(store) == 0
    store.end_read(first)
    with pytest.raises(StoreFullError):
        write(store, KEYS, [5])
    store.end_read(second)
    assert free_slots(store) == 1
    write(store, KEYS, [5])
    assert slots(store) == [1, 5, 3, 4]
    with pytest.raises(StoreFullError):
        write(store, KEYS, [6])


def test_replaced_while_read(open_slab: OpenSlab) -> None:
    """Who reads an object that is replaced reads the old version to its end; its slot is free afterwards."""
    store = open_slab()
    write(store, KEYS, [1])
    transfer = store.begin_read(1)
    write(store, KEYS, [1], 1)
    write(store, KEYS, [2, 3])
    memory = aligned_memory(STORED_BYTES)
    os.preadv(transfer.descriptor, (memory,), transfer.offset_bytes)
    assert bytes(memory) == make_content(KEYS, 1, STORED_BYTES)
    assert free_slots(store) == 0
    store.end_read(transfer)
    assert free_slots(store) == 1


def test_reopened(open_slab: OpenSlab) -> None:
    """A slab that is opened again knows its free slots, and lists objects by slot."""
    first = open_slab()
    write(first, KEYS, [3, 2, 1])
    first.delete(2)
    first.close()
    second = open_slab()
    assert second.listing().object_ids == (3, 1)
    assert free_slots(second) == 2
    write(second, KEYS, [5, 6])
    assert slots(second) == [3, 5, 1, 6]


def test_truncated_slab_is_made_whole(open_slab: OpenSlab) -> None:
    """Of a slab that was cut off, what is left is found, what is not is damaged, and its room is reserved again."""
    first = open_slab()
    write(first, KEYS, [1, 2, 3])
    first.close()
    path = first.root / "slab"
    os.truncate(path, STORED_BYTES + 4096)
    second = open_slab()
    found = second.listing()
    assert (found.object_ids, found.damaged, found.foreign) == ((1,), 2, 0)
    assert path.stat().st_size == SLOTS * STORED_BYTES <= path.stat().st_blocks * 512
    assert free_slots(second) == 3
    assert slots(second) == [1, None, None, None]
    write(second, KEYS, [2, 3, 4])
    assert_holds(second, KEYS, [1, 4])


def test_table_that_was_cut_off(open_slab: OpenSlab) -> None:
    """What a table that was cut off no longer says is not there; the rest is."""
    first = open_slab()
    write(first, KEYS, [1, 2, 3])
    first.close()
    os.truncate(first.root / "slab.index", 4096 + 16 + 7)
    second = open_slab()
    assert second.listing().object_ids == (1,)
    write(second, KEYS, [5, 6, 7])
    assert slots(second) == [1, 5, 6, 7]


def test_other_number_of_slots_is_refused(open_slab: OpenSlab) -> None:
    """A slab of another size is not used, and the message says which flag it follows from."""
    open_slab().close()
    with pytest.raises(ConfigurationError, match=r"slots is 5 here and was 4 there \(follows from --storage-gb\)"):
        open_slab(slots=5)


@pytest.mark.parametrize("small_file_system", [("tmpfs", "size=1m")], indirect=True)
def test_no_room_for_the_slab(small_file_system: Path, open_slab: OpenSlab) -> None:
    """A slab that does not fit is refused when it is opened, with the bytes it needs and the flag; none are kept."""
    root = small_file_system / "objects"
    with pytest.raises(ConfigurationError, match=r"100 slots of 20480 bytes need 2048000 bytes .*--storage-gb"):
        open_slab(root, slots=100)
    assert (root / "slab").stat().st_blocks == 0
    (root / "slab.index").unlink()
    store = open_slab(root, slots=40)
    write(store, KEYS, range(40))
    assert_holds(store, KEYS, [39])
    store.close()


@pytest.mark.parametrize("small_file_system", [("ramfs", "mode=700")], indirect=True)
def test_file_system_that_cannot_reserve(small_file_system: Path, open_slab: OpenSlab) -> None:
    """Where space cannot be reserved the store says so; the slab has its size all the same, and works."""
    store = open_slab(small_file_system / "objects")
    assert store.allocation_refusal is not None
    assert str(store.root) in store.allocation_refusal
    assert (store.root / "slab").stat().st_size == SLOTS * STORED_BYTES
    write(store, KEYS, [1, 2, 3, 4])
    assert_holds(store, KEYS, [1, 4])
    store.close()


def test_dropping_the_page_cache_takes_no_slot(tmp_path: Path) -> None:
    """While pages are dropped, and the slab is being synced for it, a deleted object's slot can be written anew."""

    class Held(SlabStore):
        """Stands still where it has found what to drop."""

        @contextlib.contextmanager
        def _for_dropping(self, object_id: int) -> Iterator[tuple[int, int]]:
            with super()._for_dropping(object_id) as place:
                found.set()
                assert go_on.wait(30)
                yield place

    found, go_on = threading.Event(), threading.Event()
    store = Held(tmp_path / "objects", ObjectKeys("m|0|0"), 4096, slots=1, direct=DirectMode.NEVER)
    store.open()
    memory = aligned_memory(4096)
    store.write(1, memory)
    dropping = threading.Thread(target=store.drop_page_cache, args=([1],))
    dropping.start()
    assert found.wait(30)
    store.delete(1)
    store.write(2, memory)
    go_on.set()
    dropping.join(30)
    assert store.exists([1, 2]) == [False, True]
    store.close()


def test_direct_slab_has_nothing_to_drop(tmp_path: Path) -> None:
    """Nothing is cached, so nothing is synced or dropped; buffered, what was just written is dropped."""
    for mode, expected in ((DirectMode.AUTO, 0), (DirectMode.NEVER, 4096)):
        store = SlabStore(tmp_path / mode, ObjectKeys("m|0|0"), 4096, slots=1, direct=mode)
        store.open()
        if mode is DirectMode.AUTO and not store.direct:
            pytest.skip(f"{store.direct_refusal}")
        store.write(1, aligned_memory(4096))
        assert store.drop_page_cache([1]) == expected
        store.close()


@pytest.mark.parametrize("parts", [1, 256, 1024])
def test_table_of_many_kv_ranks_is_read_again(tmp_path: Path, parts: int) -> None:
    """However many kv ranks share a slab, its table is found whole by the next to open it."""
    keys = ObjectKeys(*(f"m|{part}|0" for part in range(parts)))
    memory = aligned_memory(4096)
    store = SlabStore(tmp_path / "objects", keys, 4096, slots=4)
    store.open()
    for object_id in (0, parts - 1):
        memory[:12] = keys.key(object_id)[:8] + bytes(4)
        store.write(object_id, memory)
    store.flush()
    store.close()
    again = SlabStore(tmp_path / "objects", keys, 4096, slots=4)
    again.open()
    assert set(again.listing().object_ids) == {0, parts - 1}
    again.close()


def test_slab_without_its_table_is_refused(tmp_path: Path) -> None:
    """Where the table is lost, opening the slab would delete what it holds: it is refused, and nothing is touched."""
    keys = ObjectKeys("m|0|0")
    store = SlabStore(tmp_path / "objects", keys, 4096, slots=2)
    store.open()
    store.write(1, aligned_memory(4096))
    store.close()
    (tmp_path / "objects" / "slab.index").write_bytes(b"")
    before = (tmp_path / "objects" / "slab").read_bytes()
    with pytest.raises(ConfigurationError, match=r"slab\.index"):
        SlabStore(tmp_path / "objects", keys, 4096, slots=2).open()
    assert (tmp_path / "objects" / "slab").read_bytes() == before
