"""The measured window: when it begins and is over, and what the page cache forgets before."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.steadiness import Steadiness
from mlpstorage.kvcache.together import Meet
from mlpstorage.measure.clock import Clock
from mlpstorage.measure.process import ProcessorMeter

DropPageCache = Callable[[Sequence[int]], Awaitable[int | None]]
"""Has the system forget cached pages of objects; see `storage.base.BlockStore.drop_page_cache`."""


class PageCache:
    """Has the page cache forget the objects on storage, and adds up what it dropped."""

    def __init__(self, drop: DropPageCache, engine: Engine) -> None:
        self._drop = drop
        self._engine = engine
        self._dropped: list[int | None] = []

    async def drop(self) -> None:
        """Drop what is there now; return when that is done."""
        self._dropped.append(await self._drop(self._engine.stored_objects()))

    @property
    def dropped_bytes(self) -> int | None:
        """Bytes dropped; None where that is unknown, or nothing was dropped yet."""
        known = [dropped for dropped in self._dropped if dropped is not None]
        return sum(known) if known and len(known) == len(self._dropped) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The measured window.

    Attributes:
        warmup_ns: Length of the warm-up; the most, where it ends with a steady hit ratio.
        duration_ns: Length of the window.
        clock: The rank's clock.
        recorder: Told when the window is.
        meter: Started with it.
        cache: What to drop before; None where nothing is cached.
        steady: What ends the warm-up; None where its length does.
        meet: Agrees with other ranks on the moment.
    """

    warmup_ns: int
    duration_ns: int
    clock: Clock
    recorder: Recorder
    meter: ProcessorMeter
    cache: PageCache | None
    steady: Steadiness | None
    meet: Meet

    async def over(self, begin_ns: int, *, known: bool) -> None:
        """Return when it is over. It begins when the warm-up is over and what is cached is dropped, on all ranks."""
        start_ns = begin_ns + self.warmup_ns
        if self.steady is not None:
            await self.steady.reached(self.recorder, self.clock, begin_ns, start_ns, self.meet)
        elif not known:
            await self.clock.sleep_until(start_ns)
        if not known:
            if self.cache is not None:
                await self.cache.drop()
            start_ns = max((await self.meet(True)).moment_ns, self.clock.now_ns())
            self.recorder.open((start_ns, start_ns + self.duration_ns))
        await self.clock.sleep_until(start_ns)
        self.meter.start()
        await self.clock.sleep_until(start_ns + self.duration_ns)
