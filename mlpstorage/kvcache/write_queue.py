"""The bounded queue of new blocks on their way to storage."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence

from mlpstorage.config import WriteOverflow
from mlpstorage.kvcache.block_io import Behind, end_of
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.index import in_touch_order
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.storage_tier import StorageTier, Taken
from mlpstorage.measure.clock import NS, Clock


class WriteGate:
    """A bound on the blocks that wait to be written: who would exceed it waits, first come first served.

    Args:
        capacity: Most blocks at once.
        limit: Most blocks as things are now, at least one; None for no bound but the capacity.
    """

    def __init__(self, capacity: int, limit: Callable[[], int | None] = lambda: None) -> None:
        self.capacity = capacity
        self.used = 0
        self._limit = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, blocks: int) -> None:
        """Return when `blocks` more fit; at most `capacity` at once."""
        if not self._waiting and self._fits(blocks):
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

    def enter_some(self, blocks: int) -> int:
        """Enter as many of `blocks` as fit now; returns how many."""
        limit = self._limit()
        most = self.capacity if limit is None else min(self.capacity, limit)
        entered = min(blocks, max(most - self.used, 0))
        self.used += entered
        return entered

    def leave(self, blocks: int) -> None:
        """Make room again."""
        self.used -= blocks
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if not self._fits(wanted):
                return
            self._waiting.popleft()
            self.used += wanted
            turn.set_result(None)

    def _fits(self, blocks: int) -> bool:
        if self.used + blocks > self.capacity:
            return False
        limit = self._limit()
        # A batch that alone exceeds what the time allows passes an empty queue: else it would wait for ever.
        return limit is None or not self.used or self.used + blocks <= limit


class WriteRate:
    """Blocks written in a second of the time in which any were being written.

    Args:
        clock: The rank's clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._under_way = 0
        self._written = 0
        self._busy_ns = 0
        self._since_ns = 0

    def begin(self, blocks: int) -> None:
        """Blocks have been handed to the I/O."""
        if not self._under_way:
            self._since_ns = self._clock.now_ns()
        self._under_way += blocks

    def end(self, blocks: int, written: int) -> None:
        """Of blocks that were handed to the I/O some were written, and none is under way any more."""
        self._written += written
        self._under_way -= blocks
        if not self._under_way:
            self._busy_ns += self._clock.now_ns() - self._since_ns

    def blocks_in(self, time_s: float) -> int | None:
        """How many blocks are written in `time_s` at the rate so far; None where there is none yet."""
        busy_ns = self._busy_ns + (self._clock.now_ns() - self._since_ns if self._under_way else 0)
        if not self._written or not busy_ns:
            return None
        return int(self._written * time_s * NS / busy_ns)


class WriteQueue:
    """Hands new blocks to storage in batches, and holds back or drops what is too much.

    Args:
        config: Bounds and policies.
        tier: Where the blocks go.
        behind: Work beside the requests.
        recorder: Where drops and latencies are counted.
        clock: The rank's clock.
    """

    def __init__(
        self, config: EngineConfig, *, tier: StorageTier, behind: Behind, recorder: Recorder, clock: Clock
    ) -> None:
        self._config = config
        self._tier = tier
        self._behind = behind
        self._recorder = recorder
        self._clock = clock
        self._rate = WriteRate(clock)
        self._gate = WriteGate(config.write_queue_blocks, self._limit_blocks)
        self._puts = itertools.count()
        self._collected: dict[int, int] = {}
        self._chains: dict[int, list[int]] = {}
        self._first_ns: int | None = None
        self._timer: asyncio.Task[None] | None = None

    @property
    def blocks(self) -> int:
        """Blocks that wait to be written or are being written."""
        return self._gate.used

    def lacking(self, block_ids: list[int]) -> list[int]:
        """Those that do not wait for the end of the interval, in their order."""
        collected = self._collected
        return [block_id for block_id in block_ids if block_id not in collected] if collected else block_ids

    async def put(self, block_ids: Sequence[int], own: Collection[int]) -> None:
        """Queue blocks of a chain; returns once the queue has taken them, or has dropped what does not fit.

        Args:
            block_ids: In the order of the chain.
            own: Blocks of the chain, none of which makes room for another.
        """
        queued_ns = self._clock.now_ns()
        drops = self._config.write_overflow is WriteOverflow.DROP
        if drops:
            entered = self._gate.enter_some(len(block_ids))
            self.dropped(len(block_ids) - entered)
            block_ids = block_ids[:entered]
        number = next(self._puts)
        most = self._batch_blocks
        for begin in range(0, len(block_ids), most):
            batch = block_ids[begin : begin + most]
            if not drops:
                await self._gate.enter(len(batch))
            if self._config.write_interval_s:
                self._collect(batch, number, queued_ns)
            else:
                self._hand_over(dict.fromkeys(await self._not_written(batch), queued_ns), own)

    def take(self, block_ids: Sequence[int], own: Collection[int]) -> list[Taken]:
        """Have the tier take blocks of a chain at once, to be written later by `write`; see `put` for the arguments."""
        batches = []
        for begin in range(0, len(block_ids), self._batch_blocks):
            batch = block_ids[begin : begin + self._batch_blocks]
            taken = self._tier.take(batch, own)
            self.dropped(len(batch) - len(taken.block_ids))
            if taken.block_ids:
                batches.append(taken)
        return batches

    def write(self, batches: Sequence[Taken]) -> None:
        """Begin to write what was taken, each batch when it can be and passes the gate."""
        queued_ns = self._clock.now_ns()
        for taken in batches:
            self._behind.spawn(self._write_behind_gate(taken, queued_ns))

    def give_up(self, batches: Sequence[Taken]) -> None:
        """Do not write what was taken."""
        for taken in batches:
            self._tier.give_up(taken)

    async def _write_behind_gate(self, taken: Taken, queued_ns: int) -> None:
        if taken.waits:
            # Before the gate: what stands in it waits for nothing but its own write.
            await asyncio.wait(taken.waits)
        await self._gate.enter(len(taken.block_ids))
        self._rate.begin(len(taken.block_ids))
        await self._write(taken, dict.fromkeys(taken.block_ids, queued_ns))

    def stop(self) -> None:
        """Hand nothing over any more; what has collected stays in flight."""
        if self._timer is not None:
            self._timer.cancel()

    def dropped(self, blocks: int) -> None:
        """Count blocks that will not be stored; those that the end of the run cut off were in flight, not dropped."""
        if blocks and not self._behind.stopping:
            self._recorder.dropped(self._clock.now_ns(), blocks)

    def deduplicated(self, blocks: int) -> None:
        """Count blocks that need no write of their own."""
        if blocks:
            self._recorder.deduplicated(self._clock.now_ns(), blocks * self._config.kv_ranks)

    @property
    def _batch_blocks(self) -> int:
        return min(self._config.write_batch, self._gate.capacity)

    def _limit_blocks(self) -> int | None:
        """Blocks of which the last would wait for its write no longer than it should, at the rate so far."""
        limit_s = self._config.write_queue_s
        ahead = None if limit_s is None else self._rate.blocks_in(limit_s)
        return None if ahead is None else ahead + 1

    def _collect(self, block_ids: Sequence[int], number: int, queued_ns: int) -> None:
        """Keep blocks for the end of the interval. The first interval begins with the first block."""
        fresh = self.lacking(self._tier.lacking(block_ids))
        self.deduplicated(len(block_ids) - len(fresh))
        if self._behind.stopping:
            fresh = []
        self._gate.leave(len(block_ids) - len(fresh))
        if not fresh:
            return
        self._collected.update(dict.fromkeys(fresh, queued_ns))
        self._chains.setdefault(number, []).extend(fresh)
        if self._timer is None:
            self._timer = self._behind.spawn(self._hand_over_collected())

    async def _hand_over_collected(self) -> None:
        interval_ns = round(self._config.write_interval_s * NS)
        now_ns = self._clock.now_ns()
        if self._first_ns is None:
            self._first_ns = now_ns
        await self._clock.sleep_until(now_ns + interval_ns - (now_ns - self._first_ns) % interval_ns)
        self._timer = None
        collected, self._collected = self._collected, {}
        chains, self._chains = self._chains, {}
        block_ids = list(collected)
        most = self._batch_blocks
        for begin in range(0, len(block_ids), most):
            batch = await self._not_written(block_ids[begin : begin + most])
            self._hand_over({block_id: collected[block_id] for block_id in batch}, collected)
        for chain in chains.values():
            self._tier.touch(in_touch_order(chain, self._config.touch))

    async def _not_written(self, batch: Sequence[int]) -> Sequence[int]:
        """Those of blocks that have passed the gate which no other rank has written; the others leave it."""
        written = await self._tier.written_by_others(batch)
        if not written:
            return batch
        self.deduplicated(len(written))
        self._gate.leave(len(written))
        return [block_id for block_id in batch if block_id not in written]

    def _hand_over(self, batch: dict[int, int], own: Collection[int]) -> None:
        """Take blocks that have passed the gate into the storage tier and begin to write them.

        Room is made here, not when they were queued, so that what waits at the gate keeps nothing from eviction.

        Args:
            batch: When each block was queued, in nanoseconds.
            own: See `put`.
        """
        fresh = self._tier.lacking(batch)
        self.deduplicated(len(batch) - len(fresh))
        taken = self._tier.take(fresh, own)
        self.dropped(len(fresh) - len(taken.block_ids))
        self._gate.leave(len(batch) - len(taken.block_ids))
        if taken.block_ids:
            self._rate.begin(len(taken.block_ids))
            queued_ns = {block_id: batch[block_id] for block_id in taken.block_ids}
            self._behind.spawn(self._write_in_gate(taken, queued_ns))

    async def _write_in_gate(self, taken: Taken, queued_ns: dict[int, int]) -> None:
        for before in taken.waits:
            await end_of(before)
        await self._write(taken, queued_ns)

    async def _write(self, taken: Taken, queued_ns: dict[int, int]) -> None:
        written_ns = await self._tier.write(taken)
        self._rate.end(len(queued_ns), len(written_ns))
        self._gate.leave(len(queued_ns))
        self.dropped(len(queued_ns) - len(written_ns))
        self._recorder.took_each("write_behind", [(queued_ns[one], ended_ns) for one, ended_ns in written_ns.items()])
