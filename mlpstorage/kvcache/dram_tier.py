"""The DRAM tier: which blocks lie in which slot of the arena, and the copies into and out of it."""

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

from mlpstorage.kvcache.block_io import Behind, Submitted
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.index import Admission, Findable, LruSet, admit
from mlpstorage.storage.ops import Lane, Op, OpDone, OpKind
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
        ready: Blocks whose copy is complete: those that a look-up finds.
    """

    def __init__(self, config: EngineConfig, arena: SlotArena, behind: Behind) -> None:
        self._config = config
        self._arena = arena
        self._behind = behind
        self._lru = LruSet(config.cpu_blocks)
        self._slots: dict[int, int] = {}
        self._unready: set[int] = set()
        self._damaged: set[int] = set()
        self.ready = Findable(self._lru.ids, self._unready)

    def demote(self, gpu: Admission, recent: Sequence[int]) -> None:
        """Take what left the GPU tier or found no place there, and make a request's other blocks recent."""
        refused = set(gpu.refused)
        self._offer(gpu.evicted + [block_id for block_id in recent if block_id in self._lru or block_id in refused])

    def begin_copy_out(self, block_ids: Sequence[int]) -> Submitted:
        """Copy blocks of a hit; they stay until the last copy has ended."""
        chains = []
        for block_id in block_ids:
            self._lru.pin(block_id)
            slot = self._slots[block_id]
            chains += [(Op(OpKind.COPY_OUT, one, slot),) for one in self._config.objects((block_id,))]
        batch = self._behind.blocks.begin(chains, Lane.LOAD)
        batch.finished.add_done_callback(partial(self._copied_out, block_ids))
        return batch

    def _copied_out(self, block_ids: Sequence[int], finished: asyncio.Future[list[OpDone]]) -> None:
        done = [] if finished.cancelled() else finished.result()
        failed = [one for one in done if one.error is not None]
        wrong = {one.op.object_id // self._config.kv_ranks for one in failed if isinstance(one.error, VerifyError)}
        self._unready |= wrong
        self._damaged |= wrong
        for block_id in block_ids:
            # Others may still copy what was found to be wrong: its slot is free after the last of them.
            if self._lru.unpin(block_id) and block_id in self._damaged:
                self._damaged.remove(block_id)
                self._lru.discard(block_id)
                self._free(block_id)
        self._behind.report(failed)

    def _offer(self, block_ids: Iterable[int]) -> None:
        taken = admit(self._lru, block_ids)
        for victim in taken.evicted:
            self._free(victim)
        copies = []
        for block_id in taken.admitted:
            slot = self._arena.allocate()
            assert slot is not None, "the arena has a slot for every block of the tier"
            self._slots[block_id] = slot
            self._unready.add(block_id)
            self._lru.pin(block_id)
            copies += [Op(OpKind.COPY_IN, one, slot) for one in self._config.objects((block_id,))]
        if copies:
            self._behind.spawn(self._copy_in(taken.admitted, copies))

    async def _copy_in(self, block_ids: Sequence[int], copies: Sequence[Op]) -> None:
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
