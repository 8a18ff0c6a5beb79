"""The kernel's counters on captured files, and the rates between two captures, worked out by hand.

The later files of the SLES host were "taken" two seconds after the first ones: a disk is gone, another has come, a
counter of 32 bits has wrapped. Those of the Debian host are real, of a virtual machine.
"""

from pathlib import Path

import pytest

from mlpstorage.cluster.counters import (
    COUNTER_FILES,
    CpuTicks,
    DiskCounters,
    HostCounters,
    NetCounters,
    VmCounters,
    missing_counter_files,
    parse_cpu_ticks,
    parse_diskstats,
    parse_net_dev,
    parse_vmstat,
    read_counters,
)
from mlpstorage.kvcache.host_rates import cpu_shares, disk_rates, host_rates, vm_rates
from mlpstorage.results.models import CpuShares, DiskRates, HostMemory, NetRates, VmRates

DATA = Path(__file__).resolve().parents[1] / "data" / "hosts"
DEBIAN, SLES, AMAZON = "debian12-x86_64", "sles15-x86_64", "amazon2023-arm64"
DISKS = ("nvme0n1", "nvme1n1", "nvme2n1", "sda", "sda3", "md127")
PAGE_BYTES = 4096


def captured(host: str, name: str) -> str:
    """Text of a captured file."""
    return (DATA / host / name).read_text(encoding="utf-8")


def proc(place: Path, host: str, suffix: str = "") -> Path:
    """A root directory whose proc holds the captured files of a host."""
    for name in COUNTER_FILES:
        source = DATA / host / (name.removeprefix("proc/").replace("/", "_") + suffix)
        if not source.exists():
            source = DATA / host / source.name.removesuffix(suffix)
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(source.read_bytes())
    return place


def reading(host: str, suffix: str = "") -> HostCounters:
    """All counters of a captured host."""
    return HostCounters(
        cpu=parse_cpu_ticks(captured(host, f"stat{suffix}")),
        memory=None,
        vm=parse_vmstat(captured(host, f"vmstat{suffix}"), PAGE_BYTES),
        disks=parse_diskstats(captured(host, f"diskstats{suffix}"), DISKS),
        networks=parse_net_dev(captured(host, f"net_dev{suffix}")),
    )


def test_diskstats() -> None:
    """Sectors are of 512 bytes; only the devices that were asked for."""
    disks = parse_diskstats(captured(DEBIAN, "diskstats"), ["vda", "sdz"])
    assert disks == {
        "vda": DiskCounters(
            reads=1469829,
            read_bytes=1927886146 * 512,
            read_ms=5517982,
            writes=801824,
            written_bytes=1166063344 * 512,
            write_ms=3601015,
            in_flight=0,
            busy_ms=906184,
            queue_ms=10191044,
        )
    }


@pytest.mark.parametrize("fields", [14, 18, 20])
def test_diskstats_of_kernels_old_and_new(fields: int) -> None:
    """Linux 4.18 added discards, 5.5 flushes; the fields before them have stayed."""
    line = " ".join(captured(AMAZON, "diskstats").splitlines()[3].split()[:fields])
    disk = parse_diskstats(line, ["nvme1n1"])["nvme1n1"]
    assert (disk.reads, disk.read_bytes, disk.writes, disk.written_bytes) == (310, 10485760, 41, 2097152)
    assert (disk.busy_ms, disk.queue_ms) == (80, 51)


def test_diskstats_that_are_cut() -> None:
    """Linux 2.6 had partitions with four fields; a line that is too short has no counters."""
    assert parse_diskstats("   8       1 sda1 35486 38030 38030 38030\n\n", ["sda1"]) == {}


@pytest.mark.parametrize(
    ("host", "ticks"),
    [
        (DEBIAN, CpuTicks(user=629592 + 2985, system=93977 + 3917, iowait=61144, steal=1225, idle=232819)),
        (SLES, CpuTicks(user=106000, system=35000, iowait=12000, steal=0, idle=9600000)),
    ],
)
def test_cpu_ticks(host: str, ticks: CpuTicks) -> None:
    """Niced programs count as user, interrupts as system; the guests' time is in user already."""
    assert parse_cpu_ticks(captured(host, "stat")) == ticks


@pytest.mark.parametrize("text", ["", "cpu0 1 2 3 4 5 6 7 8 9 10\n", "cpu  1 2 3 4\n"])
def test_cpu_ticks_that_are_none(text: str) -> None:
    """Without the line of all processors, or with the fields of an ancient kernel, there is nothing to tell."""
    assert parse_cpu_ticks(text) is None


def test_vmstat() -> None:
    """The counts pgpgin and pgpgout are of KiB, the others of pages; what a kernel does not have is None."""
    nothing = VmCounters(**dict.fromkeys(VmCounters.__dataclass_fields__))
    assert parse_vmstat("", PAGE_BYTES) == nothing
    assert parse_vmstat(captured(DEBIAN, "vmstat"), PAGE_BYTES) == VmCounters(
        page_in_bytes=964870092 * 1024,
        page_out_bytes=583873792 * 1024,
        swap_in_bytes=0,
        swap_out_bytes=0,
        file_pages_bytes=696349 * 4096,
        dirty_bytes=752 * 4096,
        writeback_bytes=0,
    )
    large_pages = parse_vmstat("pgpgin 3\npswpin 5\n", 65536)
    assert (large_pages.page_in_bytes, large_pages.swap_in_bytes, large_pages.dirty_bytes) == (3072, 327680, None)


def test_net_dev() -> None:
    """No loopback; errors and drops of both directions; a name that touches its first number, as old kernels print."""
    networks = parse_net_dev(captured(SLES, "net_dev"))
    assert sorted(networks) == ["bond0", "eth0", "ib0"]
    assert networks["eth0"] == NetCounters(
        received_bytes=98127364512,
        received_packets=81234567,
        sent_bytes=7712345678,
        sent_packets=61234567,
        errors=3,
        drops=40,
    )
    assert networks["ib0"].drops == 8


def test_rates_of_disks() -> None:
    """Two seconds: 5,000 reads of 1,024,000 sectors in 2,500 ms; busy for 1,500 ms; the time of writes has wrapped."""
    disks = host_rates(reading(SLES), reading(SLES, "-later"), 2.0).disks
    assert disks is not None
    assert disks["nvme0n1"] == DiskRates(
        reads_per_s=2500.0,
        read_bytes_per_s=262_144_000.0,
        read_mean_ms=0.5,
        writes_per_s=50.0,
        written_bytes_per_s=3_276_800.0,
        write_mean_ms=None,
        busy_share=0.75,
        queue_mean=1.6,
        in_flight=0,
    )
    assert disks["sda"] == DiskRates(
        reads_per_s=0.0,
        read_bytes_per_s=0.0,
        read_mean_ms=None,
        writes_per_s=3.0,
        written_bytes_per_s=24_576.0,
        write_mean_ms=2.0,
        busy_share=0.006,
        queue_mean=0.006,
        in_flight=2,
    )


def test_disks_that_go_and_come_have_no_rates() -> None:
    """Neither negative nor 0: the disk that is gone and the one that is new are named, without numbers."""
    disks = host_rates(reading(SLES), reading(SLES, "-later"), 2.0).disks
    assert disks is not None
    assert sorted(disks) == ["md127", "nvme0n1", "nvme1n1", "nvme2n1", "sda", "sda3"]
    assert (disks["nvme1n1"], disks["nvme2n1"]) == (None, None)


def test_a_disk_that_came_back_has_no_negative_rates() -> None:
    """The counters of a device that was plugged in again begin at 0."""
    before = parse_diskstats(captured(SLES, "diskstats"), ["nvme0n1"])["nvme0n1"]
    after = DiskCounters(**dict.fromkeys(DiskCounters.__dataclass_fields__, 5))
    rates = disk_rates(before, after, 1.0)
    assert {value for name, value in rates if name != "in_flight"} == {None}


def test_a_busy_disk_is_not_busier_than_all_the_time() -> None:
    """The kernel counts whole ticks: 2,000 ms of 1.99 s are all of it."""
    disks = host_rates(reading(SLES), reading(SLES, "-later"), 1.99).disks
    assert disks is not None
    assert disks["md127"] is not None
    assert disks["md127"].busy_share == 1.0


@pytest.mark.parametrize(
    ("host", "shares"),
    [
        # Of 800 ticks: user 120 + 20, system 70 + 2 + 18, iowait 200, steal 20, idle 350.
        (SLES, (0.175, 0.1125, 0.25, 0.025, 0.4375)),
        # Of 406 ticks: user 348, system 55, iowait 0, steal 1, idle 2.
        (DEBIAN, (0.8571, 0.1355, 0.0, 0.0025, 0.0049)),
    ],
)
def test_shares_of_the_processors(host: str, shares: tuple[float, ...]) -> None:
    """Differences of ticks over the sum of the differences."""
    cpu = host_rates(reading(host), reading(host, "-later"), 2.0).cpu
    names = ("user_share", "system_share", "iowait_share", "steal_share", "idle_share")
    assert cpu == CpuShares(**dict(zip(names, shares, strict=True)))


def test_shares_of_no_time_and_of_counts_that_went_back() -> None:
    """Between two ticks, and where iowait shrinks, as proc(5) warns, there are no shares."""
    ticks = CpuTicks(user=10, system=10, iowait=10, steal=0, idle=10)
    assert cpu_shares(ticks, ticks) is None
    assert cpu_shares(ticks, CpuTicks(user=20, system=20, iowait=9, steal=0, idle=20)) is None


def test_rates_of_memory_traffic() -> None:
    """512,000 KiB in, 6,400 KiB out and ten pages from swap in two seconds; what went back is None, gauges stay."""
    before, after = reading(SLES).vm, reading(SLES, "-later").vm
    assert before is not None
    assert after is not None
    assert vm_rates(before, after, 2.0) == VmRates(
        page_in_bytes_per_s=262_144_000.0,
        page_out_bytes_per_s=3_276_800.0,
        swap_in_bytes_per_s=20_480.0,
        swap_out_bytes_per_s=None,
        file_pages_bytes=90_530_000 * 4096,
        dirty_bytes=3000 * 4096,
        writeback_bytes=0,
    )


def test_rates_of_networks() -> None:
    """Ten megabytes in, four kilobytes out in two seconds; the bytes of bond0 wrapped at 32 bits."""
    networks = host_rates(reading(SLES), reading(SLES, "-later"), 2.0).networks
    assert networks is not None
    assert networks["eth0"] == NetRates(
        received_bytes_per_s=5_000_000.0,
        received_packets_per_s=5_000.0,
        sent_bytes_per_s=2_000.0,
        sent_packets_per_s=10.0,
        errors_per_s=0.5,
        drops_per_s=3.0,
    )
    assert networks["bond0"] is not None
    assert (networks["bond0"].received_bytes_per_s, networks["bond0"].received_packets_per_s) == (None, 1.0)


def test_one_reading_of_all(tmp_path: Path) -> None:
    """The five files below a root, each by its parser."""
    counters = read_counters(["sda"], proc(tmp_path, SLES))
    assert counters.cpu == parse_cpu_ticks(captured(SLES, "stat"))
    assert counters.disks == parse_diskstats(captured(SLES, "diskstats"), ["sda"])
    assert counters.networks == parse_net_dev(captured(SLES, "net_dev"))
    assert missing_counter_files(tmp_path) == []
    rates = host_rates(counters, read_counters(["sda"], proc(tmp_path, SLES, "-later")), 2.0)
    assert rates.memory == HostMemory(
        available_bytes=381220408 * 1024, cached_bytes=362118232 * 1024, dirty_bytes=8412 * 1024
    )
    assert rates.cpu is not None


def test_a_file_that_no_kernel_writes_is_no_error(tmp_path: Path) -> None:
    """Words where numbers should be: the part is None, the others stay."""
    root = proc(tmp_path, SLES)
    (root / "proc/diskstats").write_text("8 0 sda " + "many " * 17)
    (root / "proc/vmstat").write_text("pgpgin few\n")
    counters = read_counters(["sda"], root)
    assert (counters.disks, counters.vm) == (None, None)
    assert counters.cpu is not None
    assert counters.networks is not None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("proc/stat", "cpu"),
        ("proc/meminfo", "memory"),
        ("proc/vmstat", "vm"),
        ("proc/diskstats", "disks"),
        ("proc/net/dev", "networks"),
    ],
)
def test_a_file_that_is_missing_takes_its_part_along(tmp_path: Path, name: str, part: str) -> None:
    """In a container that hides one file the other parts are there still."""
    root = proc(tmp_path, SLES)
    (root / name).unlink()
    counters = read_counters(["sda"], root)
    rates = host_rates(counters, read_counters(["sda"], proc(tmp_path, SLES, "-later")), 2.0)
    parts = ("cpu", "memory", "vm", "disks", "networks")
    assert [one for one in parts if getattr(counters, one) is None] == [part]
    # Memory is of the moment, so that the later reading has it again.
    assert [one for one in parts if getattr(rates, one) is None] == [one for one in [part] if one != "memory"]
    (root / name).unlink()
    assert missing_counter_files(root) == [f"/{name}"]
