"""Rates of a host, for any two readings: what went back has no rate, and nothing is lost of what grew."""

from hypothesis import given
from hypothesis import strategies as st

from mlpstorage.cluster.counters import CpuTicks, DiskCounters, HostCounters
from mlpstorage.kvcache.host_rates import cpu_shares, host_rates

COUNTS = st.integers(0, 1 << 50)
DISKS = st.builds(DiskCounters, **dict.fromkeys(DiskCounters.__dataclass_fields__, COUNTS))
TICKS = st.builds(CpuTicks, **dict.fromkeys(CpuTicks.__dataclass_fields__, st.integers(0, 1000)))
NAMES = st.sampled_from(["sda", "sdb", "nvme0n1"])


def reading(disks: dict[str, DiskCounters]) -> HostCounters:
    """A host that tells of its disks only."""
    return HostCounters(cpu=None, memory=None, vm=None, disks=disks, networks=None)


@given(
    before=st.dictionaries(NAMES, DISKS),
    after=st.dictionaries(NAMES, DISKS),
    interval_s=st.floats(min_value=0.001, max_value=3600),
)
def test_rates_of_disks_are_growth_or_none(
    before: dict[str, DiskCounters], after: dict[str, DiskCounters], interval_s: float
) -> None:
    """Every disk of either reading is named; a counter that went back is None, else rate times time is its growth."""
    disks = host_rates(reading(before), reading(after), interval_s).disks
    assert disks is not None
    assert set(disks) == set(before) | set(after)
    for name, rates in disks.items():
        if name not in before or name not in after:
            assert rates is None
            continue
        assert rates is not None
        growth = after[name].read_bytes - before[name].read_bytes
        if growth < 0:
            assert rates.read_bytes_per_s is None
        else:
            assert rates.read_bytes_per_s is not None
            assert abs(rates.read_bytes_per_s * interval_s - growth) <= 0.001 * interval_s + growth * 1e-12
        assert all(value is None or value >= 0 for _, value in rates)
        assert rates.busy_share is None or rates.busy_share <= 1


@given(before=TICKS, after=TICKS)
def test_shares_add_up_to_one_or_are_none(before: CpuTicks, after: CpuTicks) -> None:
    """Whatever the ticks are; None exactly where one went back, or none passed."""
    shares = cpu_shares(before, after)
    grown = [getattr(after, name) - getattr(before, name) for name in CpuTicks.__dataclass_fields__]
    assert (shares is None) == (min(grown) < 0 or sum(grown) == 0)
    if shares is not None:
        assert abs(sum(share for _, share in shares) - 1) < 0.001
        assert all(0 <= share <= 1 for _, share in shares)
