"""Which I/O engine a rank takes, over real stores on real file systems."""

from pathlib import Path

import pytest

from mlpstorage.config import PAGE_BYTES, DirectMode, IoEngineName
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.cache import with_settled_engine
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.null_store import NullStore
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.storage.uring import probe_uring

KEYS = ObjectKeys("tiny-1b|0|full")
REFUSAL = probe_uring()
needs_ring = pytest.mark.skipif(REFUSAL is not None, reason=f"no ring: {REFUSAL}")


class RemoteFileStore(FileStore):
    """Files of a file system where opening one is a round trip."""

    @property
    def opens_promptly(self) -> bool:
        """No."""
        return False


def choice(store: BlockStore, **values: object) -> tuple[IoEngineName, int | None]:
    """The engine, and its threads."""
    settled = with_settled_engine(KVCacheSpec.model_validate({"model": "tiny-1b", **values}), store)
    return settled.io_engine, settled.io_threads


def files(root: Path, kind: type[FileStore] = FileStore, direct: DirectMode = DirectMode.AUTO) -> FileStore:
    """A store of files, open."""
    store = kind(root / "objects", KEYS, PAGE_BYTES, direct=direct)
    store.open()
    return store


@needs_ring
def test_direct_files_are_moved_by_a_ring(tmp_path: Path) -> None:
    """Files and slabs alike; unless threads are asked for, by name or by number."""
    store = files(tmp_path)
    if not store.direct:
        pytest.skip("no direct I/O below the temporary directory")
    slab = SlabStore(tmp_path / "slab", KEYS, PAGE_BYTES, slots=4)
    slab.open()
    assert choice(store) == choice(slab, layout="slab") == (IoEngineName.URING, 1)
    assert choice(store, io_engine="threads", io_depth=3) == (IoEngineName.THREADS, 3)
    assert choice(store, io_threads=5) == (IoEngineName.THREADS, 5)
    slab.close()


def test_threads_move_what_a_ring_would_not_do_better(tmp_path: Path) -> None:
    """Buffered files, those of another machine, those of which every byte is checked, and what is no file."""
    threads = (IoEngineName.THREADS, 8)
    assert choice(files(tmp_path, direct=DirectMode.NEVER)) == threads
    assert choice(files(tmp_path, RemoteFileStore)) == threads
    assert choice(files(tmp_path), verify="full") == threads
    assert choice(NullStore(KEYS, PAGE_BYTES)) == threads


@needs_ring
def test_a_ring_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    """Even where it is not what would have been chosen; or refused, with the reason, where there are no files."""
    assert choice(files(tmp_path, RemoteFileStore), io_engine="uring", verify="full") == (IoEngineName.URING, 1)
    with pytest.raises(ConfigurationError, match="--io-engine uring: layout file has no files to hand to it; use"):
        choice(NullStore(KEYS, PAGE_BYTES), io_engine="uring")


def test_only_local_file_systems_are_known_to_open_promptly() -> None:
    """Memory is one; what has no storage of its own is taken for a remote one."""
    assert FileStore(Path("/dev/shm/objects"), KEYS, PAGE_BYTES).opens_promptly  # noqa: S108 - nothing is made there
    assert not FileStore(Path("/proc/self"), KEYS, PAGE_BYTES).opens_promptly
