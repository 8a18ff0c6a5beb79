"""The DRAM tier: which blocks lie in which slot of the arena, and the copies into and out of it."""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

from mlpstorage.config import Decisions
from mlpstorage.kvcache.block_io import Behind, Submitted
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.index import Admission, Findable, LruSet, admit
from mlpstorage.kvcache.order import Ended, LaterBatch, Order
from mlpstorage.storage.ops import Chain, Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import VerifyError


class SlotArena(Protocol):
    """Where the DRAM tier's blocks lie; see `storage.arena.DramArena`."""

    def allocate(self) -> int | None:
        """A free slot; None where there is none."""
        ...

    def free(self, slot: int) -> None:
        """Give a slot back."""
        ...


class DramTier:
    """Blocks in DRAM, least recently used first; a slot holds all objects of its block.

    Args:
        config: Capacity.
        arena: The slots, one for every block of the tier.
        behind: The I/O that copies.

    Attributes:
        ready: The blocks that a look-up finds: those whose copy is complete; where decisions are made at arrival all.
    """

    def __init__(self, config: EngineConfig, arena: SlotArena, behind: Behind) -> None:
        self._config = config
        self._arena = arena
        self._behind = behind
        self._ordered = config.decisions is Decisions.ARRIVAL
        self._order = Order()
        self._lru = LruSet(config.cpu_blocks, pins=not self._ordered)
        self._slots: dict[int, int] = {}
        self._unready: set[int] = set()
        self._damaged: set[int] = set()
        self.ready = Findable(self._lru.ids, self._unready)

    def demote(self, gpu: Admission, recent: Sequence[int], unpromoted: Collection[int] = ()) -> None:
        """Take what left the GPU tier or found no place there, and make a request's other blocks recent.

        Those that are `unpromoted` are not taken for having found no place.
        """
        if not self._config.cpu_blocks:
            return
        refused, held = set(gpu.refused).difference(unpromoted), self._lru.ids
        self._offer(gpu.evicted + [block_id for block_id in recent if block_id in held or block_id in refused])

    def begin_copy_out(self, block_ids: Sequence[int]) -> Submitted:
        """Copy blocks of a hit; they stay until the last copy has ended."""
        chains = []
        for block_id in block_ids:
            self._lru.pin(block_id)
            slot = self._slots[block_id]
            chains += [(Op(OpKind.COPY_OUT, one, slot),) for one in self._config.objects((block_id,))]
        slots = [self._slots[block_id] for block_id in block_ids]
        waits = self._order.before_read(slots)
        batch: Submitted
        if waits:
            batch = LaterBatch(waits, partial(self._begin_late, chains), list)
        else:
            batch = self._behind.blocks.begin(chains, Lane.LOAD)
        if self._ordered:
            self._order.reads(slots, batch.finished)
        batch.finished.add_done_callback(partial(self._copied_out, block_ids))
        return batch

    def _begin_late(self, chains: Sequence[Chain]) -> Submitted | None:
        """Begin copies that had to wait for others; None where the run is over."""
        return None if self._behind.stopping else self._behind.blocks.begin(chains, Lane.LOAD)

    def _copied_out(self, block_ids: Sequence[int], finished: asyncio.Future[list[OpDone]]) -> None:
        done = [] if finished.cancelled() else finished.result()
        failed = [one for one in done if one.error is not None]
        wrong = {one.op.object_id // self._config.kv_ranks for one in failed if self._is_wrong(one)}
        self._unready |= wrong
        self._damaged |= wrong
        for block_id in block_ids:
            # Others may still copy what was found to be wrong: its slot is free after the last of them.
            if self._lru.unpin(block_id) and block_id in self._damaged:
                self._damaged.remove(block_id)
                self._lru.discard(block_id)
                self._free(block_id)
        self._behind.report(failed)

    def _is_wrong(self, copied: OpDone) -> bool:
        """Whether a block is not what it should be; not where it has left that slot since, or is copied to it anew."""
        op = copied.op
        stays = self._slots.get(op.object_id // self._config.kv_ranks) == op.slot and not self._order.changing(op.slot)
        return stays and isinstance(copied.error, VerifyError)

    def _offer(self, block_ids: Iterable[int]) -> None:
        taken = admit(self._lru, block_ids)
        for victim in taken.evicted:
            self._free(victim)
        copies = []
        for block_id in taken.admitted:
            slot = self._arena.allocate()
            assert slot is not None, "the arena has a slot for every block of the tier"
            self._slots[block_id] = slot
            self._lru.pin(block_id)
            copies += [Op(OpKind.COPY_IN, one, slot) for one in self._config.objects((block_id,))]
        if not copies:
            return
        if not self._ordered:
            self._unready.update(taken.admitted)
        slots = [self._slots[block_id] for block_id in taken.admitted]
        task = self._behind.spawn(self._copy_in(taken.admitted, copies, self._order.before_change(slots)))
        if self._ordered:
            self._order.changes(slots, task)

    async def _copy_in(self, block_ids: Sequence[int], copies: Sequence[Op], waits: Collection[Ended]) -> None:
        if waits:
            await asyncio.wait(waits)
        finished = await self._behind.run([(op,) for op in copies])
        failed = [done for done in finished if done.error is not None]
        missing = {done.op.object_id // self._config.kv_ranks for done in failed} if finished else set(block_ids)
        for block_id in block_ids:
            self._lru.unpin(block_id)
            if block_id not in missing:
                self._unready.discard(block_id)
        self._behind.report(failed)

    def _free(self, block_id: int) -> None:
        self._unready.discard(block_id)
        self._arena.free(self._slots.pop(block_id))
