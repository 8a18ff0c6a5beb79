"""Facts of a host, as it tells them in /proc and /sys: pure parsers, and the gathering of what they give.

Nothing here asks DNS, starts a process or sends a packet. What cannot be had is None.
"""

import contextlib
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlpstorage import __version__

_ROOT = Path("/")
_SECTOR_BYTES = 512
"""Unit of /sys/class/block/*/size, whatever the device's own sectors are (kernel: Documentation/block/stat)."""

_NO_LIMIT_BYTES = 1 << 60
"""A cgroup v1 without a memory limit shows a huge number, near 2**63 rounded to pages."""

_ARM_CPUS = {
    ("0x41", "0xd0c"): "Arm Neoverse-N1",
    ("0x41", "0xd40"): "Arm Neoverse-V1",
    ("0x41", "0xd49"): "Arm Neoverse-N2",
    ("0x41", "0xd4f"): "Arm Neoverse-V2",
    ("0x41", "0xd84"): "Arm Neoverse-V3",
    ("0x41", "0xd8e"): "Arm Neoverse-N3",
    ("0x48", "0xd01"): "HiSilicon TSV110",
    ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1a",
}
"""Server cores by (implementer, part) of the MIDR register; arm64 kernels print no model name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuInfo:
    """What /proc/cpuinfo tells; `logical_cores` counts hardware threads."""

    model: str | None
    sockets: int | None
    logical_cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of /proc/mounts."""

    device: str
    mount_point: str
    fs_type: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What the cgroups of this process allow: the tightest of its own and those above it; None where unlimited.

    `memory_left_bytes` counts pages of files as free, since the kernel drops them before it refuses memory.
    """

    memory_limit_bytes: int | None
    memory_left_bytes: int | None
    cpu_limit_cores: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystemSpace:
    """Room on a file system; `free_bytes` is what an ordinary user may fill (quotas are not seen)."""

    total_bytes: int
    free_bytes: int
    mount: str | None
    fs_type: str | None


def parse_cpuinfo(text: str) -> CpuInfo:
    """Read /proc/cpuinfo of x86 (model name, physical id) or arm64 (implementer and part)."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), []).append(value.strip())
    model = next(iter(values.get("model name", [])), None)
    implementers, parts = values.get("CPU implementer"), values.get("CPU part")
    if model is None and implementers and parts:
        key_of_arm = (implementers[0].lower(), parts[0].lower())
        model = _ARM_CPUS.get(key_of_arm, f"arm64 implementer {key_of_arm[0]} part {key_of_arm[1]}")
    sockets = len(set(values.get("physical id", []))) or None
    return CpuInfo(model=model, sockets=sockets, logical_cores=len(values.get("processor", [])))


def parse_meminfo(text: str) -> dict[str, int]:
    """Sizes of /proc/meminfo in bytes; counts (huge pages) are left out."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\S+):\s+(\d+) kB$", text, flags=re.MULTILINE)}


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


def parse_os_release(text: str) -> dict[str, str]:
    """Read /etc/os-release: shell assignments, with or without quotes."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            try:
                values[name] = " ".join(shlex.split(value))
            except ValueError:  # an open quotation: the file is not what it should be, its text still tells something
                values[name] = value
    return values


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


def cgroup_limits(root: Path = _ROOT) -> CgroupLimits:
    """Limits on memory and processor time of this process, from cgroup v1, v2 or both; `root` holds proc and sys."""
    memory_limits: list[int] = []
    memory_left: list[int] = []
    cpu_limits: list[float] = []
    for group in _cgroup_levels(root, "memory"):
        limit = parse_memory_limit(_read(group / "memory.max") or _read(group / "memory.limit_in_bytes"))
        if limit is None:
            continue
        memory_limits.append(limit)
        used = (_read(group / "memory.current") or _read(group / "memory.usage_in_bytes") or "").strip()
        if used.isdecimal():
            memory_left.append(max(0, min(limit, limit - int(used) + _file_pages_bytes(group))))
    for group in _cgroup_levels(root, "cpu"):
        v1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        cores = parse_cpu_limit(_read(group / "cpu.max") or v1)
        if cores is not None:
            cpu_limits.append(cores)
    return CgroupLimits(
        memory_limit_bytes=min(memory_limits, default=None),
        memory_left_bytes=min(memory_left, default=None),
        cpu_limit_cores=min(cpu_limits, default=None),
    )


def _file_pages_bytes(group: Path) -> int:
    pairs = (line.split(" ") for line in (_read(group / "memory.stat") or "").splitlines())
    stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}  # noqa: PLR2004 - a name and a number
    # v1 counts a group without its children, and with them in total_*; limit and usage include them.
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))


def _cgroup_levels(root: Path, controller: str) -> Iterator[Path]:
    """Directories of this process's cgroup and all above it, in each hierarchy that may carry `controller`."""
    paths = parse_cgroup_paths(_read(root / "proc/self/cgroup") or "")
    for mount in parse_mounts(_read(root / "proc/self/mounts") or ""):
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


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process can take without swapping: MemAvailable, or what its cgroup leaves if that is less."""
    available = parse_meminfo(_read(root / "proc/meminfo") or "").get("MemAvailable")
    if available is None:
        import psutil  # noqa: PLC0415 - only where /proc does not tell

        available = int(psutil.virtual_memory().available)
    left = cgroup_limits(root).memory_left_bytes
    return available if left is None else min(available, left)


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
    mount = mount_of(parse_mounts(_read(Path("/proc/self/mounts")) or ""), str(place))
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
    mount = mount_of(parse_mounts(_read(Path("/proc/self/mounts")) or ""), str(place))
    space = file_system_space(place)
    return {
        "device": _printable(mount.device) if mount else None,
        "mount_point": _printable(mount.mount_point) if mount else None,
        "type": space.fs_type,
        "options": [_printable(option) for option in mount.options] if mount else None,
        "size_bytes": space.total_bytes,
        "free_bytes": space.free_bytes,
    }


def block_device_facts(block: Path) -> dict[str, object]:
    """What /sys/class/block tells of one device; a partition's queue and model are those of its disk."""
    own = block.resolve()
    is_partition = (own / "partition").exists()
    disk = own.parent if is_partition else own
    scheduler = re.search(r"\[(.+)\]", _text(disk / "queue/scheduler") or "")
    rotational, sectors = _number(disk / "queue/rotational"), _number(own / "size")
    return {
        "name": own.name,
        "disk": disk.name,
        "model": _text(disk / "device/model"),
        "rotational": None if rotational is None else bool(rotational),
        "size_bytes": None if sectors is None else sectors * _SECTOR_BYTES,
        "queue_depth": _number(disk / "queue/nr_requests"),
        "scheduler": scheduler[1] if scheduler else None,
        # What a logical volume, an encrypted or a RAID device is made of.
        "parts": sorted(part.name for part in _entries(own / "slaves")),
    }


def _block_of(path: Path, device: str | None) -> Path | None:
    """The /sys directory of the device below `path`; none for network and memory file systems."""
    number = path.stat().st_dev
    by_number = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    # Btrfs and overlays invent device numbers; there the name in /proc/mounts must do.
    by_name = Path("/sys/class/block") / Path(os.path.realpath(device or "")).name
    if by_number.exists():
        return by_number
    return by_name if device and device.startswith("/dev/") and by_name.exists() else None


def network_interfaces(net: Path) -> list[dict[str, object]]:
    """Interfaces below /sys/class/net, without the loopback; `speed_mbit_per_s` is None where a link has none."""
    interfaces: list[dict[str, object]] = []
    for entry in _entries(net):
        if entry.name != "lo" and entry.is_dir():
            speed = _number(entry / "speed")
            interfaces.append(
                {
                    "name": entry.name,
                    # The kernel says -1 for a virtual link and refuses the read for one that is down.
                    "speed_mbit_per_s": speed if speed is not None and speed > 0 else None,
                    "state": _text(entry / "operstate"),
                }
            )
    return sorted(interfaces, key=lambda interface: str(interface["name"]))


def host_facts(cache_dir: Path | None) -> dict[str, object]:
    """Facts of this machine, and of the storage below `cache_dir` or the nearest directory above it that exists.

    `usable_cores` are those that scheduler affinity and the cgroup leave this process, a part of a core counted whole.
    """
    cpu = parse_cpuinfo(_read(Path("/proc/cpuinfo")) or "")
    limits = cgroup_limits()
    affinity = len(os.sched_getaffinity(0))
    mount: dict[str, object] | None = None
    block: Path | None = None
    if cache_dir is not None:
        mount = mount_facts(cache_dir)
        block = _block_of(existing_ancestor(cache_dir), str(mount["device"]))
    system = os.uname()
    return {
        "host": system.nodename,
        "cpu_model": cpu.model,
        "cpu_sockets": cpu.sockets or _sockets_by_topology(Path("/sys/devices/system/cpu")),
        "logical_cores": cpu.logical_cores or os.cpu_count(),
        "usable_cores": min(affinity, max(1, math.ceil(limits.cpu_limit_cores or affinity))),
        "memory_total_bytes": parse_meminfo(_read(Path("/proc/meminfo")) or "").get("MemTotal"),
        "memory_available_bytes": available_memory_bytes(),
        "cgroup": asdict(limits),
        "kernel": system.release,
        "architecture": system.machine,
        "os": parse_os_release(_read(Path("/etc/os-release")) or "").get("PRETTY_NAME"),
        "cache_mount": mount,
        "cache_device": block_device_facts(block) if block else None,
        "network_interfaces": network_interfaces(Path("/sys/class/net")),
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "mlpstorage": __version__,
    }


def _sockets_by_topology(cpus: Path) -> int | None:
    """Sockets as arm64 kernels know them from the firmware; -1 is unknown."""
    packages = {_number(cpu / "topology/physical_package_id") for cpu in _entries(cpus)}
    return len({package for package in packages if package is not None and package >= 0}) or None


_DIFFER_ALWAYS = frozenset({"host", "memory_available_bytes", "cgroup.memory_left_bytes", "cache_mount.free_bytes"})
"""Facts in which equal machines differ too, so that a difference tells nothing."""


def summarize(hosts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Totals over `hosts` (as `host_facts` gives them), and the facts in which they differ.

    A total is None where a host could not tell its part. `differences` has, for each fact, the values and who has them.
    """
    flat = [dict(_flatten(facts)) for facts in hosts]
    names = sorted({name for facts in flat for name in facts} - _DIFFER_ALWAYS)
    differences: dict[str, object] = {}
    for name in names:
        groups: list[dict[str, object]] = []
        members: list[list[object]] = []
        for facts in flat:
            value = facts.get(name)
            place = next((i for i, group in enumerate(groups) if group["value"] == value), None)
            if place is None:
                members.append([facts.get("host")])
                groups.append({"value": value, "hosts": members[-1]})
            else:
                members[place].append(facts.get("host"))
        if len(groups) > 1:
            differences[name] = groups
    return {
        "hosts": len(hosts),
        "total_cores": _total(flat, "logical_cores"),
        "total_memory_bytes": _total(flat, "memory_total_bytes"),
        "differences": differences,
    }


def cluster_information(hosts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The `cluster_information` of a run's metadata: every host's facts, and their summary."""
    return {"hosts": [dict(facts) for facts in hosts], "summary": summarize(hosts)}


def _flatten(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _total(hosts: Sequence[Mapping[str, object]], name: str) -> int | None:
    values = [value for facts in hosts if isinstance(value := facts.get(name), int)]
    return sum(values) if len(values) == len(hosts) else None


def _read(path: Path) -> str | None:
    """Text of a kernel's file; None where it is not there or refuses (a link that is down, another user's cgroup)."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None


def _printable(text: str) -> str:
    """`text` without the surrogates that stand for bytes outside UTF-8: no JSON file can hold them."""
    return os.fsencode(text).decode("utf-8", errors="replace")


def _text(path: Path) -> str | None:
    return (_read(path) or "").strip() or None


def _number(path: Path) -> int | None:
    try:
        return int(_read(path) or "")
    except ValueError:
        return None


def _entries(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(directory.iterdir())
    return []
