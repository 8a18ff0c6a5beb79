"""Stores on file systems that really fail: full, read-only, shut down, on a broken device, gone, cut off."""

import errno
import fcntl
import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest

from mlpstorage.config import MIB, PAGE_BYTES, DirectMode, IoEngineName, Verify
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import BlockStore, ShortObjectError, aligned_memory
from mlpstorage.storage.bucket_store import BucketStore
from mlpstorage.storage.descriptor import DescriptorStore
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.ops import IoEngine, Lane, OpDone, OpKind
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import IoPool
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.storage.uring import UringEngine, probe_uring
from mlpstorage.testing.content import make_content
from mlpstorage.testing.io_rig import WAIT_S
from mlpstorage.testing.io_suite import each
from mlpstorage.testing.suite_hooks import assert_gone, assert_holds, files_below, write
from tests.conformance.conftest import Mount

KEYS = ObjectKeys("tiny-1b|0|full")
OBJECT_BYTES = 384 * 1024
FILE_SYSTEM_BYTES = 64 * MIB

_EXT4_IOC_SHUTDOWN = 0x8004587D
"""_IOR('X', 125, __u32) of fs/ext4/ext4.h: the file system answers EIO from now on, as after a fatal error."""
_SHUTDOWN_WITHOUT_LOG = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH."""

Make = Callable[..., BlockStore]


def make_file(place: Path, objects: int, direct: DirectMode = DirectMode.AUTO) -> BlockStore:
    """Layout `file`, which has no fixed room."""
    del objects
    return FileStore(place, KEYS, OBJECT_BYTES, direct=direct)


def make_slab(place: Path, objects: int, direct: DirectMode = DirectMode.AUTO) -> BlockStore:
    """Layout `slab`."""
    return SlabStore(place, KEYS, OBJECT_BYTES, slots=objects, direct=direct)


def make_bucket(place: Path, objects: int, direct: DirectMode = DirectMode.AUTO) -> BlockStore:
    """Layout `bucket`, eight objects a file."""
    del objects
    return BucketStore(place, KEYS, OBJECT_BYTES, direct=direct, bucket_objects=8)


MAKERS: dict[str, Make] = {"bucket": make_bucket, "file": make_file, "slab": make_slab}
ROOMY = sorted(MAKERS.keys() - {"slab"})
"""Layouts that take space as they need it."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system on a loop device.

    Attributes:
        root: Where it is mounted.
        image: The file that stands for the device.
    """

    root: Path
    image: Path

    def remount(self, options: str) -> None:
        """Change how it is mounted."""
        subprocess.run(["/bin/mount", "-o", f"remount,{options}", str(self.root)], check=True)


@pytest.fixture
def ext4(tmp_path: Path, mount: Mount) -> Disk:
    """An ext4 file system on a loop device."""
    image = tmp_path / "device"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, FILE_SYSTEM_BYTES)
    program = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        pytest.skip("there is no mkfs.ext4 here")
    subprocess.run([program, "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
    return Disk(mount("-o", "loop", str(image)), image)


@pytest.fixture
def small_tmpfs(mount: Mount) -> Path:
    """A small file system in memory."""
    return mount("-t", "tmpfs", "-o", f"size={FILE_SYSTEM_BYTES}", "none")


@pytest.fixture(params=sorted(MAKERS))
def make(request: pytest.FixtureRequest) -> Make:
    """Makes stores of a layout."""
    return MAKERS[request.param]


@pytest.fixture(params=["tmpfs", "ext4"])
def full_root(request: pytest.FixtureRequest) -> Path:
    """The root of a small file system."""
    if request.param == "tmpfs":
        root: Path = request.getfixturevalue("small_tmpfs")
        return root
    disk: Disk = request.getfixturevalue("ext4")
    return disk.root


@pytest.mark.parametrize("layout", ROOMY)
def test_full_file_system(layout: str, full_root: Path) -> None:
    """A write that finds no space fails with ENOSPC and leaves nothing; what was there stays, and room can be made."""
    store = MAKERS[layout](full_root / "objects", objects=1000)
    store.open()
    written = _written_until_full(store)
    failed = len(written)
    # A file system needs some of its room itself, and a bucket is not begun where it cannot be filled.
    assert 0.8 * FILE_SYSTEM_BYTES / store.stored_bytes < failed <= FILE_SYSTEM_BYTES / store.stored_bytes
    things = _things(full_root)
    with pytest.raises(OSError, match="No space left") as caught:
        write(store, KEYS, [failed])
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename
    assert _things(full_root) == things
    assert_gone(store, [failed])
    assert_holds(store, KEYS, written)
    for object_id in written[:8]:
        store.delete(object_id)
    write(store, KEYS, [failed, failed + 1])
    assert_holds(store, KEYS, [*written[8:], failed, failed + 1])
    store.close()


def _written_until_full(store: BlockStore) -> list[int]:
    written: list[int] = []
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - which write it will be is not known
        for object_id in range(1000):
            write(store, KEYS, [object_id])
            written.append(object_id)
    return written


def test_slab_takes_its_room_at_once(full_root: Path) -> None:
    """A slab that does not fit is refused when it is opened; one that does can be filled, whoever takes the rest."""
    with pytest.raises(ConfigurationError, match="1000 slots"):
        make_slab(full_root / "too large", objects=1000).open()
    assert shutil.disk_usage(full_root).free > 0.8 * FILE_SYSTEM_BYTES, "what was refused keeps its room"
    store = make_slab(full_root / "objects", objects=64)
    store.open()
    with (full_root / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        filler.writelines(itertools.repeat(bytes(MIB)))
    write(store, KEYS, range(64))
    with pytest.raises(OSError, match="slots are taken") as caught:
        write(store, KEYS, [64])
    assert caught.value.errno == errno.ENOSPC
    assert_holds(store, KEYS, range(64))
    store.close()


def _things(root: Path) -> list[tuple[str, int]]:
    return [(str(path), path.stat().st_size) for path in files_below(root)]


@pytest.mark.parametrize("layout", ROOMY)
def test_capacity_is_that_of_the_file_system(layout: str, ext4: Disk) -> None:
    """A file system that nobody else uses has less room after writes, and all of it again after the deletes."""
    store = MAKERS[layout](ext4.root / "objects", objects=16)
    store.open()
    before = store.capacity()
    write(store, KEYS, range(8))
    written = store.capacity()
    for object_id in range(8):
        store.delete(object_id)
    assert before.free_bytes is not None
    assert written.free_bytes is not None
    # Eight objects are a full bucket; its table takes a page.
    assert 0 <= before.free_bytes - written.free_bytes - 8 * store.stored_bytes <= PAGE_BYTES
    found = os.statvfs(ext4.root)
    assert store.capacity().free_bytes == found.f_bavail * found.f_frsize
    assert 0 <= before.free_bytes - found.f_bavail * found.f_frsize <= PAGE_BYTES
    store.close()


@pytest.mark.parametrize("engine_name", list(IoEngineName))
def test_read_error_of_the_device(make: Make, ext4: Disk, engine_name: IoEngineName) -> None:
    """A device that cannot read one object any more gives EIO for that one, which is named; others are read.

    The loop device answers EIO for what lies beyond the end of its file.
    """
    ids = range(16)
    store = make(ext4.root / "objects", objects=16)
    store.open()
    write(store, KEYS, ids)
    store.close()
    subprocess.run(["/bin/sync", "-f", str(ext4.root)], check=True)
    store = make(ext4.root / "objects", objects=16)
    store.open()
    assert sorted(store.listing().object_ids) == list(ids)
    image = ext4.image.read_bytes()
    at_bytes = [image.find(make_content(KEYS, one, PAGE_BYTES)) for one in ids]
    assert min(at_bytes) > 0
    last = max(ids, key=at_bytes.__getitem__)
    store.drop_page_cache(ids)
    os.truncate(ext4.image, at_bytes[last])
    with pytest.raises(OSError, match="Input/output error") as caught:
        store.read(last, aligned_memory(store.stored_bytes))
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, ShortObjectError)
    assert caught.value.filename
    for done in _read_all(engine_name, store, ids):
        if done.op.object_id == last:
            assert isinstance(done.error, OSError)
            assert done.error.errno == errno.EIO
            assert done.error.filename == caught.value.filename
            assert done.verified_bytes == 0
        else:
            assert done.error is None
            assert done.verified_bytes == store.stored_bytes
    store.close()


def _read_all(engine_name: IoEngineName, store: BlockStore, ids: Sequence[int]) -> list[OpDone]:
    """Read objects through an I/O engine, every byte verified."""
    payload = Payload(KEYS, store.stored_bytes, Verify.FULL)
    engine: IoEngine
    if engine_name is IoEngineName.THREADS:
        engine = IoPool(store, payload, None, 4)
    else:
        refusal = probe_uring()
        if refusal is not None:
            pytest.skip(refusal)
        assert isinstance(store, DescriptorStore)
        engine = UringEngine(store, payload, None, 4)
    finished: SimpleQueue[list[OpDone]] = SimpleQueue()
    engine.start()
    engine.submit(each(OpKind.READ, ids), Lane.LOAD, finished.put)
    done = finished.get(timeout=WAIT_S)
    engine.close()
    return done


def test_file_system_that_is_shut_down(make: Make, ext4: Disk) -> None:
    """After a fatal error of the file system writes fail with EIO, in bounded time and with the place; none counts."""
    store = make(ext4.root / "objects", objects=16)
    store.open()
    write(store, KEYS, [1, 2])
    descriptor = os.open(ext4.root, os.O_RDONLY)
    fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _SHUTDOWN_WITHOUT_LOG))
    os.close(descriptor)
    memory = aligned_memory(store.stored_bytes)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error") as caught:
            store.write(3, memory)
        assert caught.value.errno == errno.EIO
        assert caught.value.filename
    with pytest.raises(OSError, match="Input/output error"):
        store.read(1, memory)
    store.close()


def test_file_system_that_becomes_read_only(ext4: Disk) -> None:
    """Writes and deletes fail with EROFS and leave nothing, reads go on; made writable again, so do writes.

    With `file` alone: the others keep files open for writing, and the kernel refuses to make their file system
    read-only as long as they do.
    """
    store = make_file(ext4.root / "objects", objects=16)
    store.open()
    write(store, KEYS, [1, 2])
    things = _things(ext4.root)
    ext4.remount("ro")
    calls: list[Callable[[], object]] = [lambda: write(store, KEYS, [3]), lambda: store.delete(1)]
    for call in calls:
        with pytest.raises(OSError, match="Read-only file system") as caught:
            call()
        assert caught.value.errno == errno.EROFS
        assert caught.value.filename
    assert_holds(store, KEYS, [1, 2])
    ext4.remount("rw")
    assert _things(ext4.root) == things
    write(store, KEYS, [3])
    store.delete(1)
    assert_holds(store, KEYS, [2, 3])
    store.close()


def test_read_only_file_system(make: Make, ext4: Disk) -> None:
    """A place that cannot be written is refused when the store is opened; what is in it stays."""
    store = make(ext4.root / "objects", objects=16)
    store.open()
    write(store, KEYS, [1, 2])
    store.close()
    things = _things(ext4.root)
    ext4.remount("ro")
    with pytest.raises(OSError, match="Read-only file system") as caught:
        make(ext4.root / "objects", objects=16).open()
    assert caught.value.errno == errno.EROFS
    assert caught.value.filename
    ext4.remount("rw")
    assert _things(ext4.root) == things


def test_file_system_that_gives_up(make: Make, ext4: Disk) -> None:
    """Where the file system itself goes read-only after an error, writes fail, also those to files that are open."""
    store = make(ext4.root / "objects", objects=16)
    store.open()
    write(store, KEYS, [1, 2])
    ext4.remount("abort")
    for _ in range(2):
        with pytest.raises(OSError, match=r"Read-only file system|Input/output error") as caught:
            write(store, KEYS, [3])
        assert caught.value.errno in {errno.EROFS, errno.EIO}
        assert caught.value.filename
    assert store.exists([3]) == [False]
    store.close()


def test_directory_that_vanishes(tmp_path: Path) -> None:
    """Once its directory is gone `file` finds nothing and writes nothing, and does not make the directory anew."""
    place = tmp_path / "objects"
    store = make_file(place, objects=16)
    store.open()
    write(store, KEYS, [1, 2])
    shutil.rmtree(place)
    assert store.exists([1, 2]) == [False, False]
    calls: list[Callable[[], object]] = [
        lambda: store.read(1, aligned_memory(store.stored_bytes)),
        lambda: write(store, KEYS, [3]),
        lambda: store.delete(2),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert caught.value.filename
    assert not place.exists()
    store.close()


@pytest.mark.parametrize("layout", ["bucket", "slab"])
def test_directory_that_vanishes_below_open_files(layout: str, tmp_path: Path) -> None:
    """Files that are held open stay until they are closed: what was written is read, and nothing is made anew."""
    place = tmp_path / "objects"
    store = MAKERS[layout](place, objects=16)
    store.open()
    write(store, KEYS, [1, 2])
    shutil.rmtree(place)
    assert_holds(store, KEYS, [1, 2])
    write(store, KEYS, [3])
    assert_holds(store, KEYS, [3])
    assert not place.exists()
    store.close()
    again = MAKERS[layout](place, objects=16)
    again.open()
    assert again.listing().object_ids == ()
    again.close()


def test_bucket_that_cannot_be_begun(tmp_path: Path) -> None:
    """Once the directory is gone, the write that needs the next bucket fails, and no later one is lost silently."""
    place = tmp_path / "objects"
    store = make_bucket(place, objects=16)
    store.open()
    write(store, KEYS, range(4))
    shutil.rmtree(place)
    write(store, KEYS, range(4, 8))
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            write(store, KEYS, [8])
    assert_holds(store, KEYS, range(8))
    store.close()


@pytest.mark.parametrize("open_again", [False, True])
def test_slab_that_is_truncated(tmp_path: Path, *, open_again: bool) -> None:
    """Objects behind the cut are errors while the store is open, and damaged when it is opened anew; others stay."""
    place = tmp_path / "objects"
    store = make_slab(place, objects=8)
    store.open()
    write(store, KEYS, range(8))
    (slab,) = (path for path in files_below(place) if path.stat().st_size >= 8 * store.stored_bytes)
    slots = {one: slab.read_bytes().find(make_content(KEYS, one, store.stored_bytes)) for one in range(8)}
    in_order = sorted(slots, key=slots.__getitem__)
    os.truncate(slab, slots[in_order[5]] + 4096)
    if open_again:
        store.close()
        store = make_slab(place, objects=8)
        store.open()
        found = store.listing()
        assert sorted(found.object_ids) == sorted(in_order[:5])
        assert (found.damaged, found.foreign) == (3, 0)
    else:
        memory = aligned_memory(store.stored_bytes)
        for object_id in in_order[5:]:
            with pytest.raises(ShortObjectError):
                store.read(object_id, memory)
            store.delete(object_id)
    assert_holds(store, KEYS, in_order[:5])
    write(store, KEYS, [20, 21, 22])
    assert_holds(store, KEYS, [*in_order[:5], 20, 21, 22])
    store.close()


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_file_system_without_direct_io(make: Make, mount: Mount, kind: str) -> None:
    """Where nothing can be moved directly `auto` goes through the page cache, and `always` refuses to begin."""
    root = mount("-t", kind, "-o", "mode=700", "none")
    with pytest.raises(ConfigurationError, match="--direct always"):
        make(root / "always", objects=16, direct=DirectMode.ALWAYS).open()
    store = make(root / "auto", objects=16)
    store.open()
    assert not store.capabilities.direct
    write(store, KEYS, [1])
    assert_holds(store, KEYS, [1])
    assert store.read(1, aligned_memory(store.stored_bytes)).direct is False
    store.close()
