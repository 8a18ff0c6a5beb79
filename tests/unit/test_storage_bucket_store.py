"""Objects appended to buckets: how full they get, what a delete gives back, restarts, and what goes wrong."""

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import aligned_memory
from mlpstorage.storage.bucket_store import BUCKET_BYTES, BUCKET_OBJECTS, BucketStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.content import make_content
from mlpstorage.testing.suite_hooks import assert_holds, write

KEYS = ObjectKeys("tiny-1b|0|0")
OBJECT_BYTES = 5 * 4096 - 100
STORED_BYTES = 5 * 4096

OpenBuckets = Callable[..., BucketStore]


@pytest.fixture
def open_buckets(tmp_path: Path) -> Iterator[OpenBuckets]:
    """Opens stores of buckets of three objects, unless told otherwise, and closes them in the end."""
    opened: list[BucketStore] = []

    def open_one(
        root: Path = tmp_path / "objects",
        object_bytes: int = OBJECT_BYTES,
        bucket_objects: int = 3,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> BucketStore:
        opened.append(BucketStore(root, KEYS, object_bytes, bucket_objects=bucket_objects, bucket_bytes=bucket_bytes))
        opened[-1].open()
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def buckets(store: BucketStore) -> dict[int, int]:
    """The buckets that are there, by number, and the bytes of storage that each takes."""
    return {int(path.name[7:]): path.stat().st_blocks * 512 for path in sorted(store.root.glob("bucket-????????"))}


def places(store: BucketStore) -> dict[int | None, tuple[int, int]]:
    """Bucket and offset (in objects) of each object, as the table in its file says."""
    table = (store.root / "bucket.index").read_bytes()[4096:]
    found: dict[int | None, tuple[int, int]] = {}
    for key, number, offset_bytes in struct.iter_unpack("<16sQQ", table):
        if any(key):
            assert offset_bytes % STORED_BYTES == 0
            found[KEYS.object_id(key)] = number, offset_bytes // STORED_BYTES
    return found


def open_files(root: Path) -> list[str]:
    """Files below a directory that this process has open, also deleted ones."""
    found: list[str] = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists the directory
            found += [str(entry.readlink())]
    return [path for path in found if path.startswith(f"{root}/")]


def test_objects_are_appended(open_buckets: OpenBuckets) -> None:
    """Objects lie one behind the other in the order of writing; a full bucket is followed by the next."""
    store = open_buckets()
    write(store, KEYS, [5, 3, 4, 1, 2])
    assert places(store) == {5: (0, 0), 3: (0, 1), 4: (0, 2), 1: (1, 0), 2: (1, 1)}
    data = (store.root / "bucket-00000000").read_bytes()
    assert data == b"".join(make_content(KEYS, one, STORED_BYTES) for one in (5, 3, 4))
    assert sorted(path.name for path in store.root.iterdir()) == ["bucket-00000000", "bucket-00000001", "bucket.index"]


def test_bucket_takes_500_objects(open_buckets: OpenBuckets) -> None:
    """Of small objects a bucket takes 500."""
    store = open_buckets(object_bytes=4096, bucket_objects=BUCKET_OBJECTS)
    write(store, KEYS, range(500))
    assert list(buckets(store)) == [0]
    write(store, KEYS, [500])
    assert list(buckets(store)) == [0, 1]


@pytest.mark.parametrize(("limit_bytes", "objects"), [(3 * STORED_BYTES, 3), (4 * STORED_BYTES - 1, 3), (1, 1)])
def test_bucket_takes_so_many_bytes(open_buckets: OpenBuckets, limit_bytes: int, objects: int) -> None:
    """A bucket ends before it exceeds its limit, but takes one object at least."""
    store = open_buckets(bucket_objects=500, bucket_bytes=limit_bytes)
    write(store, KEYS, range(objects))
    assert list(buckets(store)) == [0]
    write(store, KEYS, [objects])
    assert list(buckets(store)) == [0, 1]


def test_room_of_a_bucket_is_reserved(open_buckets: OpenBuckets) -> None:
    """A bucket has its full size and its blocks from its first object on."""
    store = open_buckets()
    write(store, KEYS, [1])
    assert (store.root / "bucket-00000000").stat().st_size == 3 * STORED_BYTES <= buckets(store)[0]


def test_delete_gives_room_back(open_buckets: OpenBuckets) -> None:
    """A deleted object's blocks are free at once, its neighbours stay; a bucket without objects is removed."""
    store = open_buckets()
    write(store, KEYS, [1, 2, 3, 4])
    full_bytes = buckets(store)[0]
    store.delete(2)
    assert full_bytes - buckets(store)[0] == STORED_BYTES
    assert store.punches_holes
    assert_holds(store, KEYS, [1, 3, 4])
    store.delete(1)
    store.delete(3)
    assert list(buckets(store)) == [1]
    assert not any("bucket-00000000" in path for path in open_files(store.root))
    write(store, KEYS, [2])
    assert places(store) == {4: (1, 0), 2: (1, 1)}


def test_replaced_object_is_appended(open_buckets: OpenBuckets) -> None:
    """Nothing is written over: a new version is appended, and the old one's room given back."""
    store = open_buckets()
    write(store, KEYS, [1, 2])
    full_bytes = buckets(store)[0]
    write(store, KEYS, [1], 1)
    assert places(store) == {2: (0, 1), 1: (0, 2)}
    assert full_bytes - buckets(store)[0] == STORED_BYTES


def test_room_of_a_read_object_is_kept(open_buckets: OpenBuckets) -> None:
    """No hole is punched, and no bucket removed, under a reader; it is done when the last one has ended."""
    store = open_buckets()
    write(store, KEYS, [1, 2])
    first, second = store.begin_read(1), store.begin_read(1)
    full_bytes = buckets(store)[0]
    store.delete(1)
    store.delete(2)
    memory = aligned_memory(STORED_BYTES)
    os.preadv(first.descriptor, (memory,), first.offset_bytes)
    assert bytes(memory) == make_content(KEYS, 1, STORED_BYTES)
    assert buckets(store)[0] == full_bytes - STORED_BYTES
    store.end_read(first)
    assert list(buckets(store)) == [0]
    store.end_read(second)
    assert buckets(store) == {}


def test_write_that_is_given_up(open_buckets: OpenBuckets) -> None:
    """A place of a write that was given up is not used again, its room is given back, and an empty bucket removed."""
    store = open_buckets()
    store.abort_write(store.begin_write(1))
    assert buckets(store) == {}
    write(store, KEYS, [1])
    before_bytes = buckets(store)[1]
    store.abort_write(store.begin_write(2))
    write(store, KEYS, [2])
    assert places(store) == {1: (1, 0), 2: (1, 2)}
    assert buckets(store)[1] == before_bytes - STORED_BYTES


def test_restart(open_buckets: OpenBuckets) -> None:
    """After a restart objects are listed as written, holes and unused ends cost nothing, and a new bucket is begun."""
    first = open_buckets()
    write(first, KEYS, [9, 8, 7, 6, 5, 4, 3])
    first.delete(6)
    first.delete(5)
    first.delete(9)
    write(first, KEYS, [8], 1)
    first.close()
    (first.root / "bucket-00000007").write_bytes(bytes(4096))
    second = open_buckets()
    assert second.listing().object_ids == (7, 4, 3, 8)
    assert buckets(second) == {0: STORED_BYTES, 1: STORED_BYTES, 2: 2 * STORED_BYTES}
    write(second, KEYS, [1])
    assert places(second) == {7: (0, 2), 4: (1, 2), 3: (2, 0), 8: (2, 1), 1: (8, 0)}
    assert_holds(second, KEYS, [7, 4, 3, 1])
    assert_holds(second, KEYS, [8], 1)


def test_bucket_that_is_gone(open_buckets: OpenBuckets) -> None:
    """Objects of a bucket that somebody removed are damaged; the others are found."""
    first = open_buckets()
    write(first, KEYS, [1, 2, 3, 4])
    first.close()
    (first.root / "bucket-00000000").unlink()
    second = open_buckets()
    found = second.listing()
    assert (found.object_ids, found.damaged, found.foreign) == ((4,), 3, 0)
    write(second, KEYS, [1, 2, 3])
    assert_holds(second, KEYS, [1, 2, 3, 4])


@pytest.mark.parametrize("left_bytes", [None, 0, 300, 4096 + 32 + 7])
def test_buckets_without_their_table_are_refused(open_buckets: OpenBuckets, left_bytes: int | None) -> None:
    """Where the table is lost, empty or cut off the message names it and says what to do; no bucket is touched."""
    first = open_buckets()
    write(first, KEYS, range(7))
    first.close()
    index = first.root / "bucket.index"
    if left_bytes is None:
        index.unlink()
    else:
        os.truncate(index, left_bytes)
    before = {path.name: path.read_bytes() for path in first.root.iterdir()}
    with pytest.raises(ConfigurationError, match=rf"{index} .*remove the directory by hand.*--cache-dir"):
        open_buckets()
    assert {path.name: path.read_bytes() for path in first.root.iterdir()} == before
    assert open_files(first.root) == []


def test_other_limits_after_a_restart(open_buckets: OpenBuckets) -> None:
    """Limits are of new buckets: objects that were written under others are found."""
    first = open_buckets(bucket_objects=5)
    write(first, KEYS, range(7))
    first.close()
    second = open_buckets(bucket_objects=2)
    write(second, KEYS, range(7, 10))
    assert list(buckets(second)) == [0, 1, 2, 3]
    assert_holds(second, KEYS, range(10))


def test_few_buckets_are_held_open(open_buckets: OpenBuckets) -> None:
    """Of many buckets 256 are open; the others are opened again where they are read, by several threads at once too."""
    store = open_buckets(object_bytes=4096, bucket_objects=1)
    write(store, KEYS, range(270))
    assert len(buckets(store)) == 270
    assert len(open_files(store.root)) == 256 + 1
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                assert_holds(store, KEYS, range(270))
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(open_files(store.root)) == 256 + 1
    transfers = [store.begin_read(object_id) for object_id in range(270)]
    assert len({transfer.descriptor for transfer in transfers}) == 270
    for transfer in transfers:
        store.end_read(transfer)
    store.close()
    assert open_files(store.root) == []


@pytest.mark.parametrize("small_file_system", [("tmpfs", "size=1m")], indirect=True)
def test_full_file_system(small_file_system: Path, open_buckets: OpenBuckets) -> None:
    """Where a bucket's space cannot be reserved objects are stored all the same, up to the one that finds no room."""
    store = open_buckets(small_file_system / "objects", bucket_objects=500)
    written = 0
    with pytest.raises(OSError) as caught:  # noqa: PT011, PT012 - its errno is looked at; not the first write fails
        while written < 500:
            write(store, KEYS, [written])
            written += 1
    assert caught.value.errno == errno.ENOSPC
    assert 0.9 * (1 << 20) < written * STORED_BYTES <= 1 << 20
    assert store.exists([written]) == [False]
    assert_holds(store, KEYS, range(written))
    store.delete(0)
    store.delete(1)
    write(store, KEYS, [written])
    assert_holds(store, KEYS, range(2, written + 1))
    store.close()


@pytest.mark.parametrize("small_file_system", [("ramfs", "mode=700")], indirect=True)
def test_file_system_without_holes(small_file_system: Path, open_buckets: OpenBuckets) -> None:
    """Where no holes can be punched a delete gives nothing back, and the store says so; the last one does."""
    store = open_buckets(small_file_system / "objects")
    write(store, KEYS, [1, 2, 3])
    for object_id in (1, 2):
        store.delete(object_id)
    assert not store.punches_holes
    assert_holds(store, KEYS, [3])
    store.delete(3)
    assert buckets(store) == {}
    store.close()


def test_directory_that_vanishes(open_buckets: OpenBuckets) -> None:
    """A bucket that cannot be made is an error that names it; nothing is thought to be there."""
    store = open_buckets()
    write(store, KEYS, [1, 2, 3])
    for path in store.root.iterdir():
        path.unlink()
    store.root.rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        write(store, KEYS, [4])
    assert caught.value.filename == str(store.root / "bucket-00000001")
    assert store.exists([4]) == [False]
