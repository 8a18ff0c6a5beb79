"""The KV-cache engine: what happens to one request, over the three tiers.

Control runs on one event loop. Every change to the tiers is made between two awaits, so that nothing is locked.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlpstorage.config import StorePolicy, Tier
from mlpstorage.kvcache.block_io import Behind, BlockIO, Submitted
from mlpstorage.kvcache.dram_tier import DramTier, SlotArena
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.index import LruSet, admit, in_touch_order, leading_run
from mlpstorage.kvcache.recorder import Answered, Recorder
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.storage_tier import StorageTier
from mlpstorage.kvcache.write_queue import WriteQueue
from mlpstorage.measure.clock import NS, Clock

Found = dict[Tier, list[int]]
"""Blocks of a leading run, in its order, by the fastest tier that holds each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What became of a hit.

    Attributes:
        usable: What need not be computed.
        load_ns: How long the load took; None where nothing was to be loaded.
        skipped: Whether what storage held was too little to be read.
        abandoned: Whether reading it took too long.
    """

    usable: Found
    load_ns: int | None
    skipped: bool
    abandoned: bool


class Engine:
    """Serves requests over the three tiers.

    Args:
        config: Sizes, policies and pacing.
        blocks: The I/O.
        arena: Slots of the DRAM tier.
        recorder: Where everything is counted.
        clock: The rank's clock.
        on_failure: Called once for every I/O that failed, but for data that was not what had been written: the recorder
            keeps those failures, the block is forgotten and deleted, and the request fails.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        blocks: BlockIO,
        arena: SlotArena,
        recorder: Recorder,
        clock: Clock,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._clock = clock
        self._behind = Behind(blocks, on_failure)
        self._gpu = LruSet(config.gpu_blocks)
        self._dram = DramTier(config, arena, self._behind)
        self._storage = StorageTier(config, self._behind)
        self._queue = WriteQueue(config, tier=self._storage, behind=self._behind, recorder=recorder, clock=clock)
        self.in_flight = 0

    @property
    def write_queue_blocks(self) -> int:
        """Blocks that wait to be written or are being written."""
        return self._queue.blocks

    @property
    def stored_blocks(self) -> int:
        """Blocks on storage."""
        return len(self._storage.stored)

    @property
    def cpu_blocks(self) -> int:
        """Blocks in the DRAM tier."""
        return len(self._dram.ready)

    def stored_objects(self) -> list[int]:
        """Ids of the objects of all blocks on storage."""
        return self._storage.objects()

    def adopt(self, block_ids: Sequence[int]) -> None:
        """Take over blocks that are on storage already, the least recent first; the oldest of too many are deleted.

        The deletes have ended once the engine has settled.
        """
        self._storage.adopt(block_ids)

    async def serve(self, request: Request, intended_ns: int) -> None:
        """Play one request, from its intended arrival to its store step. Latency counts from the intended arrival."""
        self.in_flight += 1
        try:
            found = self._look_up(request.block_ids)
            loaded = await self._answer(request, found, intended_ns)
        finally:
            self.in_flight -= 1
        if loaded is not None:
            await self._store(request.block_ids, loaded.usable)

    async def settle(self) -> None:
        """Wait until everything that was written behind has ended."""
        await self._behind.settle()

    def stop(self) -> None:
        """Hand no further operation to the I/O behind requests."""
        self._behind.stopping = True
        self._queue.stop()

    async def _answer(self, request: Request, found: Found, intended_ns: int) -> Loaded | None:
        """Load, prefill and decode; returns what was loaded, None where that failed."""
        config, clock = self._config, self._clock
        loaded = await self._load(found)
        if loaded is None:
            self._recorder.failed(clock.now_ns())
            return None
        cached_tokens = self._cached_tokens(request, loaded.usable)
        await self._wait(config.pacing.prefill_ns(request.prompt_tokens - sum(cached_tokens.values())))
        first_token_ns = clock.now_ns()
        self._recorder.first_token(first_token_ns, first_token_ns - intended_ns)
        await self._wait(config.pacing.decode_ns(request.output_tokens))
        saved_ns = config.pacing.recompute_ns(cached_tokens[Tier.CPU] + cached_tokens[Tier.STORAGE])
        self._recorder.answered(
            Answered(
                done_ns=clock.now_ns(),
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                prompt_blocks=len(request.block_ids),
                cached_tokens=cached_tokens,
                hit_blocks={tier: len(ids) for tier, ids in loaded.usable.items()},
                ttft_ns=first_token_ns - intended_ns,
                ttft_saved_ns=None if loaded.load_ns is None else saved_ns - loaded.load_ns,
                load_skipped=loaded.skipped,
                load_abandoned=loaded.abandoned,
            )
        )
        return loaded

    async def _wait(self, time_ns: int) -> None:
        if time_ns > 0:
            await self._clock.sleep_until(self._clock.now_ns() + time_ns)

    def _look_up(self, block_ids: Sequence[int]) -> Found:
        """The blocks of the longest leading run."""
        begin_ns = self._clock.now_ns()
        found: Found = {tier: [] for tier in Tier}
        if self._config.prefix_caching:
            gpu, in_dram = self._gpu.ids, self._dram.ready
            for block_id in block_ids[: leading_run(block_ids, (gpu, in_dram, self._storage.stored))]:
                tier = Tier.GPU if block_id in gpu else Tier.CPU if block_id in in_dram else Tier.STORAGE
                found[tier].append(block_id)
        self._recorder.took("lookup", begin_ns, self._clock.now_ns())
        return found

    def _cached_tokens(self, request: Request, usable: Found) -> dict[Tier, int]:
        """Tokens that need no prefill, by tier. The last token of a prompt is always computed, even on a full hit."""
        tokens = {tier: len(ids) * self._config.block_tokens for tier, ids in usable.items()}
        if sum(tokens.values()) >= request.prompt_tokens:
            last = request.block_ids[-1]
            tier = next(tier for tier, ids in usable.items() if last in ids)
            tokens[tier] -= 1
        return tokens

    async def _load(self, found: Found) -> Loaded | None:
        """Read and copy the blocks of a hit, in parallel; None where any failed.

        What storage holds is computed in the place of being read where it is too little, or takes too long.
        """
        config = self._config
        tokens = len(found[Tier.STORAGE]) * config.block_tokens
        skipped = 0 < tokens <= config.min_load_tokens
        usable = {**found, Tier.STORAGE: []} if skipped else found
        if not usable[Tier.CPU] and not usable[Tier.STORAGE]:
            return Loaded(usable=usable, load_ns=None, skipped=skipped, abandoned=False)
        begin_ns = self._clock.now_ns()
        reads = self._storage.begin_read(usable[Tier.STORAGE]) if usable[Tier.STORAGE] else None
        copies = self._dram.begin_copy_out(usable[Tier.CPU]) if usable[Tier.CPU] else None
        abandoned = reads is not None and not await self._in_time(reads, tokens)
        if copies is not None:
            await asyncio.wait({copies.finished})
        needed = [batch for batch in (None if abandoned else reads, copies) if batch is not None]
        if any(done.error is not None for batch in needed for done in batch.finished.result()):
            return None
        end_ns = self._clock.now_ns()
        self._recorder.took("request_load", begin_ns, end_ns)
        if abandoned:
            usable = {**usable, Tier.STORAGE: []}
        return Loaded(usable=usable, load_ns=end_ns - begin_ns, skipped=skipped, abandoned=abandoned)

    async def _in_time(self, reads: Submitted, tokens: int) -> bool:
        """Wait for reads; give up those that have not begun, and return False, where that takes too long."""
        limit = self._config.load_timeout
        if limit is None:
            await asyncio.wait({reads.finished})
            return True
        until_ns = self._clock.now_ns() + round(limit.limit_s(tokens) * NS)
        timer = asyncio.create_task(self._clock.sleep_until(until_ns))
        either: set[asyncio.Future[Any]] = {reads.finished, timer}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
        if not reads.finished.done():
            reads.cancel()
            return False
        return True

    async def _store(self, block_ids: tuple[int, ...], usable: Found) -> None:
        """Make the request's blocks recent in every tier and write behind what storage should hold and does not.

        Returns when the write queue has taken the blocks: a request holds them until then. A block of the chain that is
        evicted in that very time is not queued again: the tier is turning over faster than the queue moves, and one
        block more would only push out another.
        """
        recent = list(in_touch_order(block_ids, self._config.touch))
        self._dram.demote(admit(self._gpu, recent), recent)
        self._storage.touch(recent)
        # Of a chain longer than the tier only a part would outlive the step; the rest is not written.
        kept = self._storage.kept(block_ids)
        missing = self._missing(block_ids, usable)
        wanted = [block_id for block_id in missing if block_id in kept]
        self._queue.dropped(len(missing) - len(wanted))
        await self._queue.put(wanted, kept)
        self._storage.touch(recent)

    def _missing(self, block_ids: Sequence[int], usable: Found) -> list[int]:
        """Blocks of a chain that storage should get, in its order, by the store policy.

        `always`: what was computed, and what was read and has been evicted since: it is at hand, and without it the
        chain's new tail could not be reached. `second-use`: also what other tiers held, from its second use on.
        """
        in_gpu_or_dram = {*usable[Tier.GPU], *usable[Tier.CPU]}
        cached = in_gpu_or_dram.union(usable[Tier.STORAGE])
        missing = self._queue.lacking(self._storage.lacking(dict.fromkeys(block_ids)))
        computed = sum(block_id not in cached for block_id in block_ids)
        self._queue.deduplicated(computed - sum(block_id not in cached for block_id in missing))
        if self._config.store_policy is StorePolicy.ALWAYS:
            return [block_id for block_id in missing if block_id not in in_gpu_or_dram]
        used_before = [block_id for block_id in missing if self._storage.used_before(block_id)]
        self._recorder.deferred(self._clock.now_ns(), len(missing) - len(used_before))
        return used_before
