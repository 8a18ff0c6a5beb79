"""Whose a cache directory is: one run's at a time, and only what runs of this tool made is ever deleted.

    <directory>/.mlpstorage.lock     locked (flock) for as long as the run lives; the kernel frees it with the process
    <directory>/.mlpstorage.json     the marker: which run it is, who runs it, what its objects are, whether they stay
    <directory>/<run id>/...         the objects, laid out by a store

A marker beside a free lock is what a dead run left, or one that was to keep its objects. The objects are found again by
the marker, and deleted by name: nothing is removed that does not look exactly like what a store makes, and no symbolic
link is followed. A run that uses what an earlier one left takes over the marker, not the name of the directory; should
it be refused before it really begins, the marker is again as the earlier one left it.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from mlpstorage.errors import AccessError, ConfigurationError, MLPStorageError
from mlpstorage.storage.claim import CacheFormat, Removed, check_reusable, kept_by_other
from mlpstorage.storage.marker import MARKER_NAME, RUN_ID, Marker, new_marker, read_marker, write_marker
from mlpstorage.storage.removal import object_room, remove_empty, remove_objects

LOCK_NAME: Final = ".mlpstorage.lock"
_ACCESS_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class CacheDirectory:
    """A directory that this process holds for a run, a `Claim`; made by `claim`.

    Attributes:
        directory: The directory, absolute, with symbolic links resolved.
        objects: Directory of the objects, the root of a store.
        cleared: What a dead run had left and the claim deleted; None if nothing was found.
        reused: Whether the objects are those of an earlier run.
    """

    __slots__ = ("_earlier", "_keep", "_lock", "_marker", "cleared", "directory", "objects", "reused")

    def __init__(
        self,
        directory: Path,
        marker: Marker,
        lock: int,
        *,
        keep: bool,
        cleared: Removed | None,
        earlier: Marker | None,
    ) -> None:
        self.directory = directory
        self.objects = directory / marker.objects
        self.cleared = cleared
        self.reused = earlier is not None
        self._marker = marker
        self._keep = keep
        self._earlier = earlier  # whose objects are used, until the run begins
        self._lock: int | None = lock

    @classmethod
    def claim(
        cls,
        directory: Path,
        run_id: str,
        *,
        format: CacheFormat,  # noqa: A002 - the word for it
        keep: bool = False,
        reuse: bool = False,
    ) -> "CacheDirectory":
        """Take a directory for a run, create it if need be, and clear or take over what an earlier run left in it.

        Args:
            directory: The directory.
            run_id: The run; its objects lie in a directory of this name.
            format: What the run's objects are.
            keep: Leave the objects where they are when the directory is given back, or the process is killed. Holds
                from `run_begins` on; before that what is there is kept if it was to be.
            reuse: Use the objects that an earlier run left, were they to be kept or was it killed. Without this what a
                dead run left is cleared, unless it was to be kept.

        Raises:
            ConfigurationError: Another run holds the directory, it cannot be used as one, it holds objects that were to
                be kept or that cannot be reused, or something of the run's name that is not this run's.
            AccessError: It may not be written.
        """
        if not RUN_ID.fullmatch(run_id):
            raise ConfigurationError(f"run id {run_id!r}: expected letters, digits, '.', '_' and '-'")
        with _told(directory):
            directory = directory.resolve()
            lock, created = _lock_for_claim(directory)
            try:
                marker, cleared, earlier = _taken(directory, created, run_id, format, keep=keep, reuse=reuse)
            except BaseException:
                (directory / LOCK_NAME).unlink()
                remove_empty(created)
                os.close(lock)
                raise
        return cls(directory, marker, lock, keep=keep, cleared=cleared, earlier=earlier)

    @property
    def place(self) -> str:
        """The directory, for messages."""
        return str(self.directory)

    def run_begins(self) -> None:
        """The run really begins: from here on the marker says whether its objects are to be kept.

        Raises:
            AccessError: The marker may not be written.
            ConfigurationError: It cannot be.
        """
        if self._lock is None:
            raise ValueError("the directory was given back")
        marker = replace(self._marker, keep=self._keep)
        with _told(self.directory):
            write_marker(self.directory, marker)
        self._marker = marker
        self._earlier = None

    def remove_objects(self) -> Removed:
        """Delete the objects and the directories that held them; no store may use them any more."""
        if self._lock is None:
            raise ValueError("the directory was given back")
        with _told(self.directory):
            return _remove(self.directory, self._marker)

    def release(self) -> None:
        """Give the directory back, and remove what the claim created and is empty. Calling it again does nothing.

        Objects that are still there stay, and with them the marker. The next claim clears them, or uses them; if they
        were to be kept it does nothing but use them. Where they are an earlier run's and this one has not begun, the
        marker is that run's again.

        Raises:
            AccessError: The marker or the lock may not be changed or removed.
        """
        lock, self._lock = self._lock, None
        if lock is None:
            return
        with _told(self.directory):
            try:
                _give_back(self.directory, self._marker, self._earlier)
            finally:
                os.close(lock)


def clear_leftovers(directory: Path, run_id: str) -> Removed | None:
    """Delete what a run left in a directory when it was killed; None, and nothing done, while a process holds it.

    Objects that were to be kept are. A killed process holds its lock until it is gone: wait for it first.

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
            marker = read_marker(directory)
            if marker is None:  # killed between taking the lock and writing the marker: it made nothing else
                (directory / LOCK_NAME).unlink()
            elif marker.run_id == run_id:
                removed = removed if marker.keep else _remove(directory, marker)
                _give_back(directory, marker)
        finally:
            os.close(lock)
    return removed


def leftover_bytes(directory: Path, *, reuse: bool = False) -> int:
    """Bytes of storage that a claim of a directory would clear, or, with `reuse`, find its objects in.

    0 where a process holds the directory, where nothing is there, where its objects are kept from such a claim, and
    where it cannot be read, which the claim itself will tell.
    """
    with contextlib.suppress(OSError, ConfigurationError):
        directory = directory.resolve()
        if _is_held(directory):
            return 0
        marker = read_marker(directory)
        if marker is not None and (reuse or not marker.keep):
            return object_room(directory / marker.objects, marker.layout, marker.levels).bytes
    return 0


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
            remove_empty(created)
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
            remove_empty(created)
            raise
        if lock is None:
            raise _in_use(directory)
        return lock, created


def _in_use(directory: Path) -> ConfigurationError:
    holder = read_marker(directory)
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


def _is_held(directory: Path) -> bool:
    """Whether a process holds a directory now."""
    try:
        lock = _try_lock(directory, create=False)
    except FileNotFoundError:
        return False
    if lock is None:
        return True
    os.close(lock)
    return False


def _taken(
    directory: Path, created: list[str], run_id: str, cache_format: CacheFormat, *, keep: bool, reuse: bool
) -> tuple[Marker, Removed | None, Marker | None]:
    """Take over, or clear, what an earlier run left in a locked directory, and mark the directory as this run's.

    `created` are the directories that this claim created; those that the earlier run had created are put before them.
    Returns the marker, what was cleared, and the earlier run's marker where its objects were taken over.
    """
    earlier = read_marker(directory)
    objects, cleared = run_id, None
    if earlier is not None:
        if reuse and _is_directory(directory / earlier.objects):
            _check_reusable(directory, earlier, cache_format)
            objects = earlier.objects
        else:
            cleared = _clear_dead_run(directory, earlier)
        created[:0] = _own(directory, earlier.created_directories)
    reused = earlier if cleared is None else None
    # Until the run begins: one that is refused, or killed, takes nothing from what was to be kept, and keeps nothing.
    keep = reused is not None and (keep or reused.keep)
    marker = new_marker(run_id, objects, keep=keep, cache_format=cache_format, created_directories=tuple(created))
    if reused is None:
        _make_objects(directory, marker)
    else:
        write_marker(directory, marker)
        reused = replace(reused, created_directories=marker.created_directories)
    return marker, cleared, reused


def _check_reusable(directory: Path, earlier: Marker, wanted: CacheFormat) -> None:
    if earlier.format is None:
        raise ConfigurationError(
            f"--reuse-cache: {directory} holds objects of run {earlier.run_id}, which an older version wrote and this "
            "one cannot read; a run without --reuse-cache clears them"
        )
    check_reusable(str(directory), earlier.run_id, wanted=wanted, found=earlier.format)


def _clear_dead_run(directory: Path, dead: Marker) -> Removed:
    """Clear what a dead run left in a locked directory, unless it was to be kept."""
    if dead.keep and _is_directory(directory / dead.objects):
        raise kept_by_other(str(directory), dead.run_id)
    removed = _remove(directory, dead)
    (directory / MARKER_NAME).unlink()
    return removed


def _make_objects(directory: Path, marker: Marker) -> None:
    """Make the directory of objects of a run that begins with none."""
    objects = directory / marker.objects
    if os.path.lexists(objects):
        raise ConfigurationError(
            f"{objects} is there already and is not this run's; remove it by hand, or choose another directory with "
            "--cache-dir"
        )
    # The marker first: what is made after it can be found again, should the process die here.
    write_marker(directory, marker)
    try:
        objects.mkdir()
    except OSError:
        (directory / MARKER_NAME).unlink()
        raise


def _remove(directory: Path, marker: Marker) -> Removed:
    removed = remove_objects(directory / marker.objects, marker.layout, marker.levels)
    return Removed(run_id=marker.run_id, files=removed.files, bytes=removed.bytes)


def _give_back(directory: Path, marker: Marker, left: Marker | None = None) -> None:
    """Remove a run's marker, lock and empty directories; the lock must be held.

    Where objects remain the marker stays, or `left` takes its place.
    """
    objects = directory / marker.objects
    remove_empty([str(objects)])
    if not os.path.lexists(objects):
        (directory / MARKER_NAME).unlink(missing_ok=True)
    elif left is not None:
        write_marker(directory, left)
    # The lock goes last: until then nobody else can claim the directory.
    (directory / LOCK_NAME).unlink(missing_ok=True)
    remove_empty(_own(directory, marker.created_directories))


def _own(directory: Path, created: Sequence[str]) -> tuple[str, ...]:
    """Of the directories that a marker lists, those that a claim of `directory` can have created."""
    possible = {str(directory), *map(str, directory.parents)}
    return tuple(path for path in created if path in possible)


def _is_directory(path: Path) -> bool:
    """Whether a path is a directory, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
