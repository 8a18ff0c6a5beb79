"""Asking a store which blocks are there, in threads of its own: a question waits behind no read or write."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress

from mlpstorage.kvcache.other_ranks import Answer
from mlpstorage.storage.base import BlockStore

FIRST_BLOCKS = 4
"""Blocks of a chain that are looked for at once, to begin with; then twice as many, and so on.

So a chain of which nothing is there costs four look-ups, and one of which n blocks are there at most 2 n + 4.
"""

THREADS = 4
"""Questions that are asked at once."""


class ExistenceThreads:
    """Asks a store; an `other_ranks.Existence`.

    Args:
        store: An open store.
        kv_ranks: Objects of a block: it is there when all of them are.
    """

    def __init__(self, store: BlockStore, kv_ranks: int) -> None:
        self._store = store
        self._kv_ranks = kv_ranks
        self._questions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            # A storage that never answers must not keep a failed process alive.
            threading.Thread(target=self._work, name=f"existence-{number}", daemon=True)
            for number in range(THREADS)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let the threads end once they have answered; nobody waits for that. Calling it again does nothing."""
        for _ in self._threads:
            self._questions.put(None)

    async def leading(self, block_ids: Sequence[int]) -> Answer:
        """See `Existence.leading`."""
        return await self._ask(partial(self._leading, block_ids))

    async def each(self, block_ids: Sequence[int]) -> Answer:
        """See `Existence.each`."""
        return await self._ask(partial(self._each, block_ids))

    async def _ask(self, look: Callable[[], Answer]) -> Answer:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Answer] = loop.create_future()

        def tell(outcome: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(lambda: None if answered.done() else outcome())

        def answer() -> None:
            try:
                found = look()
            except Exception as error:  # noqa: BLE001 - handed to whoever waits; the thread lives on
                tell(partial(answered.set_exception, error))
            else:
                tell(partial(answered.set_result, found))

        self._questions.put(answer)
        return await answered

    def _work(self) -> None:
        while (answer := self._questions.get()) is not None:
            answer()

    def _leading(self, block_ids: Sequence[int]) -> Answer:
        found: list[int] = []
        looked_at = 0
        length = FIRST_BLOCKS
        while looked_at < len(block_ids):
            part = self._each(block_ids[looked_at : looked_at + length])
            found += part.block_ids
            looked_at += length
            if len(found) < min(looked_at, len(block_ids)):
                break
            length *= 2
        return Answer(found, min(looked_at, len(block_ids)) * self._kv_ranks)

    def _each(self, block_ids: Sequence[int]) -> Answer:
        kv_ranks = self._kv_ranks
        objects = [block_id * kv_ranks + part for block_id in block_ids for part in range(kv_ranks)]
        there = self._store.exists(objects)
        whole = [all(there[first : first + kv_ranks]) for first in range(0, len(objects), kv_ranks)]
        return Answer(list(compress(block_ids, whole)), len(objects))
