"""The time series of a rank: one line each interval."""

import time
from collections.abc import Callable

from mlpstorage.config import GIB
from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.measure.clock import NS, Clock
from mlpstorage.results.models import Phase, Sample


class Sampler:
    """Takes a line of the time series each interval.

    Args:
        rank: Number of this rank.
        engine: What is watched.
        recorder: Likewise.
        clock: The rank's clock.
        begin_ns: When the warm-up began.
        interval_ns: Distance of two lines.
        block_bytes: Bytes that a block takes in DRAM and on storage, padding included.
        on_sample: Called with every line.
    """

    def __init__(
        self,
        *,
        rank: int,
        engine: Engine,
        recorder: Recorder,
        clock: Clock,
        begin_ns: int,
        interval_ns: int,
        block_bytes: int,
        on_sample: Callable[[Sample], None],
    ) -> None:
        self._rank = rank
        self._engine = engine
        self._recorder = recorder
        self._clock = clock
        self._begin_ns = begin_ns
        self._interval_ns = interval_ns
        self._block_bytes = block_bytes
        self._on_sample = on_sample
        self.samples: list[Sample] = []
        self._last = (begin_ns, 0, 0)
        self.cpu_s = 0.0
        """Processor time that the lines of the window took."""

    async def run(self) -> None:
        """Take lines until cancelled."""
        due_ns = self._begin_ns
        while True:
            due_ns = next_line_ns(due_ns, self._clock.now_ns(), self._interval_ns)
            await self._clock.sleep_until(due_ns)
            start_s = time.thread_time()
            sample = self._take(self._clock.now_ns())
            self.samples.append(sample)
            self._on_sample(sample)
            if sample.phase == "window":
                self.cpu_s += time.thread_time() - start_s

    def _take(self, now_ns: int) -> Sample:
        total, requests = self._recorder.total, self._recorder.total_requests
        last_ns, last_read_bytes, last_written_bytes = self._last
        since_s = (now_ns - last_ns) / NS
        self._last = (now_ns, total.read_bytes, total.written_bytes)
        found = requests.cached_tokens
        return Sample(
            rank=self._rank,
            t_s=round((now_ns - self._begin_ns) / NS, 3),
            phase=self.phase(now_ns),
            requests_completed=requests.completed,
            requests_in_flight=self._engine.in_flight,
            prompt_tokens=requests.prompt_tokens,
            cached_tokens=found.gpu + found.cpu + found.storage,
            read_bytes=total.read_bytes,
            written_bytes=total.written_bytes,
            deleted_bytes=total.deleted_bytes,
            read_gib_per_s=round((total.read_bytes - last_read_bytes) / GIB / since_s, 6),
            write_gib_per_s=round((total.written_bytes - last_written_bytes) / GIB / since_s, 6),
            storage_used_bytes=self._engine.stored_blocks * self._block_bytes,
            cpu_used_bytes=self._engine.cpu_blocks * self._block_bytes,
            write_queue_blocks=self._engine.write_queue_blocks,
        )

    def phase(self, now_ns: int) -> Phase:
        """The phase that a moment up to now belongs to."""
        start_ns = self._recorder.start_ns
        if start_ns is None or now_ns < start_ns:
            return "warmup"
        return "window" if self._recorder.inside(now_ns) else "drain"


def next_line_ns(due_ns: int, now_ns: int, interval_ns: int) -> int:
    """When the next line is due, after one that was due at `due_ns`: a whole number of intervals later, not yet past.

    Lines that a busy client was too late for are left out: to take them one right after the other would give rates over
    next to no time.
    """
    return due_ns + interval_ns * max(1, -((due_ns - now_ns) // interval_ns))
