"""The I/O of a rank as the engine sees it, and the work that it does behind requests."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from mlpstorage.storage.ops import Chain, Lane, OpDone, OperationSkippedError, is_gone
from mlpstorage.storage.payload import VerifyError


class Submitted(Protocol):
    """A batch of operations on its way."""

    @property
    def finished(self) -> asyncio.Future[list[OpDone]]:
        """What became of every operation, once all are finished.

        Wait for it without cancelling it (`end_of`): the operations go on whoever waits.
        """
        ...

    def cancel(self) -> None:
        """Give up the chains that were not begun; they are reported as skipped."""
        ...


async def end_of(work: asyncio.Future[Any]) -> None:
    """Return when it is done. It goes on where who waits is cancelled.

    This is `asyncio.wait` for one, at two thirds of its price.
    """
    if work.done():
        return
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(_: asyncio.Future[Any]) -> None:
        if not waiter.done():
            waiter.set_result(None)

    work.add_done_callback(wake)
    try:
        await waiter
    finally:
        work.remove_done_callback(wake)


class BlockIO(Protocol):
    """Batches of operations, by an I/O engine. See `storage.ops.IoEngine`."""

    def begin(self, chains: Sequence[Chain], lane: Lane) -> Submitted:
        """Hand over a batch of operations."""
        ...

    async def run(self, chains: Sequence[Chain], lane: Lane) -> list[OpDone]:
        """Do a batch of operations; return when all are finished."""
        ...


class Behind:
    """Work behind requests: tasks to settle, none of whose operations begins once it is stopped.

    Args:
        blocks: The I/O.
        on_failure: Called once for every I/O that failed, but for data that was not what was written: that is counted
            where operations are counted, and ends nothing.
        shared: Whether other ranks may delete what this one reads or deletes: that is then no failure.
    """

    def __init__(self, blocks: BlockIO, on_failure: Callable[[Exception], None], *, shared: bool = False) -> None:
        self.blocks = blocks
        self.stopping = False
        self._on_failure = on_failure
        self._shared = shared
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside everything else; `settle` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(self, chains: Sequence[Chain]) -> list[OpDone]:
        """Do operations; none, and nothing is returned, once it is stopped."""
        return [] if self.stopping or not chains else await self.blocks.run(chains, Lane.STORE)

    def report(self, finished: Sequence[OpDone]) -> None:
        """Hand on each failure."""
        for done in finished:
            if done.error is None or isinstance(done.error, OperationSkippedError | VerifyError):
                continue
            if not (self._shared and is_gone(done)):
                self._on_failure(done.error)

    def failed(self, error: Exception) -> None:
        """Hand on a failure of something that is no operation."""
        self._on_failure(error)

    async def settle(self) -> None:
        """Wait until all work has ended."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
