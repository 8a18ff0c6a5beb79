"""The KV-cache engine: what happens to one request, over the three tiers.

Control runs on one event loop. Every change to the tiers is made between two awaits, so that nothing is locked.
"""

import asyncio
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from typing import Any

from mlpstorage.config import Decisions, Promotion, StorePolicy, Tier
from mlpstorage.kvcache.accelerators import Accelerators
from mlpstorage.kvcache.block_io import Behind, BlockIO, Submitted, end_of
from mlpstorage.kvcache.dram_tier import DramTier, SlotArena
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.first_token import FirstToken
from mlpstorage.kvcache.index import LruSet, admit, in_touch_order, leading_run
from mlpstorage.kvcache.operations import Operation, OperationsDigest
from mlpstorage.kvcache.other_ranks import Existence, OtherRanks
from mlpstorage.kvcache.recorder import Answered, Recorder
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.storage_tier import StorageTier, Taken
from mlpstorage.kvcache.write_queue import WriteQueue
from mlpstorage.measure.clock import NS, Clock
from mlpstorage.measure.reuse import ReuseDistance

Found = dict[Tier, list[int]]
"""Blocks of a leading run, in its order, by the fastest tier that holds each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What became of a hit.

    Attributes:
        usable: What need not be computed.
        storage_ns: How long the reads took.
        dram_ns: How much longer the copies took.
        copies_ns: How long the copies took, from the same begin; 0 without any.
        end_ns: When the last of them ended.
        skipped: Whether what storage held was too little to be read.
        abandoned: Whether reading it took too long.
        cross_rank: Blocks of it that another rank had written.
    """

    usable: Found
    storage_ns: int
    dram_ns: int
    copies_ns: int
    end_ns: int
    skipped: bool
    abandoned: bool
    cross_rank: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A hit that is being loaded.

    Attributes:
        usable: What need not be computed if all goes well.
        reads: The reads from storage; None where there are none.
        copies: The copies from DRAM; None likewise.
        copied_ns: When these ended, once they have.
        skipped: Whether what storage held was too little to be read.
        run: All blocks of the hit, in the order of the chain.
        cross_rank: Those of them that are read and that another rank has written.
    """

    usable: Found
    reads: Submitted | None
    copies: Submitted | None
    copied_ns: list[int]
    skipped: bool
    run: Sequence[int]
    cross_rank: frozenset[int]


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
        existence: Tells which blocks are on storage that other ranks write to as well; None where none does.

    Attributes:
        in_flight: Requests that are under way.
        reuse: How far apart the uses of blocks are.
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
        existence: Existence | None = None,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._clock = clock
        self._behind = Behind(blocks, on_failure, shared=existence is not None)
        self._others = OtherRanks(existence, behind=self._behind, recorder=recorder, clock=clock)
        self._gpu = LruSet(config.gpu_blocks)
        self._dram = DramTier(config, arena, self._behind)
        self._operations = OperationsDigest()
        self._storage = StorageTier(config, self._behind, self._operations, self._others)
        self._queue = WriteQueue(config, tier=self._storage, behind=self._behind, recorder=recorder, clock=clock)
        self.reuse = ReuseDistance()
        self._accelerators = Accelerators(config.pacing.compute, config.pacing.mode, clock)
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

    @property
    def operations_digest(self) -> str:
        """Digest of all that was looked up, loaded, stored and deleted so far."""
        return self._operations.hexdigest()

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
        begin_ns = self._clock.now_ns()
        self.in_flight += 1
        taken: list[Taken] | None = None
        try:
            if self._others.shared and self._config.prefix_caching:
                await self._find_written(request.block_ids)
            found = self._look_up(request.block_ids)
            looked_up_ns = self._clock.now_ns()
            self._recorder.took("lookup", begin_ns, looked_up_ns)
            load = self._begin_load(request.block_ids, found)
            if self._config.decisions is Decisions.ARRIVAL:
                taken = self._take(request.block_ids, load.usable)
            loaded = await self._end_load(load, looked_up_ns)
            if loaded is None:
                self._recorder.failed(self._clock.now_ns())
                return
            cached_tokens = await self._prefill(request, loaded, (intended_ns, begin_ns, looked_up_ns))
            if taken is not None:
                # At once, not after the answer: others may wait for it already.
                self._queue.write(taken)
                taken = None
            await self._decode(request, loaded, cached_tokens)
        finally:
            self.in_flight -= 1
            if taken is not None:
                self._queue.give_up(taken)
        if self._config.decisions is Decisions.COMPLETION:
            await self._store(request.block_ids, loaded.usable)

    async def settle(self) -> None:
        """Wait until everything that was written behind has ended."""
        await self._behind.settle()

    def stop(self) -> None:
        """Hand no further operation to the I/O behind requests."""
        self._behind.stopping = True
        self._queue.stop()

    async def _prefill(self, request: Request, loaded: Loaded, before_ns: tuple[int, int, int]) -> dict[Tier, int]:
        """Compute what was not loaded, and the first token; returns the tokens that were cached, by tier.

        Args:
            request: The request.
            loaded: What need not be computed.
            before_ns: When the request should have arrived, when it was begun, and when it had been looked up.
        """
        recorder, accelerators = self._recorder, self._accelerators
        intended_ns, begin_ns, looked_up_ns = before_ns
        cached_tokens = self._cached_tokens(request, loaded.usable)
        cached = sum(cached_tokens.values())
        new, read = request.prompt_tokens - cached, cached_tokens[Tier.STORAGE]
        prefilled = await accelerators.prefill(new, cached)
        at_ns = self._clock.now_ns()
        needed_ns = accelerators.prefill_ns(new, cached)
        without_storage_ns = accelerators.prefill_ns(new + read, cached - read)
        recorder.first_token(
            FirstToken(
                at_ns=at_ns,
                client_late_ns=begin_ns - intended_ns,
                lookup_ns=looked_up_ns - begin_ns,
                storage_load_ns=loaded.storage_ns,
                dram_load_ns=loaded.dram_ns,
                copies_ns=loaded.copies_ns,
                prefill_queue_ns=prefilled.queue_ns,
                prefill_ns=at_ns - loaded.end_ns - prefilled.queue_ns,
                storage_load_tokens=read,
                storage_recompute_ns=None
                if without_storage_ns is None or needed_ns is None
                else without_storage_ns - needed_ns,
                prompt_prefill_ns=accelerators.prefill_ns(request.prompt_tokens, 0),
                needed_prefill_ns=needed_ns,
                waits_in_full=self._config.pacing.waits_in_full,
            )
        )
        return cached_tokens

    async def _decode(self, request: Request, loaded: Loaded, cached_tokens: dict[Tier, int]) -> None:
        """Compute the rest of the answer."""
        await self._accelerators.decode(request.output_tokens, request.prompt_tokens)
        self._recorder.answered(
            Answered(
                done_ns=self._clock.now_ns(),
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                prompt_blocks=len(request.block_ids),
                cached_tokens=cached_tokens,
                hit_blocks={tier: len(ids) for tier, ids in loaded.usable.items()},
                load_skipped=loaded.skipped,
                load_abandoned=loaded.abandoned,
                cross_rank_tokens=self._cross_rank_tokens(request, loaded),
                cross_rank_blocks=len(loaded.cross_rank),
            )
        )

    async def _find_written(self, block_ids: Sequence[int]) -> None:
        """Ask which blocks behind the known leading run other ranks have written: one question a request."""
        gpu, in_dram = self._gpu.ids, self._dram.ready
        known = leading_run(block_ids, self._tiers)
        if known < len(block_ids):
            rest = block_ids[known:]
            await self._storage.find_written(rest, {one for one in rest if one in gpu or one in in_dram})

    def _look_up(self, block_ids: Sequence[int]) -> Found:
        """The blocks of the longest leading run."""
        self.reuse.touch(block_ids)
        found: Found = {tier: [] for tier in Tier}
        if self._config.prefix_caching:
            gpu, in_dram = self._gpu.ids, self._dram.ready
            for block_id in block_ids[: leading_run(block_ids, self._tiers)]:
                tier = Tier.GPU if block_id in gpu else Tier.CPU if block_id in in_dram else Tier.STORAGE
                found[tier].append(block_id)
        self._operations.add(Operation.LOOK_UP, (len(block_ids), *map(len, found.values())))
        return found

    @property
    def _tiers(self) -> tuple[Container[int], ...]:
        """What a look-up asks, the fastest first."""
        tiers = (self._gpu.ids, self._dram.ready, self._storage.stored)
        return (*tiers, self._others.ids) if self._others.shared else tiers

    def _cross_rank_tokens(self, request: Request, loaded: Loaded) -> int:
        """Tokens of what another rank had written, but for the last of a prompt that was found whole."""
        tokens = len(loaded.cross_rank) * self._config.block_tokens
        found = sum(map(len, loaded.usable.values())) * self._config.block_tokens
        whole = found >= request.prompt_tokens and request.block_ids[-1] in loaded.cross_rank
        return tokens - whole

    def _cached_tokens(self, request: Request, usable: Found) -> dict[Tier, int]:
        """Tokens that need no prefill, by tier. The last token of a prompt is always computed, even on a full hit."""
        tokens = {tier: len(ids) * self._config.block_tokens for tier, ids in usable.items()}
        if sum(tokens.values()) >= request.prompt_tokens:
            last = request.block_ids[-1]
            tier = next(tier for tier, ids in usable.items() if last in ids)
            tokens[tier] -= 1
        return tokens

    def _begin_load(self, block_ids: Sequence[int], found: Found) -> Load:
        """Begin to read and copy the blocks of a hit, in parallel; not what storage holds where that is too little."""
        tokens = len(found[Tier.STORAGE]) * self._config.block_tokens
        skipped = 0 < tokens <= self._config.min_load_tokens
        usable = {**found, Tier.STORAGE: []} if skipped else found
        reads = self._storage.begin_read(usable[Tier.STORAGE]) if usable[Tier.STORAGE] else None
        copies = self._dram.begin_copy_out(usable[Tier.CPU]) if usable[Tier.CPU] else None
        copied_ns: list[int] = []
        if copies is not None:
            copies.finished.add_done_callback(lambda _: copied_ns.append(self._clock.now_ns()))
        others = self._others.ids
        return Load(
            run=block_ids[: sum(map(len, found.values()))],
            cross_rank=frozenset(one for one in usable[Tier.STORAGE] if one in others) if others else frozenset(),
            usable=usable,
            reads=reads,
            copies=copies,
            copied_ns=copied_ns,
            skipped=skipped,
        )

    async def _end_load(self, load: Load, begin_ns: int) -> Loaded | None:
        """Wait for a load; None where any of it failed. What takes too long to read is computed instead."""
        usable, reads, copies = load.usable, load.reads, load.copies
        tokens = len(usable[Tier.STORAGE]) * self._config.block_tokens
        abandoned = reads is not None and not await self._in_time(reads, tokens)
        read_ns = begin_ns if reads is None else self._clock.now_ns()
        if copies is not None:
            await end_of(copies.finished)
        needed = [batch for batch in (None if abandoned else reads, copies) if batch is not None]
        lost = _lost(load, set() if abandoned or reads is None else self._storage.gone(reads.finished.result()))
        ended = [done for batch in needed for done in batch.finished.result()]
        if any(one.error is not None and one.op.object_id // self._config.kv_ranks not in lost for one in ended):
            return None
        if abandoned:
            lost.update(usable[Tier.STORAGE])
        usable = _without(usable, lost)
        end_ns = read_ns if copies is None else self._clock.now_ns()
        if reads is not None or copies is not None:
            self._recorder.took("request_load", begin_ns, end_ns)
        return Loaded(
            usable=usable,
            storage_ns=read_ns - begin_ns,
            dram_ns=end_ns - read_ns,
            copies_ns=load.copied_ns[0] - begin_ns if load.copied_ns else 0,
            end_ns=end_ns,
            skipped=load.skipped,
            abandoned=abandoned,
            cross_rank=[one for one in usable[Tier.STORAGE] if one in load.cross_rank],
        )

    async def _in_time(self, reads: Submitted, tokens: int) -> bool:
        """Wait for reads; give up those that have not begun, and return False, where that takes too long."""
        limit = self._config.load_timeout
        if limit is None:
            await end_of(reads.finished)
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
        recent, wanted, kept = self._make_recent(block_ids, usable)
        await self._queue.put(wanted, kept)
        self._storage.touch(recent)

    def _take(self, block_ids: tuple[int, ...], usable: Found) -> list[Taken]:
        """The same at arrival: have storage take the blocks now, to be written once they are computed."""
        recent, wanted, kept = self._make_recent(block_ids, usable)
        taken = self._queue.take(wanted, kept)
        self._storage.touch(recent)
        return taken

    def _make_recent(self, block_ids: tuple[int, ...], usable: Found) -> tuple[list[int], list[int], set[int]]:
        """Make a request's blocks recent in every tier.

        Returns them in that order, those of them that storage should get, and those that none of them may push out.
        """
        recent = list(in_touch_order(block_ids, self._config.touch))
        unpromoted = usable[Tier.STORAGE] if self._config.promote is Promotion.NEVER else ()
        self._dram.demote(admit(self._gpu, recent), recent, unpromoted)
        self._storage.touch(recent)
        # Of a chain longer than the tier only a part would outlive the step; the rest is not written.
        kept = self._storage.kept(block_ids)
        missing = self._missing(block_ids, usable)
        wanted = [block_id for block_id in missing if block_id in kept]
        self._queue.dropped(len(missing) - len(wanted))
        return recent, wanted, kept

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


def _lost(load: Load, gone: Collection[int]) -> set[int]:
    """What of a hit cannot be used where some of its blocks are gone: the first of them, and all behind it."""
    first = next((place for place, block_id in enumerate(load.run) if block_id in gone), len(load.run))
    return set(load.run[first:])


def _without(found: Found, lost: Collection[int]) -> Found:
    """What was found but for what was lost."""
    return {tier: [one for one in ids if one not in lost] for tier, ids in found.items()} if lost else found
