"""What is in the directories of a file store: whole objects, damaged ones, and what is not the store's."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.base import Listing, aligned_memory
from mlpstorage.storage.keys import STAMP_BYTES, ObjectKeys
from mlpstorage.storage.names import OBJECT_NAME, PROBE_NAME, hash_directory_name

_THREADS = 8
"""Threads that look into files: enough to keep storage of some latency busy; more would wait for the interpreter."""

_PART_ENTRIES = 1024
"""Entries of a flat directory that a thread takes at a time."""


@dataclass(slots=True)
class _Found:
    """What is in a part of the directories: objects, as times of modification (ns) with ids, and how much else."""

    objects: list[tuple[int, int]] = field(default_factory=list)
    damaged: int = 0
    foreign: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectFiles:
    """The files of a store's objects.

    Attributes:
        root: Directory of the objects.
        levels: Digits of each level of directories below it.
        keys: Names and stamps of the objects.
        stored_bytes: Size of a file.
        path_of: The path of an object. A file of an object's name at another place is foreign.
        read_flags: What to open files with. With O_DIRECT the listing leaves nothing in the page cache.
    """

    root: str
    levels: tuple[int, ...]
    keys: ObjectKeys
    stored_bytes: int
    path_of: Callable[[int], str]
    read_flags: int


def list_objects(files: ObjectFiles) -> Listing:
    """See `FileStore.listing`."""
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda entries: _search(files, entries), _parts(files)))
    objects = sorted(one for part in found for one in part.objects)
    return Listing(
        object_ids=tuple(object_id for _, object_id in objects),
        damaged=sum(part.damaged for part in found),
        foreign=sum(part.foreign for part in found),
    )


def _parts(files: ObjectFiles) -> Iterator[Sequence[os.DirEntry[str]]]:
    """The root's entries: a directory at a time, or many files."""
    entries = _entries(files.root)
    step = 1 if files.levels else _PART_ENTRIES
    for first in range(0, len(entries), step):
        yield entries[first : first + step]


def _entries(directory: str) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return list(entries)


def _search(files: ObjectFiles, entries: Iterable[os.DirEntry[str]]) -> _Found:
    """Look at entries of the root and at all below them."""
    found = _Found()
    page = aligned_memory(PAGE_BYTES)
    for entry in entries:
        if PROBE_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            _remove(entry.path)  # no object, and nobody's after a crash
        else:
            _search_entry(files, entry, 0, page, found)
    return found


def _search_entry(files: ObjectFiles, entry: os.DirEntry[str], depth: int, page: memoryview, found: _Found) -> None:
    if depth == len(files.levels):
        _search_file(files, entry, page, found)
    elif hash_directory_name(files.levels[depth]).fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
        for below in _entries(entry.path):
            _search_entry(files, below, depth + 1, page, found)
    else:
        found.foreign += 1


def _search_file(files: ObjectFiles, entry: os.DirEntry[str], page: memoryview, found: _Found) -> None:
    match = OBJECT_NAME.fullmatch(entry.name)
    key = bytes.fromhex(match[1]) if match else b""
    object_id = files.keys.object_id(key)
    if match is None or object_id is None or not entry.is_file(follow_symlinks=False):
        found.foreign += 1
        return
    unfinished = match[2] or ""
    if entry.path != files.path_of(object_id) + unfinished:
        found.foreign += 1
        return
    try:
        modified_ns = None if unfinished else _modified_ns(files, entry.path, key, page)
    except FileNotFoundError:
        return
    if modified_ns is None:
        _remove(entry.path)
        found.damaged += 1
    else:
        found.objects.append((modified_ns, object_id))


def _modified_ns(files: ObjectFiles, path: str, key: bytes, page: memoryview) -> int | None:
    """When an object was modified, None where it is not whole as far as size, first and last page tell."""
    descriptor = os.open(path, files.read_flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if status.st_size != files.stored_bytes:
            return None
        if not files.read_flags & os.O_DIRECT:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # two pages into the page cache, not more
        last = files.stored_bytes // PAGE_BYTES - 1
        for number in sorted({0, last}):
            read_bytes = os.preadv(descriptor, (page,), number * PAGE_BYTES)
            if read_bytes != PAGE_BYTES or not _begins_right(page, key, number):
                return None
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)
    return status.st_mtime_ns


def _begins_right(page: memoryview, key: bytes, number: int) -> bool:
    """Whether a page begins with the object's stamp and its own number; the write may be any."""
    begin = key[:STAMP_BYTES] + number.to_bytes(4, "little")
    return page[: len(begin)] == begin


def _remove(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108 - a Path costs more than the call
    except FileNotFoundError:
        return
