"""Blocks that other ranks have written to the storage that all share: what is known of them, and how more is learned.

What a rank has found once it takes for granted until a read shows that it is gone: knowledge costs no I/O, and may be
out of date.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from mlpstorage.kvcache.block_io import Behind
from mlpstorage.kvcache.index import LruSet
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.measure.clock import Clock

KNOWN_BLOCKS = 1 << 20
"""Most blocks of other ranks that are remembered, about 130 MB of them; one that is forgotten is asked for again."""

WRONG_BLOCKS = 1 << 16
"""Most blocks of other ranks that are remembered for having been other data than was written."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Which of the blocks that were asked for are there, and how many objects that took looking for."""

    block_ids: list[int]
    objects: int


class Existence(Protocol):
    """Tells which blocks are on storage, whoever wrote them. What it says may be out of date when it is heard.

    Raises:
        OSError: The storage cannot tell.
    """

    async def leading(self, block_ids: Sequence[int]) -> Answer:
        """Those of a chain that are there, up to the first that is not, and perhaps some behind it."""
        ...

    async def each(self, block_ids: Sequence[int]) -> Answer:
        """Those that are there."""
        ...


class OtherRanks:
    """What a rank knows of the other ranks' blocks.

    Args:
        existence: Who is asked; None where no storage is shared, so that there never is anything to know.
        behind: Where a failure goes, and who says that the run is over.
        recorder: Where the questions are counted.
        clock: The rank's clock.

    Attributes:
        ids: The blocks that are taken to be there: a view.
    """

    def __init__(self, existence: Existence | None, *, behind: Behind, recorder: Recorder, clock: Clock) -> None:
        self._existence = existence
        self._behind = behind
        self._recorder = recorder
        self._clock = clock
        self._known = LruSet(KNOWN_BLOCKS)
        self._wrong = LruSet(WRONG_BLOCKS)
        self.ids = self._known.ids

    @property
    def shared(self) -> bool:
        """Whether there are others at all."""
        return self._existence is not None

    async def find(self, block_ids: Iterable[int]) -> None:
        """Learn of the unknown blocks of a chain, in its order, up to the first that is not there."""
        chain = takewhile(lambda block_id: block_id not in self._wrong, block_ids)
        await self._learn([block_id for block_id in chain if block_id not in self.ids], leading=True)

    async def written(self, block_ids: Collection[int]) -> set[int]:
        """Those of blocks that are about to be written which others have written."""
        asked = [block_id for block_id in block_ids if block_id not in self._wrong]
        await self._learn([block_id for block_id in asked if block_id not in self.ids], leading=False)
        return {block_id for block_id in asked if block_id in self.ids}

    def touch(self, block_ids: Iterable[int]) -> None:
        """Remember these longer than others."""
        self._known.touch_all(block_ids)

    def forget(self, block_ids: Iterable[int]) -> None:
        """These are gone, or this rank's own now."""
        if not self.shared:
            return
        for block_id in block_ids:
            self._known.discard(block_id)
            self._wrong.discard(block_id)

    def shun(self, block_ids: Iterable[int]) -> None:
        """These were other data than was written: whoever needs them computes and writes them again."""
        for block_id in block_ids:
            self._known.discard(block_id)
            self._wrong.insert(block_id)

    async def _learn(self, block_ids: Sequence[int], *, leading: bool) -> None:
        """Ask for blocks, as one batch, and remember those that are there."""
        if self._existence is None or not block_ids or self._behind.stopping:
            return
        ask = self._existence.leading if leading else self._existence.each
        begin_ns = self._clock.now_ns()
        try:
            answer = await ask(block_ids)
        except OSError as error:
            self._behind.failed(error)
            return
        self._recorder.looked_for(begin_ns, self._clock.now_ns(), answer.objects)
        for block_id in answer.block_ids:
            self._known.insert(block_id)
