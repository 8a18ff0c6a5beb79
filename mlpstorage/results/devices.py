"""What the block devices below the cache did in the window, whoever used them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from mlpstorage.config import GIB
from mlpstorage.results.models import DiskRates, RankResult
from mlpstorage.results.summary import DeviceUse

_Numbers = tuple[float, float, float]


def device_use(ranks: Sequence[RankResult]) -> tuple[DeviceUse, ...]:
    """For each host whose cache lies on a block device, means over the lines of its time series inside the window.

    A line counts if the whole of its interval lies in the window. A host without such a line, or whose device tells
    nothing, has no entry.
    """
    uses = []
    for rank in ranks:
        device = _cache_device(rank.host_facts)
        lines = [] if device is None else list(_window_lines(rank, device))
        covered_s = sum(interval_s for interval_s, _ in lines)
        if device is None or not covered_s:
            continue
        read_bytes, written_bytes, busy_s = (
            sum(interval_s * numbers[part] for interval_s, numbers in lines) for part in range(3)
        )
        uses.append(
            DeviceUse(
                host=rank.host,
                device=device,
                covered_s=covered_s,
                read_gib_per_s=read_bytes / GIB / covered_s,
                write_gib_per_s=written_bytes / GIB / covered_s,
                busy_share=busy_s / covered_s,
            )
        )
    return tuple(uses)


def _window_lines(rank: RankResult, device: str) -> Iterator[tuple[float, _Numbers]]:
    """Length and numbers of each line that begins, where the line before ends, and ends in the window."""
    for before, line in pairwise(rank.host_samples):
        numbers = _numbers((line.disks or {}).get(device))
        if before.phase == line.phase == "window" and numbers is not None:
            yield line.interval_s, numbers


def _numbers(rates: DiskRates | None) -> _Numbers | None:
    if rates is None or rates.read_bytes_per_s is None or rates.written_bytes_per_s is None or rates.busy_share is None:
        return None
    return rates.read_bytes_per_s, rates.written_bytes_per_s, rates.busy_share


def _cache_device(facts: Mapping[str, object]) -> str | None:
    device = facts.get("cache_device")
    name = device.get("name") if isinstance(device, Mapping) else None
    return name if isinstance(name, str) else None
