"""The KV-cache engine: what happens to one request, and which blocks live in which tier.

Control runs on one event loop. Every change to the tiers is made between two awaits, so that nothing is locked.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlpstorage.config import Tier, TouchOrder
from mlpstorage.kvcache.index import LruSet, in_touch_order, leading_run
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.recorder import Answered, Recorder
from mlpstorage.kvcache.request import Request
from mlpstorage.measure.clock import Clock
from mlpstorage.storage.ops import Lane, Op, OpDone, OpKind
from mlpstorage.storage.pool import OperationSkippedError

WRITE_BATCH_BLOCKS = 16
"""Blocks that are handed to the I/O threads, and become resident, together."""


class BlockIO(Protocol):
    """The I/O of a rank, as the engine sees it."""

    async def run(self, chains: Sequence[Sequence[Op]], lane: Lane) -> list[OpDone]:
        """Do a batch of operations; return when all are finished. See `storage.pool.IoPool.submit`."""
        ...


class SlotArena(Protocol):
    """Where the DRAM tier's blocks lie; see `storage.arena.DramArena`."""

    def allocate(self) -> int | None:
        """A free slot; None where there is none."""
        ...

    def free(self, slot: int) -> None:
        """Give a slot back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What decides the engine's behaviour; capacities are in blocks."""

    block_tokens: int
    object_bytes: int
    gpu_blocks: int
    cpu_blocks: int
    storage_blocks: int
    write_queue_blocks: int
    touch: TouchOrder
    prefix_caching: bool
    pacing: Pacing


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of ids offered to a tier: those new in it, those thrown out for them, those it could not take."""

    admitted: list[int]
    evicted: list[int]
    refused: list[int]


def admit(tier: LruSet, block_ids: Iterable[int]) -> Admission:
    """Touch or insert each id in turn and return the net effect.

    An id that is inserted and evicted again for a later one counts as refused: nothing was moved for it yet. One that
    is evicted and inserted again has stayed.
    """
    fresh: dict[int, None] = {}
    evicted: dict[int, None] = {}
    refused: list[int] = []
    for block_id in block_ids:
        held = block_id in tier
        victims = tier.insert(block_id)
        if victims is None:
            refused.append(block_id)
            continue
        if block_id in evicted:
            del evicted[block_id]
        elif not held:
            fresh[block_id] = None
        for victim in victims:
            if victim in fresh:
                del fresh[victim]
                refused.append(victim)
            else:
                evicted[victim] = None
    return Admission(list(fresh), list(evicted), refused)


class WriteGate:
    """A bound on the blocks that wait to be written: who would exceed it waits, first come first served."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, blocks: int) -> None:
        """Return when `blocks` more fit; at most `capacity` at once."""
        if not self._waiting and self.used + blocks <= self.capacity:
            self.used += blocks
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((blocks, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Either the turn had just come, or those behind may fit where this one did not.
            self.leave(blocks if turn.done() and not turn.cancelled() else 0)
            raise

    def leave(self, blocks: int) -> None:
        """Make room again."""
        self.used -= blocks
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if self.used + wanted > self.capacity:
                return
            self._waiting.popleft()
            self.used += wanted
            turn.set_result(None)


class Engine:
    """Serves requests over the three tiers.

    Args:
        config: Sizes, policies and pacing.
        blocks: The I/O.
        arena: Slots of the DRAM tier.
        recorder: Where everything is counted.
        clock: The rank's clock.
        on_failure: Called once for every I/O that failed.
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
        self._io = blocks
        self._arena = arena
        self._recorder = recorder
        self._clock = clock
        self._on_failure = on_failure
        self._gpu = LruSet(config.gpu_blocks)
        self._cpu = LruSet(config.cpu_blocks)
        self._storage = LruSet(config.storage_blocks)
        self._cpu_slots: dict[int, int] = {}
        self._cpu_ready: set[int] = set()
        self._stored: set[int] = set()
        self._deleting: dict[int, asyncio.Task[None]] = {}
        self._gate = WriteGate(config.write_queue_blocks)
        self._behind: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.in_flight = 0

    @property
    def write_queue_blocks(self) -> int:
        """Blocks that wait to be written or are being written."""
        return self._gate.used

    @property
    def stored_blocks(self) -> int:
        """Blocks on storage."""
        return len(self._stored)

    @property
    def cpu_blocks(self) -> int:
        """Blocks in the DRAM tier."""
        return len(self._cpu_ready)

    async def serve(self, request: Request, intended_ns: int) -> None:
        """Play one request, from its intended arrival to its store step. Latency counts from the intended arrival."""
        self.in_flight += 1
        try:
            found_blocks = await self._answer(request, intended_ns)
        finally:
            self.in_flight -= 1
        if found_blocks is not None:
            await self._store(request.block_ids, found_blocks)

    async def settle(self) -> None:
        """Wait until everything that was written behind has ended."""
        while self._behind:
            await asyncio.wait(set(self._behind))

    def stop(self) -> None:
        """Hand no further operation to the I/O threads."""
        self._stopping = True

    async def _answer(self, request: Request, intended_ns: int) -> int | None:
        """Look up, load, prefill and decode; returns how many blocks were found, None where the load failed."""
        config, clock = self._config, self._clock
        looked_up_ns = clock.now_ns()
        found = self._look_up(request.block_ids)
        hit_blocks = {tier: len(ids) for tier, ids in found.items()}
        self._recorder.took("lookup", looked_up_ns, clock.now_ns())
        load_ns = 0
        if found[Tier.CPU] or found[Tier.STORAGE]:
            load_ns = clock.now_ns()
            if not await self._load(found[Tier.CPU], found[Tier.STORAGE]):
                self._recorder.failed(clock.now_ns())
                return None
            loaded_ns = clock.now_ns()
            self._recorder.took("request_load", load_ns, loaded_ns)
            load_ns = loaded_ns - load_ns
        cached_tokens = self._cached_tokens(request, found)
        cached = sum(cached_tokens.values())
        await self._wait(config.pacing.prefill_ns(request.prompt_tokens - cached))
        first_token_ns = clock.now_ns()
        self._recorder.first_token(first_token_ns, first_token_ns - intended_ns)
        await self._wait(config.pacing.decode_ns(request.output_tokens))
        loaded_tokens = cached_tokens[Tier.CPU] + cached_tokens[Tier.STORAGE]
        self._recorder.answered(
            Answered(
                done_ns=clock.now_ns(),
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                prompt_blocks=len(request.block_ids),
                cached_tokens=cached_tokens,
                hit_blocks=hit_blocks,
                ttft_ns=first_token_ns - intended_ns,
                ttft_saved_ns=config.pacing.recompute_ns(loaded_tokens) - load_ns if loaded_tokens else None,
            )
        )
        return sum(hit_blocks.values())

    async def _wait(self, time_ns: int) -> None:
        if time_ns > 0:
            await self._clock.sleep_until(self._clock.now_ns() + time_ns)

    def _look_up(self, block_ids: Sequence[int]) -> dict[Tier, list[int]]:
        """The blocks of the longest leading run, by the fastest tier that holds each."""
        found: dict[Tier, list[int]] = {tier: [] for tier in Tier}
        if not self._config.prefix_caching:
            return found
        length = leading_run(block_ids, (self._gpu, self._cpu_ready, self._stored))
        for block_id in block_ids[:length]:
            if block_id in self._gpu:
                found[Tier.GPU].append(block_id)
            elif block_id in self._cpu_ready:
                found[Tier.CPU].append(block_id)
            else:
                found[Tier.STORAGE].append(block_id)
        return found

    def _cached_tokens(self, request: Request, found: dict[Tier, list[int]]) -> dict[Tier, int]:
        """Tokens that need no prefill, by tier. The last token of a prompt is always computed, even on a full hit."""
        tokens = {tier: len(ids) * self._config.block_tokens for tier, ids in found.items()}
        if sum(tokens.values()) >= request.prompt_tokens:
            last = request.block_ids[-1]
            tier = next(tier for tier, ids in found.items() if last in ids)
            tokens[tier] -= 1
        return tokens

    async def _load(self, in_cpu: Sequence[int], on_storage: Sequence[int]) -> bool:
        """Read and copy the blocks of a hit, in parallel; False where any failed."""
        for block_id in in_cpu:
            self._cpu.pin(block_id)
        for block_id in on_storage:
            self._storage.pin(block_id)
        try:
            chains = [(Op(OpKind.READ, block_id),) for block_id in on_storage]
            chains += [(Op(OpKind.COPY_OUT, block_id, self._cpu_slots[block_id]),) for block_id in in_cpu]
            return self._succeeded(await self._io.run(chains, Lane.LOAD))
        finally:
            for block_id in in_cpu:
                self._cpu.unpin(block_id)
            for block_id in on_storage:
                self._storage.unpin(block_id)

    async def _store(self, block_ids: tuple[int, ...], found_blocks: int) -> None:
        """Make the request's blocks recent in every tier and write the new ones behind.

        New are those behind the run that was found; of them, what storage holds already is skipped. Returns when the
        write queue has taken the others: a request holds its blocks until then.
        """
        recent = list(in_touch_order(block_ids, self._config.touch))
        self._demote(admit(self._gpu, recent), recent)
        for block_id in recent:
            self._storage.touch(block_id)
        computed = block_ids[found_blocks:]
        # Of a chain longer than the tier only the most recent part would outlive the step; the rest is not written.
        kept = set(recent[-self._config.storage_blocks :]) if self._config.storage_blocks else set()
        new = [block_id for block_id in computed if block_id not in self._storage]
        self._recorder.deduplicated(self._clock.now_ns(), len(computed) - len(new))
        wanted = [block_id for block_id in new if block_id in kept]
        self._dropped(len(new) - len(wanted))
        queued_ns = self._clock.now_ns()
        most = min(WRITE_BATCH_BLOCKS, self._gate.capacity)
        for begin in range(0, len(wanted), most):
            batch = wanted[begin : begin + most]
            await self._gate.enter(len(batch))
            self._write_behind(batch, kept, queued_ns)
        for block_id in recent:
            self._storage.touch(block_id)

    def _write_behind(self, block_ids: Sequence[int], own: set[int], queued_ns: int) -> None:
        """Take blocks that have passed the write gate into the storage tier and begin to write them.

        Room is made here, not when they were queued, so that what waits at the gate keeps nothing from eviction. No
        block of `own`, the request's, makes room for another of them.
        """
        fresh = [block_id for block_id in block_ids if block_id not in self._storage]
        self._recorder.deduplicated(self._clock.now_ns(), len(block_ids) - len(fresh))
        for block_id in own:
            self._storage.pin(block_id)
        taken = admit(self._storage, in_touch_order(fresh, self._config.touch))
        for block_id in own:
            self._storage.unpin(block_id)
        self._dropped(len(taken.refused))
        admitted = set(taken.admitted)
        batch = [block_id for block_id in fresh if block_id in admitted]
        self._gate.leave(len(block_ids) - len(batch))
        waits = {self._deleting[block_id] for block_id in batch if block_id in self._deleting}
        if taken.evicted:
            waits.add(self._delete(taken.evicted))
        for block_id in batch:
            self._storage.pin(block_id)
        if batch:
            self._spawn(self._write(batch, waits, queued_ns))

    def _demote(self, gpu: Admission, recent: Sequence[int]) -> None:
        """Move to DRAM what left the GPU tier, and make the request's blocks recent there."""
        refused = set(gpu.refused)
        offered = gpu.evicted + [block_id for block_id in recent if block_id in self._cpu or block_id in refused]
        taken = admit(self._cpu, offered)
        for victim in taken.evicted:
            self._cpu_ready.discard(victim)
            self._arena.free(self._cpu_slots.pop(victim))
        copies = []
        for block_id in taken.admitted:
            slot = self._arena.allocate()
            assert slot is not None, "the arena has a slot for every block of the tier"
            self._cpu_slots[block_id] = slot
            self._cpu.pin(block_id)
            copies.append(Op(OpKind.COPY_IN, block_id, slot))
        if copies:
            self._spawn(self._copy_in(copies))

    async def _copy_in(self, copies: Sequence[Op]) -> None:
        finished = await self._run([(op,) for op in copies])
        for done in finished:
            self._cpu.unpin(done.op.block_id)
            if done.error is None:
                self._cpu_ready.add(done.op.block_id)
        self._succeeded(finished)

    def _delete(self, victims: Sequence[int]) -> asyncio.Task[None]:
        """Begin to delete blocks from storage."""
        self._stored.difference_update(victims)
        task = self._spawn(self._delete_all(victims))
        for block_id in victims:
            self._deleting[block_id] = task
        return task

    async def _delete_all(self, victims: Sequence[int]) -> None:
        finished = await self._run([(Op(OpKind.DELETE, block_id),) for block_id in victims])
        for block_id in victims:
            self._deleting.pop(block_id, None)
        self._succeeded(finished)

    async def _write(self, block_ids: Sequence[int], waits: set[asyncio.Task[None]], queued_ns: int) -> None:
        if waits:
            await asyncio.wait(waits)
        finished = await self._run([(Op(OpKind.WRITE, block_id),) for block_id in block_ids])
        self._gate.leave(len(block_ids))
        written = [done.op.block_id for done in finished if done.error is None]
        self._dropped(len(block_ids) - len(written))
        for block_id in block_ids:
            self._storage.unpin(block_id)
        self._stored.update(written)
        self._recorder.written_behind(queued_ns, finished)
        self._succeeded(finished)

    def _dropped(self, blocks: int) -> None:
        """Count blocks that will not be stored; those that the end of the run cut off were in flight, not dropped."""
        if blocks and not self._stopping:
            self._recorder.dropped(self._clock.now_ns(), blocks)

    async def _run(self, chains: Sequence[Sequence[Op]]) -> list[OpDone]:
        """Do operations behind a request; none once the engine stops."""
        return [] if self._stopping else await self._io.run(chains, Lane.STORE)

    def _succeeded(self, finished: Sequence[OpDone]) -> bool:
        """Whether all went well; reports each failure."""
        failures = [done.error for done in finished if done.error is not None]
        for error in failures:
            if not isinstance(error, OperationSkippedError):
                self._on_failure(error)
        return not failures

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` behind the request; `settle` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return task
