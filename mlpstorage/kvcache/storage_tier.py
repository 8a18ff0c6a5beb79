"""The storage tier: which blocks lie on storage or are on their way there, and what is done to keep it so."""

import asyncio
import math
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from mlpstorage.config import Eviction, StorePolicy, WriteSync
from mlpstorage.kvcache.block_io import Behind, Submitted
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.index import Findable, LruSet, in_touch_order
from mlpstorage.storage.ops import Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import VerifyError

USED_BEFORE_BLOCKS = 1 << 20
"""Most ids of blocks that are remembered as used and not on storage (`second-use`), about 130 MB of them; the least
recently used are forgotten first, and their next use counts as the first."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Blocks that the tier has taken and that must be written, once the deletes in `waits` have ended."""

    block_ids: list[int]
    waits: set[asyncio.Task[None]]


class StorageTier:
    """Blocks on storage, least recently used first, and the reads, writes and deletes of their objects.

    Args:
        config: Capacity and policies.
        behind: The I/O.

    Attributes:
        stored: Blocks whose objects are all written (and synced, where batches are): those that a look-up finds.
        most_blocks: Most blocks that it ever holds.
    """

    def __init__(self, config: EngineConfig, behind: Behind) -> None:
        self._config = config
        self._behind = behind
        self._lru = LruSet()
        self._unready: set[int] = set()
        self._damaged: set[int] = set()
        self._deleting: dict[int, asyncio.Task[None]] = {}
        self.stored = Findable(self._lru.ids, self._unready)
        self._remembers_uses = config.store_policy is StorePolicy.SECOND_USE
        self._used_before = LruSet(USED_BEFORE_BLOCKS)
        evicts = config.eviction is Eviction.LRU
        self.most_blocks = _part(config.evict_above, config.storage_blocks) if evicts else config.storage_blocks
        self._evict_to_blocks = min(_part(config.evict_to, config.storage_blocks), self.most_blocks)

    def __contains__(self, block_id: object) -> bool:
        """Whether a block is on storage or on its way there."""
        return block_id in self._lru

    def objects(self) -> list[int]:
        """Ids of all objects of the blocks on storage."""
        return list(self._config.objects(list(self.stored)))

    def lacking(self, block_ids: Iterable[int]) -> list[int]:
        """Those that are neither on storage nor on their way there, in their order."""
        known = self._lru.ids
        return [block_id for block_id in block_ids if block_id not in known]

    def touch(self, block_ids: Iterable[int]) -> None:
        """Make blocks recent, in this order."""
        for block_id in block_ids:
            self._lru.touch(block_id)

    def kept(self, block_ids: Sequence[int]) -> set[int]:
        """The part of a chain that the tier could hold whole, were it empty: the rest would push out its own chain."""
        if self._config.eviction is Eviction.NONE:
            return set(block_ids[: self.most_blocks])
        recent = list(in_touch_order(block_ids, self._config.touch))
        return set(recent[-self.most_blocks :]) if self.most_blocks else set()

    def used_before(self, block_id: int) -> bool:
        """Whether this is not the first use of a block that is not on storage; from now on it is not."""
        known = self._used_before.touch(block_id)
        if not known:
            self._used_before.insert(block_id)
        return known

    def adopt(self, block_ids: Sequence[int]) -> None:
        """Take over blocks that are on storage already, the least recent first; begin to delete those too many."""
        excess = max(len(block_ids) - self.most_blocks, 0)
        for block_id in block_ids[excess:]:
            self._lru.insert(block_id)
        if excess:
            self._delete(block_ids[:excess])

    def begin_read(self, block_ids: Sequence[int]) -> Submitted:
        """Read blocks of a hit, which stay until the last of their reads has ended, whoever waits for that."""
        for block_id in block_ids:
            self._lru.pin(block_id)
        reads = [Op(OpKind.READ, object_id) for object_id in self._config.objects(block_ids)]
        length = self._config.load_batch or len(reads)
        chains = [reads[begin : begin + length] for begin in range(0, len(reads), length)]
        batch = self._behind.blocks.begin(chains, Lane.LOAD)
        batch.finished.add_done_callback(partial(self._read_ended, block_ids))
        return batch

    def _read_ended(self, block_ids: Sequence[int], finished: asyncio.Future[list[OpDone]]) -> None:
        done = [] if finished.cancelled() else finished.result()
        failed = [one for one in done if one.error is not None]
        wrong = {one.op.object_id // self._config.kv_ranks for one in failed if isinstance(one.error, VerifyError)}
        self._unready |= wrong
        self._damaged |= wrong
        unread = []
        for block_id in block_ids:
            # Others may still read what was found to be wrong: it is deleted after the last of them.
            if self._lru.unpin(block_id) and block_id in self._damaged:
                self._damaged.remove(block_id)
                self._forget(block_id)
                unread.append(block_id)
        if unread:
            self._delete(unread)
        self._behind.report(failed)

    def take(self, block_ids: Sequence[int], own: Container[int]) -> Taken:
        """Make room for blocks and take the first of them, as many as fit; they can be found once they are written.

        None of `own`, the chain that they belong to, makes room for them. Where it must evict it goes on to where
        the policy says, in one batch of deletes.
        """
        config = self._config
        evicted: list[int] = []
        excess = len(self._lru) + len(block_ids) - self.most_blocks
        if excess > 0 and config.eviction is Eviction.LRU:
            evicted = self._lru.evict(excess + self.most_blocks - self._evict_to_blocks, own)
            if evicted:
                self._delete(evicted)
        taken = list(block_ids[: max(self.most_blocks - len(self._lru), 0)])
        for block_id in in_touch_order(taken, config.touch):
            self._lru.insert(block_id)
            self._lru.pin(block_id)
            self._unready.add(block_id)
        if self._remembers_uses:
            for block_id in taken:
                self._used_before.discard(block_id)
        waits = {self._deleting[block_id] for block_id in taken if block_id in self._deleting}
        # What is being deleted takes room until it is gone. Its own victims are room enough for as many blocks;
        # otherwise it is the room of others, of which it is not known how much is spoken for.
        if taken and len(self._lru) + len(self._deleting) > config.storage_blocks:
            enough = len(evicted) >= len(taken)
            waits.update([self._deleting[evicted[0]]] if enough else self._deleting.values())
        return Taken(taken, waits)

    async def write(self, block_ids: Sequence[int]) -> dict[int, int]:
        """Write blocks that were taken; returns when each that succeeded was complete, in nanoseconds."""
        finished = await self._store_objects(OpKind.WRITE, block_ids)
        ended_ns = self._complete(block_ids, finished)
        synced: list[OpDone] = []
        if self._config.write_sync is WriteSync.BATCH:
            synced = await self._store_objects(OpKind.SYNC, ended_ns)
            ended_ns = self._complete(ended_ns, synced)
        failed = [block_id for block_id in block_ids if block_id not in ended_ns]
        for block_id in block_ids:
            self._lru.unpin(block_id)
        self._unready.difference_update(ended_ns)
        self._remove(failed, finished)
        self._behind.report([*finished, *synced])
        return ended_ns

    async def _store_objects(self, kind: OpKind, block_ids: Collection[int]) -> list[OpDone]:
        return await self._behind.run([(Op(kind, one),) for one in self._config.objects(block_ids)])

    def _complete(self, block_ids: Iterable[int], finished: Sequence[OpDone]) -> dict[int, int]:
        """The blocks of which every object succeeded, and when the last did."""
        ended_ns = {done.op.object_id: done.end_ns for done in finished if done.error is None}
        if self._config.kv_ranks == 1:
            return ended_ns
        complete: dict[int, int] = {}
        for block_id in block_ids:
            parts_ns = [ended_ns.get(one) for one in self._config.objects((block_id,))]
            known_ns = [part_ns for part_ns in parts_ns if part_ns is not None]
            if len(known_ns) == len(parts_ns):
                complete[block_id] = max(known_ns)
        return complete

    def _remove(self, block_ids: Sequence[int], finished: Sequence[OpDone]) -> None:
        """Forget blocks that were not written whole, and delete those of their objects that were."""
        if not block_ids:
            return
        for block_id in block_ids:
            self._forget(block_id)
        written = {done.op.object_id for done in finished if done.error is None}
        parts = [one for one in self._config.objects(block_ids) if one in written]
        if parts:
            self._begin_delete(block_ids, parts)

    def _forget(self, block_id: int) -> None:
        self._lru.discard(block_id)
        self._unready.discard(block_id)

    def _delete(self, block_ids: Sequence[int]) -> asyncio.Task[None]:
        """Begin to delete blocks from storage, as one batch."""
        if self._remembers_uses:
            for block_id in block_ids:
                self._used_before.insert(block_id)
        return self._begin_delete(block_ids, self._config.objects(block_ids))

    def _begin_delete(self, block_ids: Sequence[int], object_ids: Collection[int]) -> asyncio.Task[None]:
        task = self._behind.spawn(self._delete_objects(block_ids, object_ids))
        for block_id in block_ids:
            self._deleting[block_id] = task
        return task

    async def _delete_objects(self, block_ids: Sequence[int], object_ids: Collection[int]) -> None:
        finished = await self._behind.run([(Op(OpKind.DELETE, one),) for one in object_ids])
        for block_id in block_ids:
            self._deleting.pop(block_id, None)
        self._behind.report(finished)


def _part(part: float, blocks: int) -> int:
    """Whole blocks of a part of the tier, at least one where there is a tier; 0.29 of 100 are 29, as floats are not."""
    return max(math.floor(round(part * blocks, 6)), min(blocks, 1))
