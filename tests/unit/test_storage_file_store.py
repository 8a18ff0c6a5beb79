"""Objects as files: layout, direct I/O, what a listing finds, and what goes wrong."""

import ctypes
import errno
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpstorage.config import DirectMode, WriteSync
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import BlockStore, Moved, ShortObjectError, aligned_memory
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys

NAMESPACE = "tiny-1b|0|0"
KEYS = ObjectKeys(NAMESPACE)
OBJECT_BYTES = 393_216
SMALL_BYTES = 12_288
PAGE_BYTES = 4096
DIGITS = "0123456789abcdef"
LEVELS: list[tuple[int, ...]] = [(1, 1), (3, 2), ()]

Mount = Callable[[str, str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system of a type and with options; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount_one(kind: str, options: str) -> Path:
        target = tmp_path / f"mounted-{len(mounted)}"
        target.mkdir()
        done = subprocess.run(
            ["/bin/mount", "-t", kind, "-o", options, "none", str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"{kind} cannot be mounted here: {done.stderr.strip()}")
        mounted.append(target)
        return target

    yield mount_one
    for target in mounted:
        subprocess.run(["/bin/umount", str(target)], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 file system in a file (a loop device): the file, and where it is mounted."""
    backing, target = tmp_path / "image", tmp_path / "loop"
    backing.touch()
    os.truncate(backing, 16 << 20)
    target.mkdir()
    mkfs = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin")
    if mkfs is None:
        pytest.skip("there is no mkfs.ext4")
    subprocess.run([mkfs, "-q", "-O", "^has_journal", str(backing)], check=True)
    done = subprocess.run(
        ["/bin/mount", "-o", "loop", str(backing), str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a loop device cannot be mounted here: {done.stderr.strip()}")
    yield backing, target
    subprocess.run(["/bin/umount", str(target)], check=True)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """An open store of objects of 384 KiB."""
    return opened(tmp_path / "objects")


def opened(
    root: Path,
    object_bytes: int = OBJECT_BYTES,
    *,
    direct: DirectMode = DirectMode.AUTO,
    write_sync: WriteSync = WriteSync.NONE,
    levels: tuple[int, ...] = (1, 1),
) -> FileStore:
    """An open store."""
    store = FileStore(root, KEYS, object_bytes, direct=direct, write_sync=write_sync, levels=levels)
    store.open()
    return store


def random_object(stored_bytes: int = OBJECT_BYTES) -> memoryview:
    """Memory for direct I/O with random bytes in it."""
    memory = aligned_memory(stored_bytes)
    memory[:] = os.urandom(stored_bytes)
    return memory


def stamped_object(object_id: int, stored_bytes: int = SMALL_BYTES, keys: ObjectKeys = KEYS) -> memoryview:
    """The same, with each page's stamp and number at its beginning."""
    memory = random_object(stored_bytes)
    for page in range(stored_bytes // PAGE_BYTES):
        struct.pack_into("<QQ", memory, page * PAGE_BYTES, keys.stamp(object_id), page)
    return memory


def files_below(root: Path) -> list[Path]:
    """All files in a tree."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def device_read_bytes() -> int:
    """Bytes that this process had read from devices, as the kernel counts them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


def open_flags(descriptor: int) -> int:
    """What a file was opened with, as the kernel tells it."""
    fields = dict(
        line.split(":\t") for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    )
    return int(fields["flags"], 8)


def dirty_pages(path: Path) -> int:
    """Pages of a file that are not yet on storage, as cachestat(2) tells."""
    part, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        if ctypes.CDLL(None).syscall(451, file.fileno(), part, found, 0):
            pytest.skip("this kernel has no cachestat")
    return found[1] + found[2]


def on_a_device(store: FileStore) -> bool:
    """Whether the store's files are on a block device that takes direct I/O."""
    return store.direct and os.major(store.root.stat().st_dev) != 0


def test_store_fulfils_the_contract(store: FileStore) -> None:
    """The store is a `BlockStore`, for mypy and at run time."""
    contract: BlockStore = store
    assert contract.object_bytes == contract.stored_bytes == OBJECT_BYTES
    assert contract.capabilities.direct is store.direct
    assert contract.capabilities.lasting


@pytest.mark.parametrize("levels", LEVELS)
def test_round_trip(tmp_path: Path, levels: tuple[int, ...]) -> None:
    """What is written is what the file holds and what is read."""
    store = opened(tmp_path / "objects", levels=levels)
    written = random_object()
    assert store.write(3, written) == Moved(direct=store.direct)
    assert store.path(3).read_bytes() == bytes(written)
    found = aligned_memory(OBJECT_BYTES)
    assert store.read(3, found).direct is store.direct
    assert found == written


@pytest.mark.parametrize("levels", LEVELS)
def test_layout(tmp_path: Path, levels: tuple[int, ...]) -> None:
    """An object is one file, named by its key, below directories of the key's first digits."""
    store = opened(tmp_path / "objects", levels=levels)
    store.write(2**64 - 1, random_object())
    name = KEYS.key(2**64 - 1).hex()
    parts = {(1, 1): (name[0], name[1], name), (3, 2): (name[:3], name[3:5], name), (): (name,)}[levels]
    path = store.root.joinpath(*parts)
    assert files_below(store.root) == [path] == [store.path(2**64 - 1)]
    assert path.stat().st_size == OBJECT_BYTES


def test_directories_are_made_beforehand(store: FileStore) -> None:
    """Opening makes all 16 times 16 directories and leaves no other file behind; opening again is harmless."""
    store.open()
    assert sorted(path.name for path in store.root.iterdir()) == list(DIGITS)
    assert all(sorted(path.name for path in (store.root / digit).iterdir()) == list(DIGITS) for digit in DIGITS)
    assert files_below(store.root) == []


def test_many_directories_are_made_as_they_are_needed(tmp_path: Path) -> None:
    """Of a million directories those are made that objects lie in, also by threads that need the same ones at once."""
    store = opened(tmp_path / "objects", SMALL_BYTES, levels=(3, 2))
    assert list(store.root.iterdir()) == []
    together = threading.Barrier(4)
    failures: list[Exception] = []

    def write(first: int) -> None:
        for number in range(32):
            together.wait()
            try:
                store.write(number * 4 + first, random_object(SMALL_BYTES))
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files_below(store.root) == sorted(store.path(number) for number in range(128))
    assert {path.name for path in store.root.iterdir()} == {KEYS.name(number)[:3] for number in range(128)}


def test_object_of_odd_size_is_padded(tmp_path: Path) -> None:
    """A block of 1,124,352 bytes is stored and read as 275 pages."""
    store = opened(tmp_path / "objects", 1_124_352)
    assert (store.object_bytes, store.stored_bytes) == (1_124_352, 1_126_400)
    written, found = random_object(1_126_400), aligned_memory(1_126_400)
    store.write(1, written)
    assert store.path(1).stat().st_size == 1_126_400
    store.read(1, found)
    assert found == written


def test_direct_reads_come_from_the_device(store: FileStore) -> None:
    """Each direct read moves the object from the device, though it was just written: nothing is cached."""
    if not on_a_device(store):
        pytest.skip("the temporary directory is not on a block device that takes direct I/O")
    store.write(1, random_object())
    memory = aligned_memory(OBJECT_BYTES)
    before = device_read_bytes()
    assert [store.read(1, memory) for _ in range(3)] == [Moved(direct=True, page_cache_bytes=0)] * 3
    assert device_read_bytes() - before >= 3 * OBJECT_BYTES


@pytest.mark.parametrize("mode", list(DirectMode))
def test_files_are_opened_as_the_mode_says(tmp_path: Path, mode: DirectMode) -> None:
    """Files are opened for direct I/O, for reading and for writing, unless the mode is `never`."""
    if not on_a_device(opened(tmp_path / "tried")):
        pytest.skip("the temporary directory is not on a block device that takes direct I/O")
    store = opened(tmp_path / "objects", direct=mode)
    expected = mode is not DirectMode.NEVER
    store.write(1, random_object())
    for begin, end in ((store.begin_read, store.end_read), (store.begin_write, store.abort_write)):
        transfer = begin(1)
        assert bool(open_flags(transfer.descriptor) & os.O_DIRECT) is expected
        end(transfer)
    assert store.direct is store.capabilities.direct is expected
    assert store.direct_refusal is None


def test_buffered_reads_tell_what_was_cached(tmp_path: Path) -> None:
    """A buffered read tells how much of the object the page cache held; what is dropped no longer counts."""
    store = opened(tmp_path / "objects", direct=DirectMode.NEVER)
    if os.major(store.root.stat().st_dev) == 0:
        pytest.skip("the temporary directory is not on a block device, whose pages can be dropped")
    memory = aligned_memory(OBJECT_BYTES)
    assert store.write(1, random_object()) == Moved(direct=False)
    assert store.read(1, memory) == Moved(direct=False, page_cache_bytes=OBJECT_BYTES)
    before = device_read_bytes()
    assert store.drop_page_cache([1, 2]) == OBJECT_BYTES  # object 2 is not there
    assert store.drop_page_cache([1, 2]) == 0
    assert store.read(1, memory) == Moved(direct=False, page_cache_bytes=0)
    assert device_read_bytes() - before >= OBJECT_BYTES
    assert store.read(1, memory).page_cache_bytes == OBJECT_BYTES


def test_dropping_the_page_cache_of_many_objects(tmp_path: Path) -> None:
    """The bytes dropped are those of all objects, more than one thread's share of them."""
    store = opened(tmp_path / "objects", SMALL_BYTES, direct=DirectMode.NEVER)
    if os.major(store.root.stat().st_dev) == 0:
        pytest.skip("the temporary directory is not on a block device, whose pages can be dropped")
    for object_id in range(300):
        store.write(object_id, random_object(SMALL_BYTES))
    assert store.drop_page_cache(range(400)) == 300 * SMALL_BYTES


@pytest.mark.parametrize("mode", [DirectMode.NEVER, DirectMode.AUTO])
def test_writes_are_synced_as_asked(tmp_path: Path, mode: DirectMode) -> None:
    """With `file` the object is on storage when the write returns, with `batch` when `sync` does, with `none` later."""
    for write_sync in WriteSync:
        store = opened(tmp_path / write_sync, direct=mode, write_sync=write_sync)
        if os.major(store.root.stat().st_dev) == 0:
            pytest.skip("the temporary directory is not on a block device")
        store.write(1, random_object())
        expected = 0 if store.direct or write_sync is WriteSync.FILE else OBJECT_BYTES // os.sysconf("SC_PAGESIZE")
        assert dirty_pages(store.path(1)) == expected
        store.sync(1)
        assert dirty_pages(store.path(1)) == 0
        with pytest.raises(FileNotFoundError):
            store.sync(2)


def test_writing_again_replaces(store: FileStore) -> None:
    """A second write of an object takes the first one's place."""
    store.write(1, random_object())
    second = random_object()
    store.write(1, second)
    assert [path.read_bytes() for path in files_below(store.root)] == [bytes(second)]


def test_delete(store: FileStore) -> None:
    """A deleted object is gone; deleting or reading what is not there is an error."""
    store.write(1, random_object())
    assert store.delete(1) == Moved(direct=None)
    assert files_below(store.root) == []
    with pytest.raises(FileNotFoundError):
        store.delete(1)
    with pytest.raises(FileNotFoundError) as caught:
        store.read(1, aligned_memory(OBJECT_BYTES))
    assert caught.value.filename == str(store.path(1))


def test_exists(store: FileStore) -> None:
    """A batch of objects is looked up in its order; one that is being written is not there."""
    for object_id in (1, 2**64 - 1):
        store.write(object_id, random_object())
    transfer = store.begin_write(4)
    assert store.exists([0, 1, 2**64 - 1, 4, 1]) == [False, True, True, False, True]
    store.abort_write(transfer)
    assert store.exists([]) == []


@pytest.mark.parametrize("left_bytes", [0, 1, 1000, 4096, 5000, 200_704, OBJECT_BYTES - 1])
def test_truncated_object_is_an_error(store: FileStore, left_bytes: int) -> None:
    """An object that lost its end is not taken for a whole one, wherever it was cut."""
    store.write(1, random_object())
    os.truncate(store.path(1), left_bytes)
    with pytest.raises(ShortObjectError) as caught:
        store.read(1, aligned_memory(OBJECT_BYTES))
    assert f"{left_bytes} of {OBJECT_BYTES} bytes" in str(caught.value)
    assert caught.value.filename == str(store.path(1))


def test_threads_may_write_one_object_at_once(store: FileStore) -> None:
    """Several writers of one object end with one whole object of one of them."""
    objects = [random_object() for _ in range(4)]
    together = threading.Barrier(len(objects))

    def write(memory: memoryview) -> None:
        for _ in range(10):
            together.wait()
            store.write(1, memory)

    threads = [threading.Thread(target=write, args=(memory,)) for memory in objects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = files_below(store.root)
    assert path.read_bytes() in [bytes(memory) for memory in objects]


@pytest.mark.parametrize("levels", LEVELS)
def test_listing_finds_whole_objects_oldest_first(tmp_path: Path, levels: tuple[int, ...]) -> None:
    """A second store finds what a first one wrote, in the order of the files' times, and reads it."""
    first = opened(tmp_path / "objects", SMALL_BYTES, levels=levels)
    written = {object_id: stamped_object(object_id) for object_id in (7, 2**64 - 1, 0, *range(100, 150))}
    for place, (object_id, memory) in enumerate(written.items()):
        first.write(object_id, memory)
        os.utime(first.path(object_id), ns=(0, 10**18 - place))
    second = opened(tmp_path / "objects", SMALL_BYTES, levels=levels)
    listing = second.listing()
    assert listing.object_ids == tuple(reversed(written))
    assert (listing.damaged, listing.foreign) == (0, 0)
    found = aligned_memory(SMALL_BYTES)
    for object_id, memory in written.items():
        second.read(object_id, found)
        assert found == memory


def test_listing_of_more_than_one_part(tmp_path: Path) -> None:
    """In a flat directory threads take parts of the entries; together these are all."""
    store = opened(tmp_path / "objects", PAGE_BYTES, levels=())
    for object_id in range(2500):
        store.path(object_id).write_bytes(stamped_object(object_id, PAGE_BYTES))
    listing = store.listing()
    assert sorted(listing.object_ids) == list(range(2500))


def test_listing_of_nothing(store: FileStore) -> None:
    """A fresh store lists nothing."""
    listing = store.listing()
    assert (listing.object_ids, listing.damaged, listing.foreign) == ((), 0, 0)


@pytest.mark.parametrize("mode", [DirectMode.AUTO, DirectMode.NEVER])
@pytest.mark.parametrize("levels", LEVELS)
def test_listing_removes_what_is_damaged(tmp_path: Path, levels: tuple[int, ...], mode: DirectMode) -> None:
    """Objects of a wrong size or with other stamps on the first or last page go, and so does what was half written."""
    store = opened(tmp_path / "objects", SMALL_BYTES, levels=levels, direct=mode)
    for object_id in range(8):
        store.write(object_id, stamped_object(object_id))
    paths = [store.path(object_id) for object_id in range(8)]
    os.truncate(paths[0], SMALL_BYTES - 1)
    os.truncate(paths[1], 0)
    with paths[2].open("ab") as file:
        file.write(b"more")
    paths[3].write_bytes(stamped_object(4))
    last_lost = stamped_object(4)
    last_lost[-PAGE_BYTES:] = bytes(PAGE_BYTES)
    paths[4].write_bytes(last_lost)
    swapped = stamped_object(5)
    struct.pack_into("<Q", swapped, 8, 1)
    paths[5].write_bytes(swapped)
    half = paths[6].with_name(f"{paths[6].name}.0123abcd-17.tmp")
    half.write_bytes(stamped_object(6))
    (store.root / ".probe-0123abcd").write_bytes(b"probe")
    listing = store.listing()
    assert sorted(listing.object_ids) == [6, 7]
    assert (listing.damaged, listing.foreign) == (7, 0)
    assert files_below(store.root) == sorted(paths[6:])
    again = store.listing()
    assert sorted(again.object_ids) == [6, 7]
    assert (again.damaged, again.foreign) == (0, 0)


@pytest.mark.parametrize("levels", LEVELS)
def test_listing_leaves_what_is_foreign(tmp_path: Path, levels: tuple[int, ...]) -> None:
    """What is not this store's is counted and left alone: other names, other namespaces, links, wrong places."""
    store = opened(tmp_path / "objects", SMALL_BYTES, levels=levels)
    store.write(1, stamped_object(1))
    leaf = store.path(1).parent
    other = ObjectKeys("llama2-7b|0|0")
    foreign = [
        leaf / "notes.txt",
        leaf / other.name(1),
        leaf / store.path(2).name.upper(),
        leaf / f"{store.path(1).name}.tmp",
        store.root / "README",
    ]
    for path in foreign:
        path.write_bytes(stamped_object(1))
    outside = tmp_path / "outside"
    outside.write_bytes(stamped_object(2))
    link = store.path(2)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    directory = store.path(3)
    directory.mkdir(parents=True)
    if levels:  # an object that somebody moved to another object's directory, and a directory that is no hash's
        misplaced = next(number for number in range(4, 99) if store.path(number).parent != leaf)
        foreign.append(leaf / store.path(misplaced).name)
        foreign[-1].write_bytes(stamped_object(misplaced))
        foreign.append(store.root / "elsewhere" / "x")
        foreign[-1].parent.mkdir()
        foreign[-1].write_bytes(b"mine")
    listing = store.listing()
    assert listing.object_ids == (1,)
    assert (listing.damaged, listing.foreign) == (0, len(foreign) + 2)
    assert all(path.exists() for path in foreign)
    assert link.is_symlink()
    assert directory.is_dir()
    assert outside.exists()


def test_direct_listing_leaves_nothing_in_the_page_cache(tmp_path: Path) -> None:
    """To look at the first and last pages warms nothing up for the reads that are measured afterwards."""
    store = opened(tmp_path / "objects", SMALL_BYTES)
    if not on_a_device(store):
        pytest.skip("the temporary directory is not on a block device that takes direct I/O")
    for object_id in range(20):
        store.write(object_id, stamped_object(object_id))
    assert len(store.listing().object_ids) == 20
    assert store.drop_page_cache(range(20)) == 0


def test_capacity_is_the_file_systems(mount: Mount) -> None:
    """Total and free bytes are those of the file system, as df tells them."""
    store = opened(mount("tmpfs", "size=8m") / "objects")
    store.write(1, random_object())
    told = subprocess.run(
        ["/bin/df", "--block-size=1", "--output=size,avail", str(store.root)],
        capture_output=True,
        text=True,
        check=True,
    )
    total, free = map(int, told.stdout.splitlines()[1].split())
    assert total == 8 << 20
    assert (store.capacity().total_bytes, store.capacity().free_bytes) == (total, free)


def test_refusal_of_a_direct_write_is_an_error(store: FileStore) -> None:
    """A buffer that direct I/O refuses makes the write fail: it is not repeated in another way, and leaves nothing."""
    if not on_a_device(store):
        pytest.skip("the temporary directory is not on a block device that takes direct I/O")
    misaligned = random_object(OBJECT_BYTES + 4096)[1 : OBJECT_BYTES + 1]
    with pytest.raises(OSError, match="Invalid argument") as caught:
        store.write(1, misaligned)
    assert caught.value.errno == errno.EINVAL
    assert str(store.path(1)) in str(caught.value)
    assert files_below(store.root) == []


@pytest.mark.parametrize(("kind", "why"), [("ramfs", "refuses direct I/O"), ("tmpfs", "direct I/O")])
def test_file_system_without_direct_io(mount: Mount, kind: str, why: str) -> None:
    """Where direct I/O is refused, or taken and not done (tmpfs), the store says so and goes through the page cache."""
    store = opened(mount(kind, "mode=700") / "objects")
    assert not store.direct
    assert store.direct_refusal is not None
    assert str(store.root) in store.direct_refusal
    assert why in store.direct_refusal
    written, found = random_object(), aligned_memory(OBJECT_BYTES)
    assert store.write(1, written).direct is False
    assert store.read(1, found) == Moved(direct=False, page_cache_bytes=OBJECT_BYTES)
    assert found == written
    assert store.drop_page_cache([1]) == 0, "the page cache is all there is"
    os.truncate(store.path(1), 5000)
    with pytest.raises(ShortObjectError, match="5000 of"):
        store.read(1, found)
    assert files_below(store.root) == [store.path(1)]


@pytest.mark.parametrize("kind", ["ramfs", "tmpfs"])
def test_direct_io_that_must_be_and_cannot(mount: Mount, kind: str) -> None:
    """With `always` such a file system is refused; the message names the directory and the other choice."""
    root = mount(kind, "mode=700") / "objects"
    with pytest.raises(ConfigurationError) as caught:
        opened(root, direct=DirectMode.ALWAYS)
    assert str(root) in str(caught.value)
    assert "--direct auto" in str(caught.value)
    assert caught.value.exit_code == 5
    assert files_below(root) == []


def test_full_disk_is_an_error(mount: Mount) -> None:
    """A write that finds no space fails with ENOSPC and leaves no file; what was there stays readable."""
    store = opened(mount("tmpfs", "size=1m") / "objects")
    first = random_object()
    store.write(1, first)
    store.write(2, random_object())
    with pytest.raises(OSError, match="No space left") as caught:
        store.write(3, random_object())
    assert caught.value.errno == errno.ENOSPC
    assert str(store.path(3)) in str(caught.value)
    assert files_below(store.root) == sorted([store.path(1), store.path(2)])
    found = aligned_memory(OBJECT_BYTES)
    store.read(1, found)
    assert found == first


def test_full_device_is_an_error(image: tuple[Path, Path]) -> None:
    """The same on a device, by direct I/O, until nothing fits any more; a deleted object makes room again."""
    store = opened(image[1] / "objects", 1 << 20)
    assert store.direct
    memory = random_object(1 << 20)
    written = 0

    def write_on() -> None:
        nonlocal written
        while written < 17:
            store.write(written, memory)
            written += 1

    with pytest.raises(OSError, match="No space left") as caught:
        write_on()
    assert caught.value.errno == errno.ENOSPC
    assert str(store.path(written)) in str(caught.value)
    assert files_below(store.root) == sorted(store.path(number) for number in range(written))
    store.delete(0)
    store.write(written, memory)


@pytest.mark.parametrize("mode", [DirectMode.ALWAYS, DirectMode.NEVER])
def test_error_of_the_device_is_an_error(image: tuple[Path, Path], mode: DirectMode) -> None:
    """Where the device cannot be read the read fails with EIO and names the object's file."""
    backing, target = image
    store = opened(target / "objects", 1 << 20, direct=mode)
    for object_id in range(4):
        store.write(object_id, random_object(1 << 20))
        store.sync(object_id)
    assert store.drop_page_cache(range(4)) is not None
    os.truncate(backing, 1 << 20)  # nothing of the device is left but its beginning
    with pytest.raises(OSError, match="Input/output error") as caught:
        store.read(3, aligned_memory(1 << 20))
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, ShortObjectError)
    assert caught.value.filename == str(store.path(3))
    os.truncate(backing, 16 << 20)


def test_read_only_file_system_is_an_error(mount: Mount) -> None:
    """A directory that became read-only can be read; a write and a delete fail, and name the object."""
    target = mount("tmpfs", "size=1m")
    store = opened(target / "objects")
    store.write(1, random_object())
    subprocess.run(["/bin/mount", "-o", "remount,ro", str(target)], check=True)
    changes: list[Callable[[], Moved]] = [lambda: store.write(1, random_object()), lambda: store.delete(1)]
    for change in changes:
        with pytest.raises(OSError, match="Read-only file system") as caught:
            change()
        assert str(store.path(1)) in str(caught.value)
    assert store.exists([1]) == [True]
    assert store.read(1, aligned_memory(OBJECT_BYTES)).direct is store.direct


@pytest.mark.parametrize("levels", LEVELS)
def test_vanished_directory_is_an_error(tmp_path: Path, levels: tuple[int, ...]) -> None:
    """Where the directory of the objects is gone a write says so and makes no new one; a read names the object."""
    store = opened(tmp_path / "objects", levels=levels)
    store.write(1, random_object())
    shutil.rmtree(store.root)
    with pytest.raises(FileNotFoundError, match="the directory of the objects is gone") as caught:
        store.write(1, random_object())
    assert caught.value.filename == str(store.root)
    with pytest.raises(FileNotFoundError) as caught:
        store.read(1, aligned_memory(OBJECT_BYTES))
    assert caught.value.filename == str(store.path(1))
    assert list(tmp_path.iterdir()) == []


def test_root_needs_a_parent(tmp_path: Path) -> None:
    """The store makes its root and what is below, not what is above."""
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "absent" / "objects")
