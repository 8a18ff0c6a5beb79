"""Whose a cache directory is: one run's at a time, and only what that run made is ever deleted.

    <directory>/.mlpstorage.lock     locked (flock) for as long as the run lives; the kernel frees it with the process
    <directory>/.mlpstorage.json     the marker: which run it is, who runs it, which directories it created
    <directory>/<run id>/...         the objects, laid out by `FileStore`

A marker beside a free lock is what a dead run left. Its objects are found again by the marker's run id, and deleted by
name: nothing is removed that does not look exactly like what a store makes, and no symbolic link is followed.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlpstorage.errors import AccessError, ConfigurationError, MLPStorageError
from mlpstorage.storage.file_store import HASH_DIGITS, OBJECT_NAME, PROBE_NAME

LOCK_NAME: Final = ".mlpstorage.lock"
MARKER_NAME: Final = ".mlpstorage.json"
_TEMPORARY_MARKER_NAME: Final = ".mlpstorage.json.tmp"
_TOOL: Final = "mlpstorage"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MARKER_LIMIT_BYTES = 1 << 20
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ACCESS_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_REMOVING_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """Who claimed a directory.

    Attributes:
        run_id: The run, and the name of its directory of objects.
        pid: Process that holds the lock.
        host: Host of that process.
        created: When, in seconds since the epoch.
        created_directories: Directories that the claim created, outermost first: `directory` or its parents.
    """

    run_id: str
    pid: int
    host: str
    created: float
    created_directories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What was deleted: the objects of `run_id`, and their sizes as files."""

    run_id: str
    files: int
    bytes: int


class CacheDirectory:
    """A directory that this process holds for a run; made by `claim`.

    Attributes:
        directory: The directory, absolute, with symbolic links resolved.
        objects: Directory of the run's objects, a `FileStore`'s root.
        cleared: What a dead run had left and the claim deleted; None if nothing was found.
    """

    __slots__ = ("_created", "_lock", "cleared", "directory", "objects")

    def __init__(
        self, directory: Path, objects: Path, lock: int, created: Sequence[str], cleared: Removed | None
    ) -> None:
        self.directory = directory
        self.objects = objects
        self.cleared = cleared
        self._created = tuple(created)
        self._lock: int | None = lock

    @classmethod
    def claim(cls, directory: Path, run_id: str) -> "CacheDirectory":
        """Take a directory for a run, create it if need be, and clear what a dead run left in it.

        Raises:
            ConfigurationError: Another run holds the directory, it cannot be used as one, or it holds something of the
                run's name that is not this run's.
            AccessError: It may not be written.
        """
        if not _RUN_ID.fullmatch(run_id):
            raise ConfigurationError(f"run id {run_id!r}: expected letters, digits, '.', '_' and '-'")
        with _told(directory):
            directory = directory.resolve()
            lock, created = _lock_for_claim(directory)
            try:
                cleared, inherited = _clear_dead_run(directory)
                created = [*inherited, *created]
                objects = directory / run_id
                _refuse_foreign(objects)
                # The marker first: what is made after it can be found again, should the process die here.
                _write_marker(directory, run_id, created)
                try:
                    objects.mkdir()
                except OSError:
                    (directory / MARKER_NAME).unlink()
                    raise
            except BaseException:
                (directory / LOCK_NAME).unlink()
                _remove_empty(created)
                os.close(lock)
                raise
        return cls(directory, objects, lock, created, cleared)

    def remove_objects(self) -> Removed:
        """Delete the run's objects and the directories that held them; no store may use them any more."""
        if self._lock is None:
            raise ValueError("the directory was given back")
        with _told(self.directory):
            return _remove_objects(self.directory, self.objects.name)

    def release(self) -> None:
        """Give the directory back, and remove what the claim created and is empty. Calling it again does nothing.

        Objects that are still there stay, and with them the marker, so that the next claim finds and clears them.

        Raises:
            AccessError: The marker or the lock may not be removed.
        """
        lock, self._lock = self._lock, None
        if lock is None:
            return
        with _told(self.directory):
            try:
                _give_back(self.directory, self.objects.name, self._created)
            finally:
                os.close(lock)


def clear_leftovers(directory: Path, run_id: str) -> Removed | None:
    """Delete what a run left in a directory when it was killed; None, and nothing done, while a process holds it.

    A killed process holds its lock until it is gone: wait for it first.

    Raises:
        AccessError: The leftovers may not be deleted.
        ConfigurationError: The directory's marker cannot be read.
    """
    removed = Removed(run_id=run_id, files=0, bytes=0)
    with _told(directory):
        directory = directory.resolve()
        try:
            lock = _try_lock(directory, create=False)
        except (FileNotFoundError, NotADirectoryError):
            return removed
        if lock is None:
            return None
        try:
            marker = _read_marker(directory)
            if marker is None:  # killed between taking the lock and writing the marker: it made nothing else
                (directory / LOCK_NAME).unlink()
            elif marker.run_id == run_id:
                removed = _remove_objects(directory, run_id)
                _give_back(directory, run_id, marker.created_directories)
        finally:
            os.close(lock)
    return removed


@contextlib.contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Turn the system's errors into the user's."""
    try:
        yield
    except MLPStorageError:
        raise
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(directory)
        kind = AccessError if error.errno in _ACCESS_ERRNOS else ConfigurationError
        raise kind(f"{where}: {error.strerror}; choose a directory that can be written with --cache-dir") from error


def _create(directory: Path) -> list[str]:
    """Create a directory and its parents; returns those that were not there, outermost first."""
    created: list[str] = []
    for path in reversed([directory, *directory.parents]):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError:
            if path.is_dir():  # "/" on some systems, or a directory on a read-only file system
                continue
            _remove_empty(created)
            raise
        created.append(str(path))
    return created


def _lock_for_claim(directory: Path) -> tuple[int, list[str]]:
    """Create a directory and lock it; returns the lock's descriptor and the directories that were created."""
    while True:
        created = _create(directory)
        try:
            lock = _try_lock(directory, create=True)
        except FileNotFoundError:
            continue  # the run that made the directory has just ended and removed it
        except OSError:
            _remove_empty(created)
            raise
        if lock is None:
            raise _in_use(directory)
        return lock, created


def _refuse_foreign(objects: Path) -> None:
    if os.path.lexists(objects):
        raise ConfigurationError(
            f"{objects} is there already and is not this run's; remove it by hand, or choose another directory with "
            "--cache-dir"
        )


def _in_use(directory: Path) -> ConfigurationError:
    holder = _read_marker(directory)
    who = f"run {holder.run_id} (process {holder.pid} on {holder.host})" if holder else "a run that is just starting"
    return ConfigurationError(
        f"{directory} is in use by {who}; wait for it to end, or choose another directory with --cache-dir"
    )


def _try_lock(directory: Path, *, create: bool) -> int | None:
    """Lock a directory; returns the lock's descriptor, None if another process holds it."""
    path = directory / LOCK_NAME
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, f"the file system takes no lock ({error.strerror})", str(path)) from error
        # Its last holder deleted the file between our opening and our locking it: the lock we got guards nothing.
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that a path names."""
    try:
        named = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - compared with fstat
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _write_marker(directory: Path, run_id: str, created: Sequence[str]) -> None:
    document = {
        "tool": _TOOL,
        "run_id": run_id,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "created": time.time(),
        "created_directories": list(created),
    }
    temporary = directory / _TEMPORARY_MARKER_NAME
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor that follows no link
        json.dump(document, file)
    temporary.rename(directory / MARKER_NAME)


def _read_marker(directory: Path) -> Marker | None:
    """The marker of a directory; None if there is none.

    Raises:
        ConfigurationError: There is a file of that name that no run of this tool wrote.
    """
    path = directory / MARKER_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor that follows no link
        content = file.read(_MARKER_LIMIT_BYTES)
    marker = _parsed_marker(content)
    if marker is None:
        raise ConfigurationError(
            f"{path} is not a marker that mlpstorage wrote, so nothing here is safe to delete; "
            "remove it by hand, or choose another directory with --cache-dir"
        )
    return marker


def _parsed_marker(content: bytes) -> Marker | None:
    try:
        document = json.loads(content)
        marker = Marker(
            run_id=document["run_id"],
            pid=int(document["pid"]),
            host=str(document["host"]),
            created=float(document["created"]),
            created_directories=tuple(map(str, document["created_directories"])),
        )
    except (ValueError, TypeError, KeyError):
        return None
    known = document["tool"] == _TOOL if "tool" in document else False
    return marker if known and isinstance(marker.run_id, str) and _RUN_ID.fullmatch(marker.run_id) else None


def _clear_dead_run(directory: Path) -> tuple[Removed | None, tuple[str, ...]]:
    """Clear what a dead run left in a locked directory; returns what was deleted and the directories it had created."""
    marker = _read_marker(directory)
    if marker is None:
        return None, ()
    removed = _remove_objects(directory, marker.run_id)
    (directory / MARKER_NAME).unlink()
    return removed, _own(directory, marker.created_directories)


def _give_back(directory: Path, run_id: str, created: Sequence[str]) -> None:
    """Remove a run's marker, lock and empty directories; the lock must be held."""
    objects = directory / run_id
    _remove_empty([str(objects)])
    if not os.path.lexists(objects):
        (directory / MARKER_NAME).unlink(missing_ok=True)
    # The lock goes last: until then nobody else can claim the directory.
    (directory / LOCK_NAME).unlink(missing_ok=True)
    _remove_empty(_own(directory, created))


def _own(directory: Path, created: Sequence[str]) -> tuple[str, ...]:
    """Of the directories that a marker lists, those that a claim of `directory` can have created."""
    possible = {str(directory), *map(str, directory.parents)}
    return tuple(path for path in created if path in possible)


def _remove_empty(directories: Sequence[str]) -> None:
    """Remove directories, the last first, up to one that holds something or may not be removed."""
    for path in reversed(directories):
        try:
            os.rmdir(path)  # noqa: PTH106 - the paths are text, as in the marker
        except FileNotFoundError:
            continue
        except OSError:
            return


def _remove_objects(directory: Path, run_id: str) -> Removed:
    """Delete a run's objects, and its directories as far as they are then empty.

    Every directory is reached through the descriptor of the one above it and opened without following links, so that
    nothing outside the run's directory can be reached, whatever others do to the tree meanwhile.
    """
    files, size_bytes = 0, 0
    try:
        objects = os.open(directory / run_id, _DIRECTORY_FLAGS)
    except (FileNotFoundError, NotADirectoryError):  # the latter also for a symbolic link
        return Removed(run_id=run_id, files=0, bytes=0)
    try:
        _remove_files(objects, PROBE_NAME)
        with ThreadPoolExecutor(_REMOVING_THREADS) as threads:
            for part_files, part_bytes in threads.map(lambda digit: _remove_subtree(objects, digit), HASH_DIGITS):
                files += part_files
                size_bytes += part_bytes
    finally:
        os.close(objects)
    _remove_empty([str(directory / run_id)])
    return Removed(run_id=run_id, files=files, bytes=size_bytes)


def _remove_subtree(parent: int, name: str) -> tuple[int, int]:
    """Delete the objects two levels below an open directory; returns how many files and bytes they were."""
    files, size_bytes = 0, 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _opened(parent, name) as first:
        for digit in HASH_DIGITS:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), _opened(first, digit) as second:
                part_files, part_bytes = _remove_files(second, OBJECT_NAME)
                files += part_files
                size_bytes += part_bytes
            with contextlib.suppress(OSError):
                os.rmdir(digit, dir_fd=first)
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=parent)
    return files, size_bytes


@contextlib.contextmanager
def _opened(parent: int, name: str) -> Iterator[int]:
    descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_files(directory: int, pattern: re.Pattern[str]) -> tuple[int, int]:
    """Delete the regular files of an open directory whose whole name matches; returns how many, and their sizes."""
    files, size_bytes = 0, 0
    with os.scandir(directory) as entries:
        found = [one for one in entries if pattern.fullmatch(one.name) and one.is_file(follow_symlinks=False)]
    for entry in found:
        with contextlib.suppress(FileNotFoundError):
            size = entry.stat(follow_symlinks=False).st_size
            os.unlink(entry.name, dir_fd=directory)
            files += 1
            size_bytes += size
    return files, size_bytes
