"""The order of operations on the same place, where it is decided before they can begin."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from mlpstorage.kvcache.block_io import Submitted, end_of
from mlpstorage.storage.ops import OpDone

Ended = asyncio.Future[Any]
"""Done when an operation has ended, or will never begin."""


class Order:
    """What was decided for each place (a block on storage, a slot of DRAM) and has not ended.

    Whoever waits for what this gives waits for earlier decisions alone, so that nobody waits in a circle.
    """

    def __init__(self) -> None:
        self._changes: dict[int, Ended] = {}
        self._reads: dict[int, set[Ended]] = {}

    def before_read(self, places: Iterable[int]) -> set[Ended]:
        """What must end before these places can be read."""
        if not self._changes:
            return set()
        return {self._changes[place] for place in places if place in self._changes}

    def before_change(self, places: Iterable[int]) -> set[Ended]:
        """What must end before these places can be written or deleted."""
        chosen = list(places)
        waits = self.before_read(chosen)
        if self._reads:
            waits.update(*(self._reads[place] for place in chosen if place in self._reads))
        return waits

    def changing(self, place: int) -> bool:
        """Whether a change of the place was decided and has not ended."""
        return place in self._changes

    def last_change(self, place: int) -> Ended | None:
        """The change of the place that was decided last; None where all have ended."""
        return self._changes.get(place)

    def reads(self, places: Sequence[int], ended: Ended) -> None:
        """These places will be read until `ended`."""
        for place in places:
            self._reads.setdefault(place, set()).add(ended)
        ended.add_done_callback(partial(self._read, places))

    def changes(self, places: Sequence[int], ended: Ended) -> None:
        """These places will be changed until `ended`."""
        for place in places:
            self._changes[place] = ended
        ended.add_done_callback(partial(self._changed, places))

    def _read(self, places: Sequence[int], ended: Ended) -> None:
        for place in places:
            readers = self._reads.get(place, set())
            readers.discard(ended)
            if not readers:
                self._reads.pop(place, None)

    def _changed(self, places: Sequence[int], ended: Ended) -> None:
        for place in places:
            if self._changes.get(place) is ended:
                del self._changes[place]


class LaterBatch:
    """A batch of operations that begins when others have ended; see `block_io.Submitted`.

    Args:
        waits: What must end before.
        begin: Hands the batch over; None where it cannot begin any more, and then nothing of it is done.
        refused: What becomes of the operations in that case.
    """

    def __init__(
        self,
        waits: set[Ended],
        begin: Callable[[], Submitted | None],
        refused: Callable[[], list[OpDone]],
    ) -> None:
        self.finished: asyncio.Future[list[OpDone]] = asyncio.get_running_loop().create_future()
        self._begin = begin
        self._refused = refused
        self._batch: Submitted | None = None
        self._given_up = False
        self._waiting = asyncio.create_task(self._run(waits))

    def cancel(self) -> None:
        """Give up what was not begun."""
        self._given_up = True
        if self._batch is not None:
            self._batch.cancel()

    async def _run(self, waits: set[Ended]) -> None:
        await asyncio.wait(waits)
        self._batch = None if self._given_up else self._begin()
        if self._batch is None:
            self.finished.set_result(self._refused())
            return
        await end_of(self._batch.finished)
        self.finished.set_result(self._batch.finished.result())
