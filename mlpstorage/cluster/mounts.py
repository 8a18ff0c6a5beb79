"""Mounts, and the room on file systems."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.cluster.kernel_files import printable, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of /proc/mounts."""

    device: str
    mount_point: str
    fs_type: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystemSpace:
    """Room on a file system; `free_bytes` is what an ordinary user may fill (quotas are not seen)."""

    total_bytes: int
    free_bytes: int
    mount: str | None
    fs_type: str | None


def parse_mounts(text: str) -> tuple[Mount, ...]:
    r"""Read /proc/mounts; the kernel writes blanks, tabs, newlines and backslashes as octal escapes (`\040`)."""
    mounts: list[Mount] = []
    for line in text.split("\n"):  # not splitlines: a name may hold what Unicode takes for the end of a line
        fields = [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in line.split(" ")]
        if len(fields) >= 4:  # noqa: PLR2004 - the two last of six fields are always 0
            device, mount_point, fs_type, options = fields[:4]
            options_tuple = tuple(options.split(","))
            mounts.append(Mount(device=device, mount_point=mount_point, fs_type=fs_type, options=options_tuple))
    return tuple(mounts)


def mount_of(mounts: Sequence[Mount], path: str) -> Mount | None:
    """The mount that holds the absolute, resolved `path`: the longest mount point, and of equal ones the last.

    A mount that was covered later by one further up the tree is not recognised as hidden.
    """
    found: Mount | None = None
    for mount in mounts:
        point = mount.mount_point.rstrip("/")
        inside = path == point or path.startswith(point + "/")
        if inside and (found is None or len(point) >= len(found.mount_point.rstrip("/"))):
            found = mount
    return found


def existing_ancestor(path: Path) -> Path:
    """The nearest directory or file on the way up from `path` that exists, symbolic links followed."""
    place = Path(os.path.realpath(path))
    while not os.path.exists(place):  # noqa: PTH110 - Path.exists raises where a directory may not be searched
        place = place.parent
    return place


def file_system_space(path: Path) -> FileSystemSpace:
    """Room on the file system that holds `path`, or would hold it once created."""
    place = existing_ancestor(path)
    space = os.statvfs(place)
    mount = mount_of(parse_mounts(read(Path("/proc/self/mounts")) or ""), str(place))
    return FileSystemSpace(
        total_bytes=space.f_blocks * space.f_frsize,
        free_bytes=space.f_bavail * space.f_frsize,
        mount=mount.mount_point if mount else None,
        fs_type=mount.fs_type if mount else None,
    )


def limited_space(path: Path) -> FileSystemSpace | None:
    """The same; None where the file system tells no size (ramfs), so that there is nothing to plan with."""
    space = file_system_space(path)
    return space if space.total_bytes else None


def mount_facts(path: Path) -> dict[str, object]:
    """The mount that holds `path`, its type and options, and the room on it."""
    place = existing_ancestor(path)
    mount = mount_of(parse_mounts(read(Path("/proc/self/mounts")) or ""), str(place))
    space = file_system_space(place)
    return {
        "device": printable(mount.device) if mount else None,
        "mount_point": printable(mount.mount_point) if mount else None,
        "type": space.fs_type,
        "options": [printable(option) for option in mount.options] if mount else None,
        "size_bytes": space.total_bytes,
        "free_bytes": space.free_bytes,
    }
