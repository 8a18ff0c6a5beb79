"""What slabs and buckets have in common: replaced objects, syncs, tables that survive a kill or do not fit."""

import errno
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpstorage.config import DirectMode, WriteSync
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import BlockStore, Listing, ShortObjectError, aligned_memory
from mlpstorage.storage.bucket_store import BucketStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.packed_store import PackedStore
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.testing.content import make_content, page_problem
from mlpstorage.testing.suite_hooks import write

NAMESPACES = ("tiny-1b|0|0", "tiny-1b|1|0")
KEYS = ObjectKeys(*NAMESPACES)
OBJECT_BYTES = 3 * 4096
HEADER_BYTES = 4096
SLOTS = 8

Make = Callable[..., PackedStore]


def make_slab(root: Path, object_bytes: int = OBJECT_BYTES, *, keys: ObjectKeys = KEYS, **more: object) -> PackedStore:
    """A slab of a few slots."""
    return SlabStore(root, keys, object_bytes, slots=SLOTS, **more)  # type: ignore[arg-type]


def make_bucket(
    root: Path, object_bytes: int = OBJECT_BYTES, *, keys: ObjectKeys = KEYS, **more: object
) -> PackedStore:
    """Buckets of four objects."""
    return BucketStore(root, keys, object_bytes, bucket_objects=4, **more)  # type: ignore[arg-type]


MAKERS: dict[str, Make] = {"slab": make_slab, "bucket": make_bucket}
RECORD_BYTES = {"slab": 16, "bucket": 32}
"""By the formats: a key; a key, a bucket's number and an offset of eight bytes each."""

LINES = (1, 4, 7, 30, 61, 120)
"""What a writer has said before it is killed."""

WRITER = """
import random, sys, threading, os
from pathlib import Path
from mlpstorage.storage.base import aligned_memory
from mlpstorage.testing.content import make_content
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import test_storage_packed_store as tests

store = tests.MAKERS[sys.argv[2]](Path(sys.argv[3]))
store.open()
there = set(store.listing().object_ids)

def work(thread):
    draw = random.Random(f"{sys.argv[4]}/{thread}")
    memory = aligned_memory(store.stored_bytes)
    while True:
        object_id = draw.randrange(3) * 2 + thread
        action = "delete" if object_id in there and draw.random() < 0.4 else "write"
        os.write(1, f"begin {action} {object_id}\\n".encode())
        if action == "delete":
            store.delete(object_id)
            there.discard(object_id)
        else:
            memory[:] = make_content(tests.KEYS, object_id, store.stored_bytes, draw.randrange(1000))
            store.write(object_id, memory)
            there.add(object_id)
        os.write(1, f"done {action} {object_id}\\n".encode())

for thread in range(2):
    threading.Thread(target=work, args=(thread,)).start()
"""
"""Two threads write, replace and delete six objects for ever and say what they do, each before and after it."""


@pytest.fixture(params=sorted(MAKERS))
def layout(request: pytest.FixtureRequest) -> str:
    """Each of the layouts."""
    name: str = request.param
    return name


@pytest.fixture
def opened(layout: str, tmp_path: Path) -> Iterator[Make]:
    """Makes and opens stores of the layout in one directory; closes them in the end."""
    stores: list[PackedStore] = []

    def open_one(object_bytes: int = OBJECT_BYTES, root: Path = tmp_path / "objects", **more: object) -> PackedStore:
        stores.append(MAKERS[layout](root, object_bytes, **more))
        stores[-1].open()
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def got(store: BlockStore, object_id: int) -> bytes:
    """What a store holds of an object."""
    memory = aligned_memory(store.stored_bytes)
    store.read(object_id, memory)
    return bytes(memory)


def content(object_id: int, version: int = 0) -> bytes:
    """A version of an object, as `write` writes it."""
    return make_content(KEYS, object_id, OBJECT_BYTES, version)


def records(root: Path, layout: str) -> list[bytes]:
    """The records of a layout's table, as they are in its file."""
    table = (root / f"{layout}.index").read_bytes()[HEADER_BYTES:]
    size = RECORD_BYTES[layout]
    return [table[at : at + size] for at in range(0, len(table), size)]


def set_record(root: Path, layout: str, number: int, record: bytes) -> None:
    """Change a record of a layout's table in its file."""
    with (root / f"{layout}.index").open("r+b") as file:
        file.seek(HEADER_BYTES + number * RECORD_BYTES[layout])
        file.write(record)


def record_of(layout: str, object_id: int, place: int) -> bytes:
    """The record of an object at a place of the slab or of the first bucket."""
    key = KEYS.key(object_id)
    return key if layout == "slab" else key + struct.pack("<QQ", 0, place * OBJECT_BYTES)


def set_data(root: Path, layout: str, place: int, data: bytes) -> None:
    """Change what is at a place of the slab or of the first bucket, in its file."""
    with data_file(root, layout).open("r+b") as file:
        file.seek(place * OBJECT_BYTES)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def data_file(root: Path, layout: str) -> Path:
    """The slab, or the first bucket."""
    return root / {"slab": "slab", "bucket": "bucket-00000000"}[layout]


def test_fulfils_the_contract(opened: Make) -> None:
    """The store is a `BlockStore`, for mypy and at run time, and says what it is."""
    store = opened()
    contract: BlockStore = store
    capabilities = contract.capabilities
    assert (capabilities.aligned, capabilities.descriptors, capabilities.lasting) == (True, True, True)
    assert (capabilities.shared, capabilities.direct) == (False, store.direct)
    assert (contract.object_bytes, contract.stored_bytes) == (OBJECT_BYTES, OBJECT_BYTES)


@pytest.mark.parametrize("layout", sorted(MAKERS))
def test_killed_again_and_again(layout: str, tmp_path: Path) -> None:
    """After SIGKILL all that was reported is there, whole, and nothing else but what was under way.

    The same place is used each time: what a kill left is what the next process begins with.
    """
    root, there, seen = tmp_path / "objects", set[int](), 0
    for turn in range(len(LINES)):
        actions = _run_until_killed(layout, root, turn, lines=LINES[turn])
        seen += len(actions)
        under_way = _replay(actions, there)
        store = MAKERS[layout](root)
        store.open()
        found = store.listing()
        assert (found.damaged, found.foreign) == (0, 0)
        assert len(set(found.object_ids)) == len(found.object_ids)
        must = there - {object_id for object_id, action in under_way.items() if action == "delete"}
        assert must <= set(found.object_ids) <= there | set(under_way)
        for object_id in found.object_ids:
            assert page_problem(got(store, object_id), KEYS.stamp(object_id)) is None
        there = set(found.object_ids)
        store.close()
    assert seen >= sum(LINES)


def _run_until_killed(layout: str, root: Path, turn: int, *, lines: int) -> list[list[str]]:
    """Start a writer, kill it when it has said so much; returns all that it said."""
    arguments = [sys.executable, "-c", WRITER, __file__, layout, str(root), str(turn)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        ended = process.poll()
        process.kill()
        said += process.stdout.readlines()
    assert all(line.endswith("\n") for line in said), f"the writer ended by itself ({ended}), last: {said[-3:]}"
    return [line.split() for line in said]


def _replay(actions: list[list[str]], there: set[int]) -> dict[int, str]:
    """Bring a set of objects up to date; returns what was under way, by object."""
    under_way: dict[int, str] = {}
    for state, action, number in actions:
        object_id = int(number)
        if state == "begin":
            under_way[object_id] = action
            continue
        del under_way[object_id]
        (there.add if action == "write" else there.discard)(object_id)
    return under_way


def test_table(opened: Make, layout: str) -> None:
    """The table has one record an object, which says where it lies; the data are there."""
    store = opened()
    write(store, KEYS, [1, 2, 3])
    store.delete(2)
    expected = [record_of(layout, 1, 0), bytes(RECORD_BYTES[layout]), record_of(layout, 3, 2)]
    found = records(store.root, layout)
    assert found[:3] == expected
    assert not any(map(any, found[3:]))
    data = data_file(store.root, layout).read_bytes()
    assert data[:OBJECT_BYTES] == content(1)
    assert data[2 * OBJECT_BYTES : 3 * OBJECT_BYTES] == content(3)


def test_replacing_keeps_the_old_version_until_the_new_one_is_written(opened: Make, layout: str) -> None:
    """Before the commit the object is the old one, for readers and in the table; after it there is one record of it."""
    store = opened()
    write(store, KEYS, [1])
    before = records(store.root, layout)
    transfer = store.begin_write(1)
    memory = aligned_memory(store.stored_bytes)
    os.pwritev(transfer.descriptor, (memory,), transfer.offset_bytes)
    assert got(store, 1) == content(1)
    assert records(store.root, layout) == before
    store.abort_write(transfer)
    write(store, KEYS, [1], 1)
    assert got(store, 1) == content(1, 1)
    assert [record[:16] for record in records(store.root, layout)].count(KEYS.key(1)) == 1


def test_object_that_the_table_has_twice(opened: Make, layout: str) -> None:
    """A kill between a new version's record and the removal of the old one leaves two whole ones: one is taken."""
    first = opened()
    write(first, KEYS, [1, 2])
    set_data(first.root, layout, 2, content(1, 1))
    set_record(first.root, layout, 2, record_of(layout, 1, 2))
    first.close()
    second = opened()
    assert second.listing() == Listing(object_ids=(1, 2), damaged=0, foreign=0)
    assert got(second, 1) in (content(1), content(1, 1))
    assert [record[:16] for record in records(second.root, layout)].count(KEYS.key(1)) == 1


@pytest.mark.parametrize("whole", [0, 2])
def test_object_that_an_old_table_has_twice(opened: Make, layout: str, whole: int) -> None:
    """Of two records of one object, as a power failure may leave them, the one is taken whose stamps are right."""
    first = opened()
    write(first, KEYS, [1, 2])
    set_data(first.root, layout, 2 - whole, bytes(OBJECT_BYTES))
    set_data(first.root, layout, whole, content(1, 1))
    set_record(first.root, layout, 2, record_of(layout, 1, 2))
    first.close()
    second = opened()
    found = second.listing()
    assert (set(found.object_ids), found.damaged, found.foreign) == ({1, 2}, 0, 0)
    assert (got(second, 1), got(second, 2)) == (content(1, 1), content(2))


def test_old_table(opened: Make, layout: str) -> None:
    """A table that does not fit the data, as after a power failure, gives what the stamps bear out, and no more."""
    first = opened()
    write(first, KEYS, [1, 2, 3])
    set_record(first.root, layout, 0, record_of(layout, 2, 0))
    set_record(first.root, layout, 1, record_of(layout, 1, 1))
    set_record(first.root, layout, 3, b"\xff" * RECORD_BYTES[layout])
    first.close()
    second = opened()
    assert second.listing() == Listing(object_ids=(3,), damaged=3, foreign=0)
    assert second.exists([1, 2, 3]) == [False, False, True]
    assert second.listing() == Listing(object_ids=(3,), damaged=0, foreign=0)
    write(second, KEYS, range(4, 10))
    assert [got(second, object_id) for object_id in (3, 4, 9)] == [content(object_id) for object_id in (3, 4, 9)]


def test_truncated_while_open(opened: Make, layout: str) -> None:
    """An object that the file no longer reaches to is an error that names file and offset; the store goes on."""
    store = opened()
    write(store, KEYS, [1, 2])
    path = data_file(store.root, layout)
    os.truncate(path, OBJECT_BYTES + 5000)
    with pytest.raises(ShortObjectError) as caught:
        got(store, 2)
    assert f"of {OBJECT_BYTES} bytes are there" in str(caught.value)
    assert str(caught.value.filename) == f"{path} at byte {OBJECT_BYTES}"
    assert got(store, 1) == content(1)
    write(store, KEYS, [2, 3], 1)
    assert [got(store, 2), got(store, 3)] == [content(2, 1), content(3, 1)]


def test_table_of_something_else_is_refused(opened: Make, layout: str) -> None:
    """Another size, another model, another version: the message names what differs, and nothing is changed."""
    store = opened()
    write(store, KEYS, [1])
    store.close()
    root, index = store.root, store.root / f"{layout}.index"
    before = {path: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(ConfigurationError, match=r"stored_bytes is 16384 here and was 12288 there .*--block-tokens"):
        opened(4 * 4096)
    with pytest.raises(ConfigurationError, match=r"tags is [0-9a-f]+ here and was [0-9a-f]+ there .*--tensor-paral"):
        opened(keys=ObjectKeys(NAMESPACES[0]))
    assert {path: path.read_bytes() for path in root.iterdir()} == before
    index.write_bytes(index.read_bytes().replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(ConfigurationError, match=rf"{index} .*version is 1 here and was 9 there"):
        opened()
    index.write_bytes(b"something else")
    with pytest.raises(ConfigurationError, match=rf"{index} is not a table"):
        opened()
    assert index.read_bytes() == b"something else"


def test_nothing_stays_open_after_a_refusal(opened: Make, layout: str) -> None:
    """A store that cannot be opened holds no file."""
    root = opened().root
    (root / f"{layout}.index").write_bytes(b"something else")
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would be open itself
    with pytest.raises(ConfigurationError):
        opened()
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - likewise


def test_file_sync_comes_before_the_record(opened: Make, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`WriteSync.FILE` syncs the data of each object before the table knows it."""
    store, known = opened(write_sync=WriteSync.FILE), list[int]()
    sync = os.fdatasync

    def watch(descriptor: int) -> None:
        sync(descriptor)
        known.append(sum(map(any, records(store.root, layout))))

    monkeypatch.setattr(os, "fdatasync", watch)
    write(store, KEYS, [1, 2, 3])
    assert known == [0, 1, 2]
    store.sync(2)
    assert len(known) == 3


def test_batch_sync_covers_all_that_was_written(opened: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """`WriteSync.BATCH`: one sync of the file is for all objects written before it, and for none written later."""
    store, syncs = opened(write_sync=WriteSync.BATCH), list[int]()
    sync = os.fdatasync

    def count(descriptor: int) -> None:
        if not syncs:
            write(store, KEYS, [4])  # while the first sync is under way
        syncs.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", count)
    write(store, KEYS, [1, 2, 3])
    assert syncs == []
    for object_id in (2, 1, 3, 2):
        store.sync(object_id)
    assert len(syncs) == 1
    store.sync(4)
    assert len(syncs) == 2
    write(store, KEYS, [2], 1)
    store.sync(2)
    assert len(syncs) == 3


def test_batch_sync_of_many_threads(opened: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that sync at once wait for one sync that covers them all; none returns before it has ended."""
    store, syncs = opened(write_sync=WriteSync.BATCH), list[int]()
    write(store, KEYS, [1, 2, 3, 4])
    sync, entered, leave = os.fdatasync, threading.Event(), threading.Event()
    ended: list[int] = []

    def wait(descriptor: int) -> None:
        entered.set()
        assert leave.wait(60)
        sync(descriptor)
        syncs.append(descriptor)

    def work(object_id: int) -> None:
        store.sync(object_id)
        ended.append(len(syncs))

    monkeypatch.setattr(os, "fdatasync", wait)
    threads = [threading.Thread(target=work, args=(object_id,)) for object_id in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    assert ended == []
    leave.set()
    for thread in threads:
        thread.join()
    assert (len(syncs), ended) == (1, [1, 1, 1, 1])


def test_failed_sync_is_not_forgotten(opened: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync that fails names the file and leaves what it was for unsynced; a write whose sync fails leaves nothing."""
    store, fails = opened(write_sync=WriteSync.BATCH), [True]
    synced: list[int] = []

    def fail(descriptor: int) -> None:
        if fails.pop():
            raise OSError(errno.EIO, "Input/output error")
        synced.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", fail)
    write(store, KEYS, [1])
    with pytest.raises(OSError, match=str(store.root)):
        store.sync(1)
    fails.append(False)
    store.sync(1)
    assert len(synced) == 1


def test_failed_write_sync_leaves_nothing(opened: Make, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write whose sync fails is none: the object is not there, in memory or in the table."""
    store = opened(write_sync=WriteSync.FILE)
    write(store, KEYS, [1])

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match=str(store.root)):
        write(store, KEYS, [2])
    assert store.exists([1, 2]) == [True, False]
    assert sum(map(any, records(store.root, layout))) == 1


def test_read_ahead_takes_no_neighbours(opened: Make) -> None:
    """A buffered read brings its own object into the page cache and none of the next."""
    store = opened(256 * 1024, direct=DirectMode.NEVER)
    write(store, KEYS, [1, 2, 3])
    if store.drop_page_cache([1, 2, 3]) is None:
        pytest.skip("it cannot be known here what the page cache holds")
    memory = aligned_memory(store.stored_bytes)
    cached = [store.read(object_id, memory).page_cache_bytes for object_id in (1, 2, 2)]
    assert cached == [0, 0, store.stored_bytes]


def test_probe_of_a_dead_process_is_removed(opened: Make) -> None:
    """The file with which direct I/O is tried is nobody's once its process has died; other files are foreign."""
    store = opened()
    (store.root / ".probe-0123abcd").touch()
    (store.root / "bucket-1").touch()
    (store.root / f"{data_file(Path(), 'slab')}.old").touch()
    assert store.listing().foreign == 2
    assert not (store.root / ".probe-0123abcd").exists()
