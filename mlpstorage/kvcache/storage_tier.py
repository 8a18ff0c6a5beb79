"""The storage tier: which blocks lie on storage or are on their way there, and what is done to keep it so."""

import asyncio
import math
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mlpstorage.config import Decisions, Eviction, StorePolicy, WriteSync
from mlpstorage.kvcache.block_io import Behind, Submitted
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.index import Findable, LruSet, in_touch_order
from mlpstorage.kvcache.operations import Operation, OperationsDigest
from mlpstorage.kvcache.order import Ended, LaterBatch, Order
from mlpstorage.kvcache.other_ranks import OtherRanks
from mlpstorage.storage.ops import Chain, Lane, Op, OpDone, OperationSkippedError, OpKind, is_gone
from mlpstorage.storage.payload import VerifyError

USED_BEFORE_BLOCKS = 1 << 20
"""Most ids of blocks that are remembered as used and not on storage (`second-use`), about 130 MB of them; the least
recently used are forgotten first, and their next use counts as the first."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Blocks that the tier has taken and that must be written, once what is in `waits` has ended.

    `ended` is done when they are written, or never will be, and tells the objects that are not there then; None where
    nobody waits for that.
    """

    block_ids: list[int]
    waits: set[Ended]
    ended: asyncio.Future[frozenset[int]] | None = None


class StorageTier:
    """Blocks on storage, least recently used first, and the reads, writes and deletes of their objects.

    Args:
        config: Capacity and policies.
        behind: The I/O.
        operations: What takes in the loads, stores and deletes.
        others: What is known of the blocks that other ranks have written; they are found and read, and are no part of
            what this tier holds, makes room for or deletes.

    Attributes:
        stored: The blocks that a look-up finds: those whose objects are all written (and synced, where batches are);
            where decisions are made at arrival all, since reads then wait for the writes they need.
        most_blocks: Most blocks that it ever holds.
    """

    def __init__(self, config: EngineConfig, behind: Behind, operations: OperationsDigest, others: OtherRanks) -> None:
        self._config = config
        self._others = others
        self._operations = operations
        self._behind = behind
        self._ordered = config.decisions is Decisions.ARRIVAL
        self._order = Order()
        self._lru = LruSet(pins=not self._ordered)
        self._unready: set[int] = set()
        self._damaged: set[int] = set()
        self._gone: set[int] = set()
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
        """Ids of all objects of the blocks on storage, those that are known of other ranks among them."""
        written = [block_id for block_id in self.stored if not self._order.changing(block_id)]
        return list(self._config.objects([*written, *self._others.ids]))

    def lacking(self, block_ids: Iterable[int]) -> list[int]:
        """Those that are neither on storage nor on their way there, as far as is known, in their order."""
        known, others = self._lru.ids, self._others.ids
        return [block_id for block_id in block_ids if block_id not in known and block_id not in others]

    async def find_written(self, block_ids: Sequence[int], found: Container[int]) -> None:
        """Learn which blocks of a chain other ranks have written, up to the first that nobody has.

        Args:
            block_ids: The chain behind what was found.
            found: Blocks of it that are found in another tier.
        """
        unknown = []
        for block_id in block_ids:
            if block_id in found or block_id in self.stored:
                continue
            if block_id in self._lru or block_id in self._deleting:
                break  # this rank's own, and not there yet or not any more
            unknown.append(block_id)
        await self._others.find(unknown)

    async def written_by_others(self, block_ids: Collection[int]) -> set[int]:
        """Those of blocks that this tier is to take which other ranks have written."""
        if not self._others.shared:
            return set()
        return await self._others.written([one for one in self.lacking(block_ids) if one not in self._deleting])

    def touch(self, block_ids: Iterable[int]) -> None:
        """Make blocks recent, in this order."""
        recent = list(block_ids)
        self._lru.touch_all(recent)
        if self._others.shared:
            self._others.touch(recent)

    def kept(self, block_ids: Sequence[int]) -> set[int]:
        """The part of a chain that the tier could hold whole, were it empty: the rest would push out its own chain."""
        if self._others.ids:
            block_ids = [block_id for block_id in block_ids if block_id not in self._others.ids]
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
        self._operations.add(Operation.LOAD, block_ids)
        reads = [Op(OpKind.READ, object_id) for object_id in self._config.objects(block_ids)]
        length = self._config.load_batch or len(reads)
        chains = [reads[begin : begin + length] for begin in range(0, len(reads), length)]
        waits = self._order.before_read(block_ids)
        batch: Submitted
        if waits:
            changes = self._changes(block_ids)
            batch = LaterBatch(waits, partial(self._begin_late, changes, chains), partial(_unread, reads))
        else:
            batch = self._behind.blocks.begin(chains, Lane.LOAD)
        if self._ordered:
            self._order.reads(block_ids, batch.finished)
        batch.finished.add_done_callback(partial(self._read_ended, block_ids))
        return batch

    def _begin_late(self, changes: Mapping[int, Ended], chains: Sequence[Chain]) -> Submitted | None:
        """Begin reads that had to wait for writes; None where a block was not written after all."""
        if self._behind.stopping or self._missing(changes):
            return None
        return self._behind.blocks.begin(chains, Lane.LOAD)

    def _read_ended(self, block_ids: Sequence[int], finished: asyncio.Future[list[OpDone]]) -> None:
        done = [] if finished.cancelled() else finished.result()
        failed = [one for one in done if one.error is not None]
        wrong = {one.op.object_id // self._config.kv_ranks for one in failed if isinstance(one.error, VerifyError)}
        if self._others.shared:
            wrong = self._apart_from_others(wrong, self.gone(done))
        # What is changing waits for this read: the block was evicted since, and perhaps taken again.
        wrong = {block_id for block_id in wrong if not self._order.changing(block_id)}
        self._unready |= wrong
        self._damaged |= wrong
        unread = []
        for block_id in block_ids:
            # Others may still read what was found to be wrong: it is deleted after the last of them.
            if not self._lru.unpin(block_id):
                continue
            if block_id in self._damaged:
                self._damaged.remove(block_id)
                self._forget(block_id)
                unread.append(block_id)
            elif block_id in self._gone:
                self._gone.remove(block_id)
                self._forget(block_id)
        if unread:
            self._delete(unread)
        self._behind.report(failed)

    def gone(self, done: Iterable[OpDone]) -> set[int]:
        """The blocks of which a read found an object gone, where others may delete any."""
        if not self._others.shared:
            return set()
        return {one.op.object_id // self._config.kv_ranks for one in done if is_gone(one)}

    def _apart_from_others(self, wrong: set[int], gone: set[int]) -> set[int]:
        """Forget what is gone, and what is other ranks' and wrong; returns what is this rank's own and wrong."""
        own = self._lru.ids
        self._others.forget(block_id for block_id in gone if block_id not in own)
        self._others.shun(block_id for block_id in wrong if block_id not in own)
        lost = {block_id for block_id in gone if block_id in own}
        self._gone |= lost
        self._unready |= lost
        return {block_id for block_id in wrong if block_id in own}

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
        self._others.forget(taken)
        if not self._ordered:
            self._unready.update(taken)
        self._operations.add(Operation.STORE, taken)
        if self._remembers_uses:
            for block_id in taken:
                self._used_before.discard(block_id)
        waits: set[Ended] = {self._deleting[block_id] for block_id in taken if block_id in self._deleting}
        # What is being deleted takes room until it is gone. Its own victims are room enough for as many blocks;
        # otherwise it is the room of others, of which it is not known how much is spoken for.
        if taken and len(self._lru) + len(self._deleting) > config.storage_blocks:
            enough = len(evicted) >= len(taken)
            waits.update([self._deleting[evicted[0]]] if enough else self._deleting.values())
        if not self._ordered:
            return Taken(taken, waits)
        ended: asyncio.Future[frozenset[int]] = asyncio.get_running_loop().create_future()
        self._order.changes(taken, ended)
        return Taken(taken, waits, ended)

    def give_up(self, taken: Taken) -> None:
        """Forget blocks that were taken and will not be written."""
        for block_id in self._still(taken, taken.block_ids):
            self._forget(block_id)
        # Who has taken their room must wait for what they would have waited for: until then it is no room.
        self._behind.spawn(self._end_without_write(taken))

    async def _end_without_write(self, taken: Taken) -> None:
        if taken.waits:
            await asyncio.wait(taken.waits)
        _end(taken, self._config.objects(taken.block_ids))

    async def write(self, taken: Taken) -> dict[int, int]:
        """Write blocks that were taken; returns when each that succeeded was complete, in nanoseconds."""
        block_ids = taken.block_ids
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
        missing: set[int] = set()
        if failed:
            written = {done.op.object_id for done in finished if done.error is None}
            missing.update(one for one in self._config.objects(failed) if one not in written)
            self._remove(self._still(taken, failed), written)
        _end(taken, missing)
        self._behind.report([*finished, *synced])
        return ended_ns

    def _still(self, taken: Taken, block_ids: Sequence[int]) -> Sequence[int]:
        """Those of the blocks that have not been evicted, and perhaps taken again, since they were taken."""
        if taken.ended is None:
            return block_ids
        return [block_id for block_id in block_ids if self._order.last_change(block_id) is taken.ended]

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

    def _remove(self, block_ids: Sequence[int], written: Container[int]) -> None:
        """Forget blocks that were not written whole, and delete those of their objects that were."""
        for block_id in block_ids:
            self._forget(block_id)
        parts = [one for one in self._config.objects(block_ids) if one in written]
        if parts:
            self._begin_delete(block_ids, parts)

    def _forget(self, block_id: int) -> None:
        self._lru.discard(block_id)
        self._unready.discard(block_id)

    def _delete(self, block_ids: Sequence[int]) -> asyncio.Task[None]:
        """Begin to delete blocks from storage, as one batch."""
        self._operations.add(Operation.DELETE, block_ids)
        if self._remembers_uses:
            for block_id in block_ids:
                self._used_before.insert(block_id)
        return self._begin_delete(block_ids, self._config.objects(block_ids))

    def _begin_delete(self, block_ids: Sequence[int], object_ids: Collection[int]) -> asyncio.Task[None]:
        waits = self._order.before_change(block_ids)
        changes = self._changes(block_ids) if waits else {}
        task = self._behind.spawn(self._delete_objects(block_ids, object_ids, waits, changes))
        if self._ordered:
            self._order.changes(block_ids, task)
        for block_id in block_ids:
            self._deleting[block_id] = task
        return task

    async def _delete_objects(
        self,
        block_ids: Sequence[int],
        object_ids: Collection[int],
        waits: Collection[Ended],
        changes: Mapping[int, Ended],
    ) -> None:
        if waits:
            await asyncio.wait(waits)
            missing = self._missing(changes)
            object_ids = [one for one in object_ids if one not in missing]
        finished = await self._behind.run([(Op(OpKind.DELETE, one),) for one in object_ids])
        for block_id in block_ids:
            # Where it was taken and thrown out again meanwhile, another task deletes it.
            if self._deleting.get(block_id) is asyncio.current_task():
                del self._deleting[block_id]
        self._behind.report(finished)

    def _changes(self, block_ids: Iterable[int]) -> dict[int, Ended]:
        """The last change of each block of which one was decided and has not ended."""
        changes = ((block_id, self._order.last_change(block_id)) for block_id in block_ids)
        return {block_id: change for block_id, change in changes if change is not None}

    def _missing(self, changes: Mapping[int, Ended]) -> set[int]:
        """The objects of blocks that were to be written by those changes, which have ended, and were not."""
        missing: set[int] = set()
        for block_id, change in changes.items():
            unwritten = None if change.cancelled() or change.exception() is not None else change.result()
            if isinstance(unwritten, frozenset):
                missing.update(unwritten.intersection(self._config.objects((block_id,))))
        return missing


def _end(taken: Taken, missing: Collection[int]) -> None:
    """Let those go on who wait for the blocks, and tell them which objects are not there."""
    if taken.ended is not None and not taken.ended.done():
        taken.ended.set_result(frozenset(missing))


def _unread(reads: Sequence[Op]) -> list[OpDone]:
    """What becomes of reads of blocks that were not written."""
    error = OperationSkippedError("a block that it needed was not written")
    return [OpDone(op, 0, 0, 0, None, 0, error) for op in reads]


def _part(part: float, blocks: int) -> int:
    """Whole blocks of a part of the tier, at least one where there is a tier; 0.29 of 100 are 29, as floats are not."""
    return max(math.floor(round(part * blocks, 6)), min(blocks, 1))
