"""What this process may use of its host: the limits of its cgroups, and the memory that is left."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.cluster.kernel_files import ROOT, read
from mlpstorage.cluster.machine import parse_meminfo
from mlpstorage.cluster.mounts import parse_mounts

_NO_LIMIT_BYTES = 1 << 60
"""A cgroup v1 without a memory limit shows a huge number, near 2**63 rounded to pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What the cgroups of this process allow: the tightest of its own and those above it; None where unlimited.

    `memory_left_bytes` counts pages of files as free, since the kernel drops them before it refuses memory.
    """

    memory_limit_bytes: int | None
    memory_left_bytes: int | None
    cpu_limit_cores: float | None


def parse_cgroup_paths(text: str) -> dict[str, str]:
    """Path of this process by controller, from /proc/self/cgroup; the key of cgroup v2 is the empty string."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon:
            paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def parse_memory_limit(text: str | None) -> int | None:
    """Bytes of `memory.max` (v2) or `memory.limit_in_bytes` (v1); None is unlimited or unknown."""
    word = (text or "").strip()
    limit = int(word) if word.isdecimal() else None
    return None if limit is None or limit >= _NO_LIMIT_BYTES else limit


def parse_cpu_limit(text: str | None) -> float | None:
    """Cores of `cpu.max` (v2: "quota period" or "max period"), or of v1's two files joined, where -1 is no limit."""
    match = re.fullmatch(r"\s*(\d+)\s+([1-9]\d*)\s*", text or "")
    return int(match[1]) / int(match[2]) if match else None


def cgroup_limits(root: Path = ROOT) -> CgroupLimits:
    """Limits on memory and processor time of this process, from cgroup v1, v2 or both; `root` holds proc and sys."""
    memory_limits: list[int] = []
    memory_left: list[int] = []
    cpu_limits: list[float] = []
    for group in _cgroup_levels(root, "memory"):
        limit = parse_memory_limit(read(group / "memory.max") or read(group / "memory.limit_in_bytes"))
        if limit is None:
            continue
        memory_limits.append(limit)
        used = (read(group / "memory.current") or read(group / "memory.usage_in_bytes") or "").strip()
        if used.isdecimal():
            memory_left.append(max(0, min(limit, limit - int(used) + _file_pages_bytes(group))))
    for group in _cgroup_levels(root, "cpu"):
        v1 = f"{read(group / 'cpu.cfs_quota_us')} {read(group / 'cpu.cfs_period_us')}"
        cores = parse_cpu_limit(read(group / "cpu.max") or v1)
        if cores is not None:
            cpu_limits.append(cores)
    return CgroupLimits(
        memory_limit_bytes=min(memory_limits, default=None),
        memory_left_bytes=min(memory_left, default=None),
        cpu_limit_cores=min(cpu_limits, default=None),
    )


def _file_pages_bytes(group: Path) -> int:
    pairs = (line.split(" ") for line in (read(group / "memory.stat") or "").splitlines())
    stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}  # noqa: PLR2004 - a name and a number
    # v1 counts a group without its children, and with them in total_*; limit and usage include them.
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))


def _cgroup_levels(root: Path, controller: str) -> Iterator[Path]:
    """Directories of this process's cgroup and all above it, in each hierarchy that may carry `controller`."""
    paths = parse_cgroup_paths(read(root / "proc/self/cgroup") or "")
    for mount in parse_mounts(read(root / "proc/self/mounts") or ""):
        if mount.fs_type == "cgroup2":
            path = paths.get("")
        elif mount.fs_type == "cgroup" and controller in mount.options:
            path = paths.get(controller)
        else:
            continue
        top = root / mount.mount_point.lstrip("/")
        group = top / (path or "").lstrip("/")
        # In a container the path is often the one outside, and the mount shows only what is inside.
        if ".." in group.parts or not group.is_dir():
            group = top
        yield group
        while group != top:
            group = group.parent
            yield group


def available_memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process can take without swapping: MemAvailable, or what its cgroup leaves if that is less."""
    available = parse_meminfo(read(root / "proc/meminfo") or "").get("MemAvailable")
    if available is None:
        import psutil  # noqa: PLC0415 - only where /proc does not tell

        available = int(psutil.virtual_memory().available)
    left = cgroup_limits(root).memory_left_bytes
    return available if left is None else min(available, left)
