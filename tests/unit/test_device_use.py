"""What the devices below the cache did in the window, from lines whose numbers are worked out by hand."""

from collections.abc import Mapping

import pytest

from mlpstorage.config import GIB
from mlpstorage.results.models import DiskRates, HostSample, Phase, RankResult
from mlpstorage.results.summary import DeviceUse
from mlpstorage.results.trials import pooled
from tests.records import merge, rank

FACTS: Mapping[str, object] = {"host": "h1", "cache_device": {"name": "sda"}}


def rates(read_bytes_per_s: float | None, written_bytes_per_s: float = 0.0, busy_share: float = 0.5) -> DiskRates:
    """Rates of a disk; only three of them matter here."""
    return DiskRates(
        reads_per_s=None,
        read_bytes_per_s=read_bytes_per_s,
        read_mean_ms=None,
        writes_per_s=None,
        written_bytes_per_s=written_bytes_per_s,
        write_mean_ms=None,
        busy_share=busy_share,
        queue_mean=None,
        in_flight=0,
    )


def line(t_s: float, interval_s: float, phase: Phase, sda: DiskRates | None) -> HostSample:
    """A line of a host that has two disks."""
    disks = {"sda": sda, "sdb": rates(99 * GIB)}
    return HostSample(
        host="h1",
        t_s=t_s,
        interval_s=interval_s,
        phase=phase,
        cpu=None,
        memory=None,
        vm=None,
        disks=disks,
        networks=None,
    )


def used(*lines: HostSample, facts: Mapping[str, object] = FACTS, number: int = 0) -> RankResult:
    """A rank that kept these lines of its host."""
    return rank(number, host="h1", host_facts=facts, host_samples=lines)


WINDOW = (
    line(1.0, 1.0, "warmup", rates(9 * GIB)),
    line(2.0, 1.0, "window", rates(9 * GIB)),
    line(3.0, 1.0, "window", rates(2 * GIB, 1 * GIB, 0.9)),
    line(6.0, 3.0, "window", rates(4 * GIB, 3 * GIB, 0.5)),
    line(7.0, 1.0, "drain", rates(9 * GIB)),
)


def test_means_over_the_lines_inside_the_window() -> None:
    """One second of 2 GiB/s and three of 4 are 14 GiB in 4 s; the other lines began or ended outside the window.

    Written (1 + 9) / 4, busy (0.9 + 1.5) / 4.
    """
    (use,) = merge(used(*WINDOW)).devices
    assert use.busy_share == pytest.approx(0.6)
    expected = DeviceUse(
        host="h1",
        device="sda",
        covered_s=4.0,
        read_gib_per_s=3.5,
        write_gib_per_s=2.5,
        busy_share=use.busy_share,
    )
    assert use == expected


def test_only_the_rank_that_kept_the_lines_has_a_device() -> None:
    """Two ranks of a host give one entry."""
    assert len(merge(used(*WINDOW), used(number=1)).devices) == 1


@pytest.mark.parametrize("facts", [{}, {"cache_device": None}, {"cache_device": {"name": "dm-9"}}])
def test_hosts_without_a_device_have_no_entry(facts: dict[str, object]) -> None:
    """A network or memory file system, or a device of which the kernel counts nothing."""
    assert merge(used(*WINDOW, facts=facts)).devices == ()


def test_lines_without_numbers_cover_nothing() -> None:
    """A device that went away leaves the time out in which it told nothing."""
    gone = (*WINDOW[:3], line(4.0, 1.0, "window", None), line(5.0, 1.0, "window", rates(None)))
    (use,) = merge(used(*gone)).devices
    assert (use.covered_s, use.read_gib_per_s) == (1.0, 2.0)
    assert merge(used(*WINDOW[:2])).devices == ()


def test_trials_are_taken_together() -> None:
    """The windows of two trials, each with the lines that lie in it: 14 GiB in 4 s twice."""
    (use,) = merge(*pooled([(used(*WINDOW),), (used(*WINDOW),)])).devices
    assert (use.covered_s, use.read_gib_per_s) == (8.0, 3.5)
