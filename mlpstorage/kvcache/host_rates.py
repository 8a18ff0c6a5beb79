"""From two readings of a host's counters to rates. A counter that went back or is not there gives None, never 0."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from mlpstorage.cluster.counters import CpuTicks, DiskCounters, HostCounters, NetCounters, VmCounters
from mlpstorage.results.models import CpuShares, DiskRates, HostMemory, NetRates, VmRates

_MS = 1000
_RATE_DIGITS = 3
_SHARE_DIGITS = 4

CountersT = TypeVar("CountersT")
RatesT = TypeVar("RatesT")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRates:
    """The parts of a line of a host's time series; None as in `results.models.HostSample`."""

    cpu: CpuShares | None
    memory: HostMemory | None
    vm: VmRates | None
    disks: dict[str, DiskRates | None] | None
    networks: dict[str, NetRates | None] | None


def host_rates(before: HostCounters, after: HostCounters, interval_s: float) -> HostRates:
    """What happened between two readings that lie `interval_s` seconds apart."""
    return HostRates(
        cpu=None if before.cpu is None or after.cpu is None else cpu_shares(before.cpu, after.cpu),
        memory=None if after.memory is None else _memory(after.memory),
        vm=None if before.vm is None or after.vm is None else vm_rates(before.vm, after.vm, interval_s),
        disks=_each(before.disks, after.disks, interval_s, disk_rates),
        networks=_each(before.networks, after.networks, interval_s, net_rates),
    )


def cpu_shares(before: CpuTicks, after: CpuTicks) -> CpuShares | None:
    """Shares of the time between; None where no tick passed or a count went back, as iowait can (proc(5))."""
    ticks = {
        name: getattr(after, name) - getattr(before, name) for name in ("user", "system", "iowait", "steal", "idle")
    }
    total = sum(ticks.values())
    if min(ticks.values()) < 0 or not total:
        return None
    return CpuShares(**{f"{name}_share": round(count / total, _SHARE_DIGITS) for name, count in ticks.items()})


def vm_rates(before: VmCounters, after: VmCounters, interval_s: float) -> VmRates:
    """Rates of what only grows, and the rest as it is."""
    return VmRates(
        page_in_bytes_per_s=_rate(before.page_in_bytes, after.page_in_bytes, interval_s),
        page_out_bytes_per_s=_rate(before.page_out_bytes, after.page_out_bytes, interval_s),
        swap_in_bytes_per_s=_rate(before.swap_in_bytes, after.swap_in_bytes, interval_s),
        swap_out_bytes_per_s=_rate(before.swap_out_bytes, after.swap_out_bytes, interval_s),
        file_pages_bytes=after.file_pages_bytes,
        dirty_bytes=after.dirty_bytes,
        writeback_bytes=after.writeback_bytes,
    )


def disk_rates(before: DiskCounters, after: DiskCounters, interval_s: float) -> DiskRates:
    """Rates of one device; a mean time is None where no request ended."""
    busy, queued = (
        _rate(was, now, interval_s * _MS, _SHARE_DIGITS)
        for was, now in ((before.busy_ms, after.busy_ms), (before.queue_ms, after.queue_ms))
    )
    return DiskRates(
        reads_per_s=_rate(before.reads, after.reads, interval_s),
        read_bytes_per_s=_rate(before.read_bytes, after.read_bytes, interval_s),
        read_mean_ms=_rate(before.read_ms, after.read_ms, after.reads - before.reads),
        writes_per_s=_rate(before.writes, after.writes, interval_s),
        written_bytes_per_s=_rate(before.written_bytes, after.written_bytes, interval_s),
        write_mean_ms=_rate(before.write_ms, after.write_ms, after.writes - before.writes),
        # The kernel adds whole ticks, so that a busy device can come to a little more than all of the time.
        busy_share=None if busy is None else min(busy, 1.0),
        queue_mean=queued,
        in_flight=after.in_flight,
    )


def net_rates(before: NetCounters, after: NetCounters, interval_s: float) -> NetRates:
    """Rates of one interface."""
    return NetRates(
        received_bytes_per_s=_rate(before.received_bytes, after.received_bytes, interval_s),
        received_packets_per_s=_rate(before.received_packets, after.received_packets, interval_s),
        sent_bytes_per_s=_rate(before.sent_bytes, after.sent_bytes, interval_s),
        sent_packets_per_s=_rate(before.sent_packets, after.sent_packets, interval_s),
        errors_per_s=_rate(before.errors, after.errors, interval_s),
        drops_per_s=_rate(before.drops, after.drops, interval_s),
    )


def _memory(sizes_bytes: Mapping[str, int]) -> HostMemory:
    return HostMemory(
        available_bytes=sizes_bytes.get("MemAvailable"),
        cached_bytes=sizes_bytes.get("Cached"),
        dirty_bytes=sizes_bytes.get("Dirty"),
    )


def _each(
    before: Mapping[str, CountersT] | None,
    after: Mapping[str, CountersT] | None,
    interval_s: float,
    rates: Callable[[CountersT, CountersT, float], RatesT],
) -> dict[str, RatesT | None] | None:
    """The rates of every device that either reading has; None for one that only one of them has."""
    if before is None or after is None:
        return None
    names = sorted({*before, *after})
    return {
        name: rates(before[name], after[name], interval_s) if name in before and name in after else None
        for name in names
    }


def _rate(before: int | None, after: int | None, per: float, digits: int = _RATE_DIGITS) -> float | None:
    """The growth of a counter over `per`; None where it went back: it wrapped, or its device is another now."""
    if before is None or after is None or after < before or per <= 0:
        return None
    return round((after - before) / per, digits)
