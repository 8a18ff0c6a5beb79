"""What the conformance suite of block stores asks of a backend's author, and what all its parts use.

Needs pytest, which is no dependency of the package.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from mlpstorage.config import MIB, PAGE_BYTES
from mlpstorage.storage.base import BlockStore, Capabilities, aligned_memory, padded_bytes
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.content import difference, make_content
from mlpstorage.testing.suite_child import StoreProcess

WAIT_S = 60
"""Far more than any wait of the suite takes: a test that hangs fails by it, none passes by it."""

OBJECT_BYTES = 5 * PAGE_BYTES - 480
"""Payload of the objects of most tests; five pages on storage."""

OBJECTS = 24
"""Objects that the stores of most tests have room for."""

NAMESPACES = ("conformance|0|full", "conformance|1|full")
"""Two kv ranks: neighbouring object ids belong to different namespaces."""


class OpenStore(Protocol):
    """Makes a store on the test's place and opens it; it is closed when the test ends."""

    def __call__(
        self, object_bytes: int = OBJECT_BYTES, *, keys: ObjectKeys | None = None, objects: int = OBJECTS
    ) -> BlockStore:
        """Make and open a store."""
        ...


class StoreHooks:
    """What a suite needs to know of a backend. All but `make_store` suit a store that keeps its objects in files.

    The hooks on stored bytes reach them by another way than the store. Those of this class look for an object's content
    in the files below the place; a backend that stores elsewhere replaces them.

    Attributes:
        raw_access: Whether there is such a way; where there is none, tests that need it are skipped.
        lists_by_stamps: Whether a listing notices an object of the right size whose first or last page is not its own.
            A store whose writes come to pass whole or not at all may do without looking.
        largest_bytes: Objects beyond this size are not tried.
        rounds: How often what threads may get wrong is tried; fewer suit a store that is slow.
    """

    raw_access: ClassVar[bool] = True
    lists_by_stamps: ClassVar[bool] = True
    largest_bytes: ClassVar[int] = 256 * MIB
    rounds: ClassVar[int] = 25

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """A store that is not open yet.

        The suite calls it several times for one place, also in other processes (which import the module that defines
        the class by its path, and make an instance without arguments), in order to come back to what is there.

        Args:
            place: Where the store keeps its objects: a path that does not exist, in a directory that does. A backend
                that stores elsewhere takes it as a name that no other test uses.
            keys: Names of the objects.
            object_bytes: Bytes of an object's payload.
            objects: How many objects there must be room for. A store with a fixed number of places has as many.
        """
        raise NotImplementedError

    def raw_things(self, place: Path) -> list[str]:
        """Everything that is in the place, by name and size: equal lists mean that nothing was left behind."""
        return sorted(f"{path.relative_to(place)} {path.stat().st_size}" for path in files_below(place))

    def raw_count(self, place: Path, content: bytes) -> int:
        """How many times an object's whole content is in the place."""
        return len(_find(place, content))

    def raw_truncate(self, place: Path, keys: ObjectKeys, object_id: int, content: bytes, left_bytes: int) -> None:
        """Cut the storage in the middle of an object, so that only its first bytes are left."""
        del keys, object_id
        path, offset_bytes = _only(_find(place, content))
        os.truncate(path, offset_bytes + left_bytes)

    def raw_replace(self, place: Path, keys: ObjectKeys, object_id: int, content: bytes, changed: bytes) -> None:
        """Put other content of the same length in an object's place."""
        del keys, object_id
        path, offset_bytes = _only(_find(place, content))
        with path.open("r+b") as file:
            file.seek(offset_bytes)
            file.write(changed)
            file.flush()
            os.fsync(file.fileno())

    def raw_add_foreign(self, place: Path) -> list[str]:
        """Put things into an open store's place that are not the store's; returns their names in `raw_things`."""
        (place / "notes.txt").write_text("kept by somebody else\n", encoding="utf-8")
        return ["notes.txt 22"]

    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[Path]:
        """The test's place; a path with a space in it. What is there in the end is removed, as it may be large."""
        place = tmp_path / "store place"
        yield place
        shutil.rmtree(place, ignore_errors=True)

    @pytest.fixture
    def keys(self) -> ObjectKeys:
        """Names of the objects."""
        return ObjectKeys(*NAMESPACES)

    @pytest.fixture
    def open_store(self, place: Path, keys: ObjectKeys) -> Iterator[OpenStore]:
        """Makes stores and opens them; they are closed when the test ends."""
        usual_keys = keys
        with contextlib.ExitStack() as stack:

            def open_one(
                object_bytes: int = OBJECT_BYTES, *, keys: ObjectKeys | None = None, objects: int = OBJECTS
            ) -> BlockStore:
                store = self.make_store(place, keys or usual_keys, object_bytes, objects)
                stack.callback(store.close)
                store.open()
                return store

            yield open_one

    @pytest.fixture
    def store(self, open_store: OpenStore) -> BlockStore:
        """An open store of small objects."""
        return open_store()

    @pytest.fixture
    def raw(self) -> "StoreHooks":
        """The hooks, where there is a way to the stored bytes."""
        if not self.raw_access:
            pytest.skip("there is no other way to the stored bytes than the store")
        return self

    @pytest.fixture
    def process(self, place: Path) -> Iterator[StoreProcess]:
        """Another process, with a store of small objects on the same place, which it has yet to open."""
        with StoreProcess(type(self), place, NAMESPACES, OBJECT_BYTES, OBJECTS) as process:
            yield process


def requires(capabilities: Capabilities, *flags: str) -> None:
    """Skip the test where the store lacks a capability."""
    for flag in flags:
        if not getattr(capabilities, flag):
            pytest.skip(f"the store's capabilities say: {flag} is False")


def write(store: BlockStore, keys: ObjectKeys, object_ids: Sequence[int], version: int = 0) -> None:
    """Write objects."""
    memory = aligned_memory(store.stored_bytes)
    for object_id in object_ids:
        memory[:] = make_content(keys, object_id, store.stored_bytes, version)
        store.write(object_id, memory)


def assert_holds(store: BlockStore, keys: ObjectKeys, object_ids: Sequence[int], version: int = 0) -> None:
    """Objects can be read and are what was written; of a store that holds no data, they can be read."""
    memory = aligned_memory(store.stored_bytes)
    for object_id in object_ids:
        memory[:] = bytes(memory.nbytes)
        store.read(object_id, memory)
        if store.capabilities.holds_data:
            problem = difference(memory, make_content(keys, object_id, store.stored_bytes, version))
            assert problem is None, f"object {object_id}: {problem}"


def assert_unseen(store: BlockStore, object_ids: Sequence[int]) -> None:
    """Objects are not there for who looks or reads."""
    memory = aligned_memory(store.stored_bytes)
    assert store.exists(object_ids) == [False] * len(object_ids)
    for object_id in object_ids:
        with pytest.raises(FileNotFoundError):
            store.read(object_id, memory)


def assert_gone(store: BlockStore, object_ids: Sequence[int]) -> None:
    """Objects are not there, whichever way they are asked for."""
    assert_unseen(store, object_ids)
    for object_id in object_ids:
        with pytest.raises(FileNotFoundError):
            store.delete(object_id)


def has_fixed_room(store: BlockStore, objects: int) -> bool:
    """Whether the store says that there is room for `objects` objects in all, and no more."""
    total_bytes = store.capacity().total_bytes
    return total_bytes is not None and total_bytes // store.stored_bytes == objects


def half_unreadable(content: bytes) -> memoryview:
    """Aligned memory with some content, of which the second half of the pages must not be read: the kernel says EFAULT.

    A program that touches it itself dies of it, so it is for stores alone that hand the buffer to the kernel.
    """
    mapping = mmap.mmap(-1, len(content))
    mapping[:] = content
    half_bytes = padded_bytes(len(content) // 2)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + half_bytes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(len(content) - half_bytes), 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    return memoryview(mapping)


def files_below(place: Path) -> list[Path]:
    """All files in a tree, in order."""
    return sorted(path for path in place.rglob("*") if path.is_file())


def _find(place: Path, content: bytes) -> list[tuple[Path, int]]:
    """The files, and where in them, that hold some content."""
    found: list[tuple[Path, int]] = []
    for path in files_below(place):
        if path.stat().st_size < len(content):
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            at = mapping.find(content)
            while at >= 0:
                found.append((path, at))
                at = mapping.find(content, at + 1)
    return found


def _only(found: Sequence[tuple[Path, int]]) -> tuple[Path, int]:
    assert len(found) == 1, f"the object was looked for in the place, and found {len(found)} times"
    return found[0]
