"""Objects as files: layout, direct I/O, and what goes wrong."""

import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpstorage.storage.base import BlockStore, ShortObjectError, aligned_memory
from mlpstorage.storage.file_store import OBJECT_NAME, FileStore
from mlpstorage.storage.payload import Payload

NAMESPACE = "tiny-1b|0|full"
OBJECT_BYTES = 393_216

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
def store(tmp_path: Path) -> FileStore:
    """An open store of objects of 384 KiB."""
    store = FileStore(tmp_path / "objects", NAMESPACE, OBJECT_BYTES)
    store.open()
    return store


def random_object(stored_bytes: int = OBJECT_BYTES) -> memoryview:
    """Memory for direct I/O with random bytes in it."""
    memory = aligned_memory(stored_bytes)
    memory[:] = os.urandom(stored_bytes)
    return memory


def files_below(root: Path) -> list[Path]:
    """All files in a tree."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def device_read_bytes() -> int:
    """Bytes that this process had read from devices, as the kernel counts them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


def test_store_fulfils_the_contract(store: FileStore) -> None:
    """The store is a `BlockStore`, for mypy and at run time."""
    contract: BlockStore = store
    assert contract.object_bytes == contract.stored_bytes == OBJECT_BYTES


def test_round_trip(store: FileStore) -> None:
    """What is written is what the file holds and what is read."""
    written = random_object()
    assert store.write(3, written) is store.direct
    assert store.path(3).read_bytes() == bytes(written)
    found = aligned_memory(OBJECT_BYTES)
    assert store.read(3, found) is store.direct
    assert found == written


def test_layout(store: FileStore) -> None:
    """An object is one file, named by its key, below directories of the key's first and second digit."""
    store.write(2**64 - 1, random_object())
    name = hashlib.blake2b(f"{NAMESPACE}|{2**64 - 1}".encode(), digest_size=16).hexdigest()
    path = store.root / name[0] / name[1] / name
    assert files_below(store.root) == [path]
    assert path.stat().st_size == OBJECT_BYTES
    assert OBJECT_NAME.fullmatch(path.name)


def test_directories_are_made_beforehand(store: FileStore) -> None:
    """Opening makes all 16 times 16 directories and leaves no other file behind; opening again is harmless."""
    store.open()
    digits = "0123456789abcdef"
    assert sorted(path.name for path in store.root.iterdir()) == list(digits)
    assert all(sorted(path.name for path in (store.root / digit).iterdir()) == list(digits) for digit in digits)
    assert files_below(store.root) == []


def test_object_of_odd_size_is_padded(tmp_path: Path) -> None:
    """A block of 1,124,352 bytes is stored and read as 275 pages."""
    store = FileStore(tmp_path / "objects", "deepseek-v3|0|full", 1_124_352)
    store.open()
    assert (store.object_bytes, store.stored_bytes) == (1_124_352, 1_126_400)
    payload = Payload("deepseek-v3|0|full", store.stored_bytes)
    store.write(1, payload.new_buffer().to_write(1).memory)
    assert store.path(1).stat().st_size == 1_126_400
    buffer = payload.new_buffer()
    store.read(1, buffer.to_read().memory)
    assert buffer.check(1) == 1_126_400


def test_direct_reads_come_from_the_device(store: FileStore) -> None:
    """Each direct read moves the object from the device, though it was just written: nothing is cached."""
    if not store.direct or os.major(store.root.stat().st_dev) == 0:
        pytest.skip("the temporary directory is not on a block device that takes direct I/O")
    store.write(1, random_object())
    memory = aligned_memory(OBJECT_BYTES)
    before = device_read_bytes()
    for _ in range(3):
        store.read(1, memory)
    assert device_read_bytes() - before >= 3 * OBJECT_BYTES


def test_writing_again_replaces(store: FileStore) -> None:
    """A second write of an object takes the first one's place."""
    store.write(1, random_object())
    second = random_object()
    store.write(1, second)
    assert [path.read_bytes() for path in files_below(store.root)] == [bytes(second)]


def test_delete(store: FileStore) -> None:
    """A deleted object is gone; deleting or reading what is not there is an error."""
    store.write(1, random_object())
    store.delete(1)
    assert files_below(store.root) == []
    with pytest.raises(FileNotFoundError):
        store.delete(1)
    with pytest.raises(FileNotFoundError) as caught:
        store.read(1, aligned_memory(OBJECT_BYTES))
    assert caught.value.filename == str(store.path(1))


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


def test_refusal_of_a_direct_write_is_an_error(store: FileStore) -> None:
    """A buffer that direct I/O refuses makes the write fail: it is not repeated in another way, and leaves nothing."""
    if not store.direct or os.major(store.root.stat().st_dev) == 0:
        pytest.skip("the temporary directory is not on a block device that takes direct I/O")
    misaligned = random_object(OBJECT_BYTES + 4096)[1 : OBJECT_BYTES + 1]
    with pytest.raises(OSError, match="Invalid argument") as caught:
        store.write(1, misaligned)
    assert caught.value.errno == errno.EINVAL
    assert files_below(store.root) == []


def test_file_system_that_refuses_direct_io(mount: Mount) -> None:
    """Where direct I/O is refused the store says so and why, and works through the page cache."""
    store = FileStore(mount("ramfs", "mode=700") / "objects", NAMESPACE, OBJECT_BYTES)
    store.open()
    assert not store.direct
    assert store.direct_refusal is not None
    assert str(store.root) in store.direct_refusal
    assert "refuses direct I/O" in store.direct_refusal
    written, found = random_object(), aligned_memory(OBJECT_BYTES)
    assert store.write(1, written) is False
    assert store.read(1, found) is False
    assert found == written
    os.truncate(store.path(1), 5000)
    with pytest.raises(ShortObjectError, match="5000 of"):
        store.read(1, found)


def test_full_disk_is_an_error(mount: Mount) -> None:
    """A write that finds no space fails with ENOSPC and leaves no file; what was there stays readable."""
    store = FileStore(mount("tmpfs", "size=1m") / "objects", NAMESPACE, OBJECT_BYTES)
    store.open()
    first = random_object()
    store.write(1, first)
    store.write(2, random_object())
    with pytest.raises(OSError, match="No space left") as caught:
        store.write(3, random_object())
    assert caught.value.errno == errno.ENOSPC
    assert files_below(store.root) == sorted([store.path(1), store.path(2)])
    found = aligned_memory(OBJECT_BYTES)
    store.read(1, found)
    assert found == first


def test_root_needs_a_parent(tmp_path: Path) -> None:
    """The store makes its root and what is below, not what is above."""
    with pytest.raises(FileNotFoundError):
        FileStore(tmp_path / "absent" / "objects", NAMESPACE, OBJECT_BYTES).open()
