"""The engine's I/O by real threads: a batch of operations becomes one awaitable."""

import asyncio
from collections.abc import Callable, Sequence

from mlpstorage.storage.ops import Lane, Op, OpDone
from mlpstorage.storage.pool import IoPool


class ThreadedIO:
    """Hands batches to an I/O pool and brings what became of them back into the event loop.

    Args:
        pool: The threads.
        on_operations: Called in the event loop with every finished batch, also where nobody waits for it any more, so
            that no I/O that was done goes uncounted.
    """

    def __init__(self, pool: IoPool, on_operations: Callable[[list[OpDone]], None]) -> None:
        self._pool = pool
        self._on_operations = on_operations
        self._outstanding = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, chains: Sequence[Sequence[Op]], lane: Lane) -> list[OpDone]:
        """Do a batch of operations; return when all are finished."""
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[list[OpDone]] = loop.create_future()

        def arrived(done: list[OpDone]) -> None:
            self._on_operations(done)
            self._outstanding -= 1
            if not self._outstanding:
                self._idle.set()
            if not finished.cancelled():
                finished.set_result(done)

        def to_loop(done: list[OpDone]) -> None:
            loop.call_soon_threadsafe(arrived, done)

        self._outstanding += 1
        self._idle.clear()
        self._pool.submit(chains, lane, to_loop)
        return await finished

    def cancel_queued(self) -> None:
        """Give up the operations that no thread has begun."""
        self._pool.cancel_queued()

    async def idle(self) -> None:
        """Return when no operation is queued or running."""
        await self._idle.wait()
