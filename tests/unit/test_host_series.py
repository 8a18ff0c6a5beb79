"""The time series of a host: when its lines are taken, what they hold, and what they cost."""

import asyncio
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mlpstorage.cluster.counters import HostCounters, parse_diskstats
from mlpstorage.kvcache.host_rates import host_rates
from mlpstorage.kvcache.host_series import (
    HostReader,
    HostReading,
    HostSampler,
    HostWatch,
    counter_warnings,
    watch_host,
)
from mlpstorage.kvcache.sampler import next_line_ns
from mlpstorage.measure.clock import NS, MonotonicClock
from mlpstorage.results.models import HostSample, Phase
from mlpstorage.testing.virtual import VirtualClock, run_virtual

NOTHING = HostCounters(cpu=None, memory=None, vm=None, disks=None, networks=None)


def disk(sectors: int) -> HostCounters:
    """A host whose one disk has read so many sectors."""
    line = f"8 0 sda {sectors} 0 {sectors} 0 0 0 0 0 0 0 0"
    return replace(NOTHING, disks=parse_diskstats(line, ["sda"]))


def phase_of(now_ns: int) -> Phase:
    """A warm-up of two seconds and a window of three."""
    if now_ns < 2 * NS:
        return "warmup"
    return "window" if now_ns < 5 * NS else "drain"


class Readings:
    """Readings on virtual time: a disk that has read as many sectors as milliseconds have passed; some are slow."""

    def __init__(self, slow_s: Sequence[float] = ()) -> None:
        self._slow_s = list(slow_s)
        self._reader = HostReader(self._read, ["sda"], VirtualClock())
        self.lines: list[HostSample] = []

    def _read(self, names: Collection[str]) -> HostCounters:
        assert set(names) == {"sda"}
        return disk(VirtualClock().now_ns() // 1_000_000)

    async def take(self) -> HostReading | None:
        """One reading, after the delay that is next."""
        if self._slow_s:
            await asyncio.sleep(self._slow_s.pop(0))
        return self._reader.take()

    def sampler(self, interval_s: float) -> HostSampler:
        """A sampler that begins at time 0."""
        watch = HostWatch(take=self.take, on_sample=self.lines.append)
        return HostSampler(watch, clock=VirtualClock(), begin_ns=0, interval_ns=round(interval_s * NS), phase=phase_of)


async def sampled(sampler: HostSampler, for_s: float) -> tuple[HostSample, ...]:
    """The lines of so many seconds."""
    running = asyncio.create_task(sampler.run())
    await asyncio.sleep(for_s)
    running.cancel()
    return await sampler.finish()


def test_a_reading_that_the_end_meets_is_kept() -> None:
    """The run ends at 3.1 s, in the midst of the reading that was due at 3 s: no time is without a line."""
    readings = Readings(slow_s=[0.0, 0.0, 0.0, 0.2])
    samples = run_virtual(sampled(readings.sampler(1.0), 3.1), limit_s=100)
    assert [line.t_s for line in samples] == [1.0, 2.0, 3.2]
    assert sum(line.interval_s for line in samples) == pytest.approx(3.2)


@pytest.mark.parametrize(("interval_s", "for_s", "lines"), [(1.0, 6.5, 7), (0.1, 1.05, 11), (2.5, 5.0, 2), (60, 3, 1)])
def test_lines_are_an_interval_apart(interval_s: float, for_s: float, lines: int) -> None:
    """And one more reaches to the end, so that what lies after the last whole interval is not lost."""
    readings = Readings()
    samples = run_virtual(sampled(readings.sampler(interval_s), for_s), limit_s=100)
    assert len(samples) == lines
    assert list(samples) == readings.lines
    assert samples[-1].t_s == pytest.approx(for_s)
    assert sum(line.interval_s for line in samples) == pytest.approx(for_s)
    read_bytes = sum(
        line.disks["sda"].read_bytes_per_s * line.interval_s
        for line in samples
        if line.disks is not None and line.disks["sda"] is not None and line.disks["sda"].read_bytes_per_s is not None
    )
    assert read_bytes == pytest.approx(1000 * for_s * 512, rel=1e-6)


def test_lines_have_their_phase() -> None:
    """That of the moment at which each was taken."""
    samples = run_virtual(sampled(Readings().sampler(1.0), 6.5), limit_s=100)
    assert [line.phase for line in samples] == ["warmup", "window", "window", "window", "drain", "drain", "drain"]


def test_a_slow_kernel_makes_one_longer_line() -> None:
    """The second reading takes 2.25 s: its line ends at 3.25 s, the next at 4 s, in step again."""
    samples = run_virtual(sampled(Readings(slow_s=(0.0, 2.25)).sampler(1.0), 5.5), limit_s=100)
    assert [(line.t_s, line.interval_s) for line in samples] == [
        (3.25, 3.25),
        (4.0, 0.75),
        (5.0, 1.0),
        (5.5, 0.5),
    ]


def test_a_kernel_that_hangs_does_not_hold_the_end() -> None:
    """The last line is given up after a second, what there is stays."""
    readings = Readings(slow_s=(0.0, 0.0, 0.0, 1e6, 1e6))
    samples = run_virtual(sampled(readings.sampler(1.0), 5.5), limit_s=100)
    assert [line.t_s for line in samples] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("now_ns", "due_ns"), [(0, 110), (99, 110), (101, 110), (110, 110), (111, 120), (125, 130), (1000, 1000)]
)
def test_next_line(now_ns: int, due_ns: int) -> None:
    """A whole number of intervals after the last due moment, 100, and not in the past."""
    assert next_line_ns(100, now_ns, 10) == due_ns


def test_counters_of_this_host() -> None:
    """Real readings in a thread: every part is there, and the processor time that they took is counted."""

    async def lines() -> tuple[HostSampler, tuple[HostSample, ...]]:
        clock = MonotonicClock()
        shown: list[HostSample] = []
        enough = asyncio.Event()

        def show(sample: HostSample) -> None:
            shown.append(sample)
            if len(shown) == 2:
                enough.set()

        watch = watch_host(Path(__file__), clock, on_sample=show)
        sampler = HostSampler(
            watch, clock=clock, begin_ns=clock.now_ns(), interval_ns=NS // 10, phase=lambda _: "window"
        )
        running = asyncio.create_task(sampler.run())
        await enough.wait()
        running.cancel()
        samples = await sampler.finish()
        assert samples == tuple(shown)
        return sampler, samples

    begin_s = time.process_time()
    sampler, samples = asyncio.run(lines())
    used_s = time.process_time() - begin_s
    first = samples[0]
    assert first.host == os.uname().nodename
    assert first.memory is not None
    assert first.memory.available_bytes is not None
    assert first.vm is not None
    assert first.networks is not None
    assert "lo" not in first.networks
    assert first.cpu is not None
    assert sum(share for _, share in first.cpu) == pytest.approx(1, abs=0.001)
    assert 0 < sampler.cpu_s < used_s


def test_warning_of_missing_files(tmp_path: Path) -> None:
    """One line for all of them; none where nothing is missing."""
    (tmp_path / "proc/net").mkdir(parents=True)
    for name in ("stat", "vmstat", "net/dev"):
        (tmp_path / "proc" / name).write_text("")
    (warning,) = counter_warnings(tmp_path)
    assert "/proc/meminfo, /proc/diskstats cannot be read" in warning
    assert os.uname().nodename in warning
    (tmp_path / "proc/meminfo").write_text("")
    (tmp_path / "proc/diskstats").write_text("")
    assert counter_warnings(tmp_path) == []


def test_a_host_that_tells_nothing_has_empty_lines() -> None:
    """Each part is None, not 0."""
    rates = host_rates(NOTHING, NOTHING, 1.0)
    assert (rates.cpu, rates.memory, rates.vm, rates.disks, rates.networks) == (None,) * 5
