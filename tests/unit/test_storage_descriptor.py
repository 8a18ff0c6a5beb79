"""Transfers of stores over files, as an I/O engine uses them: what is open, what can be found, and what goes wrong."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpstorage.config import DirectMode
from mlpstorage.storage.base import ShortObjectError, aligned_memory
from mlpstorage.storage.descriptor import DescriptorStore, failed, truncated
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys

OBJECT_BYTES = 65_536


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """An open store that goes through the page cache."""
    store = FileStore(tmp_path / "objects", ObjectKeys("m|0|0"), OBJECT_BYTES, direct=DirectMode.NEVER)
    store.open()
    return store


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Limits the size of files that this process writes: a write across the limit is cut short there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def random_object() -> memoryview:
    """Memory with random bytes in it."""
    memory = aligned_memory(OBJECT_BYTES)
    memory[:] = os.urandom(OBJECT_BYTES)
    return memory


def files_below(root: Path) -> list[Path]:
    """All files in a tree."""
    return [path for path in root.rglob("*") if path.is_file()]


def is_open(descriptor: int) -> bool:
    """Whether this process has a file open under a number."""
    return Path(f"/proc/self/fd/{descriptor}").exists()


def test_object_is_found_only_after_the_commit(store: FileStore) -> None:
    """What is being written has a file that nobody finds under the object's name; the commit closes and names it."""
    contract: DescriptorStore = store
    transfer = contract.begin_write(1)
    os.pwrite(transfer.descriptor, random_object(), transfer.offset_bytes)
    assert store.exists([1]) == [False]
    assert is_open(transfer.descriptor)
    contract.commit_write(transfer)
    assert store.exists([1]) == [True]
    assert not is_open(transfer.descriptor)
    assert files_below(store.root) == [store.path(1)]


def test_write_that_is_given_up_leaves_nothing(store: FileStore) -> None:
    """After an abort neither the object nor its file is there; an object that was there before still is."""
    memory = random_object()
    store.write(1, memory)
    for object_id in (1, 2):
        transfer = store.begin_write(object_id)
        os.pwrite(transfer.descriptor, b"half", 0)
        store.abort_write(transfer)
        assert not is_open(transfer.descriptor)
    assert files_below(store.root) == [store.path(1)]
    assert store.path(1).read_bytes() == bytes(memory)


def test_commit_that_fails_ends_the_transfer(store: FileStore) -> None:
    """Where the file cannot be named, the transfer is over all the same: the file is closed, the error tells where."""
    transfer = store.begin_write(1)
    shutil.rmtree(store.root)
    with pytest.raises(FileNotFoundError) as caught:
        store.commit_write(transfer)
    assert str(store.path(1)) in str(caught.value)
    assert not is_open(transfer.descriptor)


def test_read_closes_its_file(store: FileStore) -> None:
    """Between begin and end the object is open for reading, whatever becomes of its name meanwhile."""
    memory = random_object()
    store.write(1, memory)
    transfer = store.begin_read(1)
    store.delete(1)
    assert os.pread(transfer.descriptor, OBJECT_BYTES, transfer.offset_bytes) == bytes(memory)
    store.end_read(transfer)
    assert not is_open(transfer.descriptor)


def test_write_that_is_cut_short_goes_on(store: FileStore, file_size_limit: Callable[[int], None]) -> None:
    """A write of which the system takes a part is continued; what then makes it fail is told, and nothing stays."""
    file_size_limit(OBJECT_BYTES // 2)
    with pytest.raises(OSError, match="File too large") as caught:
        store.write(1, random_object())
    assert caught.value.errno == errno.EFBIG
    assert str(store.path(1)) in str(caught.value)
    assert files_below(store.root) == []
    file_size_limit(OBJECT_BYTES)
    store.write(1, random_object())


def test_errors_of_an_engine_name_the_object(store: FileStore) -> None:
    """Errors that an engine makes of a number, or of a count of bytes, are those that the store raises itself."""
    store.write(1, random_object())
    transfer = store.begin_read(1)
    path = str(store.path(1))
    error = failed(store, transfer, errno.ENOENT)
    assert (type(error), error.errno, error.filename) == (FileNotFoundError, errno.ENOENT, path)
    error = failed(store, transfer, errno.EIO)
    assert (type(error), error.strerror, error.filename) == (OSError, "Input/output error", path)
    short = truncated(store, transfer, 100)
    assert isinstance(short, ShortObjectError)
    assert short.filename == path
    assert "100 of 65536 bytes" in str(short)
    store.end_read(transfer)
