"""Facts of a host, as it tells them in /proc and /sys: pure parsers, and the gathering of what they give.

Nothing here asks DNS, starts a process or sends a packet. What cannot be had is None.
"""

import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

from mlpstorage import __version__
from mlpstorage.cluster.block_devices import block_device_facts, block_devices, block_of
from mlpstorage.cluster.cgroups import (
    CgroupLimits,
    available_memory_bytes,
    cgroup_limits,
    parse_cgroup_paths,
    parse_cpu_limit,
    parse_memory_limit,
)
from mlpstorage.cluster.kernel_files import printable, read
from mlpstorage.cluster.machine import CpuInfo, parse_cpuinfo, parse_meminfo, parse_os_release, sockets_by_topology
from mlpstorage.cluster.mounts import (
    FileSystemSpace,
    Mount,
    existing_ancestor,
    file_system_space,
    limited_space,
    mount_facts,
    mount_of,
    parse_mounts,
)
from mlpstorage.cluster.network import network_interfaces, rdma_devices
from mlpstorage.cluster.software import package_versions
from mlpstorage.cluster.summary import cluster_information, difference_warnings, summarize

__all__ = [
    "CgroupLimits",
    "CpuInfo",
    "FileSystemSpace",
    "Mount",
    "available_memory_bytes",
    "block_device_facts",
    "block_devices",
    "cache_block",
    "cgroup_limits",
    "cluster_information",
    "difference_warnings",
    "existing_ancestor",
    "file_system_space",
    "host_facts",
    "limited_space",
    "mount_facts",
    "mount_of",
    "network_interfaces",
    "package_versions",
    "parse_cgroup_paths",
    "parse_cpu_limit",
    "parse_cpuinfo",
    "parse_meminfo",
    "parse_memory_limit",
    "parse_mounts",
    "parse_os_release",
    "rdma_devices",
    "summarize",
]


def host_facts(cache_dir: Path | None) -> dict[str, object]:
    """Facts of this machine, and of the storage below `cache_dir` or the nearest directory above it that exists.

    `usable_cores` are those that scheduler affinity and the cgroup leave this process, a part of a core counted whole.
    """
    cpu = parse_cpuinfo(printable(read(Path("/proc/cpuinfo")) or ""))
    limits = cgroup_limits()
    affinity = len(os.sched_getaffinity(0))
    block = None if cache_dir is None else cache_block(cache_dir)
    system = os.uname()
    return {
        "host": system.nodename,
        "cpu_model": cpu.model,
        "cpu_sockets": cpu.sockets or sockets_by_topology(Path("/sys/devices/system/cpu")),
        "logical_cores": cpu.logical_cores or os.cpu_count(),
        "usable_cores": min(affinity, max(1, math.ceil(limits.cpu_limit_cores or affinity))),
        "memory_total_bytes": parse_meminfo(read(Path("/proc/meminfo")) or "").get("MemTotal"),
        "memory_available_bytes": available_memory_bytes(),
        "cgroup": asdict(limits),
        "kernel": system.release,
        "architecture": system.machine,
        "os": parse_os_release(printable(read(Path("/etc/os-release")) or "")).get("PRETTY_NAME"),
        "cache_mount": None if cache_dir is None else mount_facts(cache_dir),
        "cache_device": block_device_facts(block) if block else None,
        "block_devices": block_devices(),
        "network_interfaces": network_interfaces(),
        "rdma_devices": rdma_devices(),
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "mlpstorage": __version__,
        "packages": package_versions(),
    }


def cache_block(cache_dir: Path) -> Path | None:
    """The /sys directory of the block device below a directory, or the nearest one above it; None where none is."""
    return block_of(existing_ancestor(cache_dir), str(mount_facts(cache_dir)["device"]))
