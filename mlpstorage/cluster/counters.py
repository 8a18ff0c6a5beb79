"""What a host has counted since it started, as the kernel's files tell it: pure parsers, and one reading of all.

Of a file that is not there the part is None. What the fields mean: proc(5), and of disks the kernel's
Documentation/admin-guide/iostats.rst.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlpstorage.cluster.kernel_files import ROOT, read
from mlpstorage.cluster.machine import parse_meminfo

T = TypeVar("T")

SECTOR_BYTES = 512
"""Unit of the sectors in /proc/diskstats, whatever the device's own are."""

COUNTER_FILES = ("proc/stat", "proc/meminfo", "proc/vmstat", "proc/diskstats", "proc/net/dev")

_DISK_FIELDS = 14
_CPU_FIELDS = 8
_NET_FIELDS = 16
_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCounters:
    """A line of /proc/diskstats.

    Attributes:
        reads: Reads completed, after requests were joined.
        read_bytes: Bytes read.
        read_ms: Time of all reads, from their entry into the queue to their end, summed; wraps at 32 bits.
        writes: Likewise of writes.
        written_bytes: Likewise.
        write_ms: Likewise.
        in_flight: Requests in the queue or at the device at this moment.
        busy_ms: Time during which any request was in flight.
        queue_ms: The same time, each request counted.
    """

    reads: int
    read_bytes: int
    read_ms: int
    writes: int
    written_bytes: int
    write_ms: int
    in_flight: int
    busy_ms: int
    queue_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTicks:
    """Processor time of all cores in ticks. `user` includes guests and niced programs, `system` interrupts."""

    user: int
    system: int
    iowait: int
    steal: int
    idle: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmCounters:
    """Of /proc/vmstat, in bytes: four that only grow, and three as of this moment. None where the kernel has none."""

    page_in_bytes: int | None
    page_out_bytes: int | None
    swap_in_bytes: int | None
    swap_out_bytes: int | None
    file_pages_bytes: int | None
    dirty_bytes: int | None
    writeback_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NetCounters:
    """A line of /proc/net/dev; errors and drops in both directions together."""

    received_bytes: int
    received_packets: int
    sent_bytes: int
    sent_packets: int
    errors: int
    drops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCounters:
    """One reading of all. `memory` is /proc/meminfo in bytes; what could not be read is None."""

    cpu: CpuTicks | None
    memory: Mapping[str, int] | None
    vm: VmCounters | None
    disks: Mapping[str, DiskCounters] | None
    networks: Mapping[str, NetCounters] | None


def parse_diskstats(text: str, names: Collection[str]) -> dict[str, DiskCounters]:
    """Counters of the named devices; later kernels have further fields, which are left."""
    disks: dict[str, DiskCounters] = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < _DISK_FIELDS or fields[2] not in names:
            continue
        numbers = [int(field) for field in fields[3:_DISK_FIELDS]]
        reads, _, read_sectors, read_ms, writes, _, written_sectors, write_ms, in_flight, busy_ms, queue_ms = numbers
        disks[fields[2]] = DiskCounters(
            reads=reads,
            read_bytes=read_sectors * SECTOR_BYTES,
            read_ms=read_ms,
            writes=writes,
            written_bytes=written_sectors * SECTOR_BYTES,
            write_ms=write_ms,
            in_flight=in_flight,
            busy_ms=busy_ms,
            queue_ms=queue_ms,
        )
    return disks


def parse_cpu_ticks(text: str) -> CpuTicks | None:
    """The first line of /proc/stat, of all processors together. Guests' time is in `user` and `nice` already."""
    fields = text.partition("\n")[0].split()
    if len(fields) <= _CPU_FIELDS or fields[0] != "cpu":
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) for field in fields[1 : _CPU_FIELDS + 1])
    return CpuTicks(user=user + nice, system=system + irq + softirq, iowait=iowait, steal=steal, idle=idle)


def parse_vmstat(text: str, page_bytes: int) -> VmCounters:
    """Counters of /proc/vmstat: pgpgin and pgpgout count KiB, all others pages."""
    pairs = (line.split(" ") for line in text.splitlines())
    found = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}  # noqa: PLR2004 - a name and a number

    def scaled(name: str, unit_bytes: int) -> int | None:
        return found[name] * unit_bytes if name in found else None

    return VmCounters(
        page_in_bytes=scaled("pgpgin", _KIB),
        page_out_bytes=scaled("pgpgout", _KIB),
        swap_in_bytes=scaled("pswpin", page_bytes),
        swap_out_bytes=scaled("pswpout", page_bytes),
        file_pages_bytes=scaled("nr_file_pages", page_bytes),
        dirty_bytes=scaled("nr_dirty", page_bytes),
        writeback_bytes=scaled("nr_writeback", page_bytes),
    )


def parse_net_dev(text: str) -> dict[str, NetCounters]:
    """Counters of every interface but the loopback. Old kernels put no blank behind the colon."""
    networks: dict[str, NetCounters] = {}
    for line in text.splitlines():
        name, colon, rest = line.rpartition(":")
        fields = rest.split()
        if not colon or len(fields) < _NET_FIELDS or name.strip() == "lo":
            continue
        values = [int(field) for field in fields]
        networks[name.strip()] = NetCounters(
            received_bytes=values[0],
            received_packets=values[1],
            sent_bytes=values[8],
            sent_packets=values[9],
            errors=values[2] + values[10],
            drops=values[3] + values[11],
        )
    return networks


def read_counters(disk_names: Collection[str], root: Path = ROOT) -> HostCounters:
    """One reading, of the named disks; `root` holds proc."""
    stat, meminfo, vmstat, diskstats, net_dev = (read(root / name) for name in COUNTER_FILES)
    return HostCounters(
        cpu=_parsed(stat, parse_cpu_ticks),
        memory=_parsed(meminfo, parse_meminfo),
        vm=_parsed(vmstat, lambda text: parse_vmstat(text, os.sysconf("SC_PAGE_SIZE"))),
        disks=_parsed(diskstats, lambda text: parse_diskstats(text, disk_names)),
        networks=_parsed(net_dev, parse_net_dev),
    )


def _parsed(text: str | None, parse: Callable[[str], T | None]) -> T | None:
    """What a file tells; None too where it is not as any kernel writes it: that is no reason to end a run."""
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError:
        return None


def missing_counter_files(root: Path = ROOT) -> list[str]:
    """Those of the files that cannot be read here, as absolute names."""
    return [f"/{name}" for name in COUNTER_FILES if read(root / name) is None]
