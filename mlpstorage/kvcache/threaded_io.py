"""The engine's I/O by an I/O engine with threads of its own: a batch of operations becomes one awaitable."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial

from mlpstorage.storage.ops import Chain, IoEngine, Lane, OpDone


class SubmittedBatch:
    """A batch of operations on its way; see `block_io.Submitted`."""

    __slots__ = ("_batch", "_io_engine", "finished")

    def __init__(self, io_engine: IoEngine, batch: object, finished: asyncio.Future[list[OpDone]]) -> None:
        self._io_engine = io_engine
        self._batch = batch
        self.finished = finished

    def cancel(self) -> None:
        """Give up the chains that were not begun; they are reported as skipped."""
        self._io_engine.cancel(self._batch)


class ThreadedIO:
    """Hands batches to an I/O engine and brings what became of them back into the event loop.

    Args:
        io_engine: What does the operations.
        on_operations: Called in the event loop with every finished batch, also where nobody waits for it any more, so
            that no I/O that was done goes uncounted.
    """

    def __init__(self, io_engine: IoEngine, on_operations: Callable[[list[OpDone]], None]) -> None:
        self._io_engine = io_engine
        self._on_operations = on_operations
        # Finished batches on their way into the loop. To wake the loop is a system call, for which a thread gives the
        # interpreter away: who finds the list empty does it for all who come before the loop has looked.
        self._arrived: list[tuple[asyncio.Future[list[OpDone]], list[OpDone]]] = []
        self._arriving = threading.Lock()
        self._outstanding = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self, chains: Sequence[Chain], lane: Lane) -> SubmittedBatch:
        """Hand over a batch of operations.

        Raises:
            RuntimeError: The I/O engine is closed.
        """
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[list[OpDone]] = loop.create_future()
        batch = self._io_engine.submit(chains, lane, partial(self._bring, loop, finished))
        # `_take_in` runs in this loop, and so not before this.
        self._outstanding += 1
        self._idle.clear()
        return SubmittedBatch(self._io_engine, batch, finished)

    def _bring(
        self, loop: asyncio.AbstractEventLoop, finished: asyncio.Future[list[OpDone]], done: list[OpDone]
    ) -> None:
        """Have the loop take in a finished batch; called in any thread."""
        with self._arriving:
            first = not self._arrived
            self._arrived.append((finished, done))
        if first:
            loop.call_soon_threadsafe(self._take_in)

    def _take_in(self) -> None:
        """Count what has arrived, and tell those who wait for it."""
        with self._arriving:
            arrived, self._arrived = self._arrived, []
        for finished, done in arrived:
            self._on_operations(done)
            self._outstanding -= 1
            if not self._outstanding:
                self._idle.set()
            if not finished.cancelled():
                finished.set_result(done)

    async def run(self, chains: Sequence[Chain], lane: Lane) -> list[OpDone]:
        """Do a batch of operations; return when all are finished."""
        return await self.begin(chains, lane).finished

    def cancel_queued(self) -> None:
        """Give up the operations that have not begun."""
        self._io_engine.cancel_queued()

    async def idle(self) -> None:
        """Return when no operation is queued or running."""
        await self._idle.wait()
