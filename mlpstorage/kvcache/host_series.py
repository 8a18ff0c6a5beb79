"""The time series of a host: what all programs on it do with its disks, network, processors and memory."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlpstorage.cluster.block_devices import devices_below, disk_names
from mlpstorage.cluster.counters import HostCounters, missing_counter_files, read_counters
from mlpstorage.cluster.facts import cache_block
from mlpstorage.cluster.kernel_files import ROOT
from mlpstorage.config import HOST_SERIES
from mlpstorage.kvcache.host_rates import HostRates, host_rates
from mlpstorage.kvcache.process import in_daemon
from mlpstorage.kvcache.sampler import next_line_ns
from mlpstorage.measure.clock import NS, Clock
from mlpstorage.results.models import HostSample, Phase

_LAST_READING_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReading:
    """What happened since the reading before.

    Attributes:
        at_ns: When it was taken, by the rank's clock.
        interval_s: Time since the reading before.
        rates: What happened in between.
        cpu_s: Processor time that the reading took.
    """

    at_ns: int
    interval_s: float
    rates: HostRates
    cpu_s: float


class HostReader:
    """Reads a host's counters and makes rates of two readings. It may be called from any thread.

    Args:
        read: Reads the counters of the named disks.
        disk_names: The disks that are followed.
        clock: The rank's clock.
    """

    def __init__(
        self, read: Callable[[Collection[str]], HostCounters], disk_names: Collection[str], clock: Clock
    ) -> None:
        self._read = read
        self._disk_names = frozenset(disk_names)
        self._clock = clock
        self._lock = threading.Lock()
        self._before: tuple[int, HostCounters] | None = None

    def take(self) -> HostReading | None:
        """Read once; None the first time, and where no time has passed."""
        with self._lock:
            start_s = time.thread_time()
            at_ns = self._clock.now_ns()
            counters = self._read(self._disk_names)
            before, self._before = self._before, (at_ns, counters)
            if before is None or at_ns <= before[0]:
                return None
            interval_s = (at_ns - before[0]) / NS
            rates = host_rates(before[1], counters, interval_s)
            return HostReading(at_ns=at_ns, interval_s=interval_s, rates=rates, cpu_s=time.thread_time() - start_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostWatch:
    """What a rank needs to keep its host's time series.

    Attributes:
        take: Takes a reading aside, so that the event loop does not wait for the kernel: on hosts with many processors
            /proc/stat alone can take milliseconds.
        on_sample: Called with every line.
    """

    take: Callable[[], Awaitable[HostReading | None]]
    on_sample: Callable[[HostSample], None]


class HostSampler:
    """Takes a line of the host's time series each interval.

    Args:
        watch: How.
        clock: The rank's clock.
        begin_ns: When the warm-up began.
        interval_ns: Distance of two lines.
        phase: Tells the phase of a moment.
    """

    def __init__(
        self, watch: HostWatch, *, clock: Clock, begin_ns: int, interval_ns: int, phase: Callable[[int], Phase]
    ) -> None:
        self._watch = watch
        self._clock = clock
        self._begin_ns = begin_ns
        self._interval_ns = interval_ns
        self._phase = phase
        self._host = os.uname().nodename
        self._samples: list[HostSample] = []
        self._taking: asyncio.Task[None] | None = None
        self.cpu_s = 0.0
        """Processor time that the lines of the window took."""

    async def run(self) -> None:
        """Take lines until cancelled."""
        due_ns = self._begin_ns
        while True:
            # A reading that has begun goes on when this is cancelled: the next one's interval begins with it.
            self._taking = asyncio.create_task(self._line())
            await asyncio.shield(self._taking)
            due_ns = next_line_ns(due_ns, self._clock.now_ns(), self._interval_ns)
            await self._clock.sleep_until(due_ns)

    async def finish(self) -> tuple[HostSample, ...]:
        """Take a last line, so that the series reaches to the end; returns all lines."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_READING_LIMIT_S):
                if self._taking is not None and not self._taking.done():
                    await self._taking
                await self._line()
        return tuple(self._samples)

    async def _line(self) -> None:
        reading = await self._watch.take()
        if reading is None:
            return
        start_s = time.thread_time()
        rates, phase = reading.rates, self._phase(reading.at_ns)
        sample = HostSample(
            host=self._host,
            t_s=round((reading.at_ns - self._begin_ns) / NS, 3),
            interval_s=round(reading.interval_s, 6),
            phase=phase,
            cpu=rates.cpu,
            memory=rates.memory,
            vm=rates.vm,
            disks=rates.disks,
            networks=rates.networks,
        )
        self._samples.append(sample)
        self._watch.on_sample(sample)
        if phase == "window":
            self.cpu_s += reading.cpu_s + time.thread_time() - start_s


def watch_host(objects: object, clock: Clock, *, on_sample: Callable[[HostSample], None]) -> HostWatch:
    """The watch of this host: of all its disks, and of what else lies below the cache directory.

    Args:
        objects: Where the objects of the cache go; a path, where they are files.
        clock: The rank's clock.
        on_sample: Called with every line.
    """
    block = cache_block(objects) if isinstance(objects, Path) else None
    reader = HostReader(read_counters, {*disk_names(), *(() if block is None else devices_below(block))}, clock)

    def take(_: None) -> HostReading | None:
        return reader.take()

    return HostWatch(take=partial(in_daemon, take, None, "host-series"), on_sample=on_sample)


def counter_warnings(root: Path = ROOT) -> list[str]:
    """What the time series of this host will lack; `root` holds proc."""
    missing = missing_counter_files(root)
    host = os.uname().nodename
    return [f"{host}: {', '.join(missing)} cannot be read: {HOST_SERIES} lacks what it tells"] if missing else []
