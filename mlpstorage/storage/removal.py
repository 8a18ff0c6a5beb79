"""Deleting a run's objects, and only them; and how much room that gives back.

Files are deleted by the names that layouts give them (`storage.names`). Every directory is reached through the
descriptor of the one above it and opened without following links, so that nothing outside the directory of objects can
be reached, whatever others do to the tree meanwhile.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlpstorage.config import Layout
from mlpstorage.storage.names import LEAF_NAMES, PROBE_NAME, hash_directory_name

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_THREADS = 8
_BLOCK_BYTES = 512
"""Unit of `st_blocks`."""


class Files(NamedTuple):
    """How many files, and their bytes."""

    files: int
    bytes: int


_NONE = Files(0, 0)

_Visit = Callable[[int, re.Pattern[str]], Files]
"""Does something to the files of an open directory whose whole name matches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """What is done in a directory of objects.

    Attributes:
        visit: To the files.
        names: What the files of objects are called.
        prune: Whether hash directories that are empty afterwards are removed.
    """

    visit: _Visit
    names: re.Pattern[str]
    prune: bool


def remove_objects(objects: Path, layout: Layout, levels: Sequence[int]) -> Files:
    """Delete a directory of objects as far as it is a store's; returns the files and their sizes.

    Directories that are not empty then stay, and so does all that no store of the layout makes.
    """
    removed = _walked(objects, _Walk(visit=_remove_files, names=LEAF_NAMES[layout], prune=True), levels)
    remove_empty([str(objects)])
    return removed


def object_room(objects: Path, layout: Layout, levels: Sequence[int]) -> Files:
    """The files that `remove_objects` would delete, and the bytes of storage that they take."""
    return _walked(objects, _Walk(visit=_measure_files, names=LEAF_NAMES[layout], prune=False), levels)


def remove_empty(directories: Sequence[str]) -> None:
    """Remove directories, the last first, up to one that holds something or may not be removed."""
    for path in reversed(directories):
        try:
            os.rmdir(path)  # noqa: PTH106 - the paths are text, as in the marker
        except FileNotFoundError:
            continue
        except OSError:
            return


def _walked(objects: Path, walk: _Walk, levels: Sequence[int]) -> Files:
    try:
        root = os.open(objects, _DIRECTORY_FLAGS)
    except (FileNotFoundError, NotADirectoryError):  # the latter also for a symbolic link
        return _NONE
    try:
        walk.visit(root, PROBE_NAME)  # of no object, and not counted as one
        if not levels:
            return walk.visit(root, walk.names)
        names = _subdirectories(root, levels[0])
        with ThreadPoolExecutor(_THREADS) as threads:
            return _sum(threads.map(lambda name: _walk_below(root, name, walk, levels[1:]), names))
    finally:
        os.close(root)


def _walk_below(parent: int, name: str, walk: _Walk, levels: Sequence[int]) -> Files:
    """Visit one hash directory of an open directory and all below it."""
    found = _NONE
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _opened(parent, name) as directory:
        if levels:
            names = _subdirectories(directory, levels[0])
            found = _sum(_walk_below(directory, below, walk, levels[1:]) for below in names)
        else:
            found = walk.visit(directory, walk.names)
    if walk.prune:
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=parent)
    return found


def _sum(parts: Iterable[Files]) -> Files:
    files, size_bytes = 0, 0
    for part in parts:
        files += part.files
        size_bytes += part.bytes
    return Files(files, size_bytes)


@contextlib.contextmanager
def _opened(parent: int, name: str) -> Iterator[int]:
    descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _subdirectories(directory: int, digits: int) -> list[str]:
    """The hash directories of an open directory."""
    pattern = hash_directory_name(digits)
    with os.scandir(directory) as entries:
        return [one.name for one in entries if pattern.fullmatch(one.name) and one.is_dir(follow_symlinks=False)]


def _matching(directory: int, names: re.Pattern[str]) -> list[os.DirEntry[str]]:
    """The regular files of an open directory whose whole name matches."""
    with os.scandir(directory) as entries:
        return [one for one in entries if names.fullmatch(one.name) and one.is_file(follow_symlinks=False)]


def _remove_files(directory: int, names: re.Pattern[str]) -> Files:
    files, size_bytes = 0, 0
    for entry in _matching(directory, names):
        with contextlib.suppress(FileNotFoundError):
            size = entry.stat(follow_symlinks=False).st_size
            os.unlink(entry.name, dir_fd=directory)
            files += 1
            size_bytes += size
    return Files(files, size_bytes)


def _measure_files(directory: int, names: re.Pattern[str]) -> Files:
    files, size_bytes = 0, 0
    for entry in _matching(directory, names):
        with contextlib.suppress(FileNotFoundError):
            size_bytes += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
            files += 1
    return Files(files, size_bytes)
