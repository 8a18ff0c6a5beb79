"""The clock of a rank: that of its event loop, so that a loop on virtual time makes the whole engine virtual."""

import asyncio
import time
from typing import Protocol

NS = 1_000_000_000


class Clock(Protocol):
    """Nanoseconds that only grow, and waiting for them."""

    def now_ns(self) -> int:
        """Nanoseconds since some fixed moment."""
        ...

    async def sleep_until(self, when_ns: int) -> None:
        """Return at `when_ns`, or after one turn of the event loop where that is past."""
        ...


class MonotonicClock:
    """`time.perf_counter_ns`, the clock that the I/O threads use too."""

    def now_ns(self) -> int:
        """Nanoseconds since some fixed moment."""
        return time.perf_counter_ns()

    async def sleep_until(self, when_ns: int) -> None:
        """Return at `when_ns`, or after one turn of the event loop where that is past."""
        await asyncio.sleep(max(when_ns - time.perf_counter_ns(), 0) / NS)
