"""The I/O engine over io_uring: one thread keeps many transfers under way, where `storage.pool` has a thread for each.

That thread, which owns the ring, does itself what is quick: it opens the files that are read, checks and stamps, copies
small objects. To have another thread do a thing costs 0.1 ms of processor time; that is for what can take longer, while
no transfer would be begun or found complete: syncs, copies of large objects and, where a store makes a file of each
object, writes and deletes, which threads then do as those of `storage.pool` do.

Reads of files on a network file system, where opening one is a round trip, are better done by `storage.pool`.
"""

import errno
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import cast

from mlpstorage.config import PAGE_BYTES, IoPriority
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore, Moved
from mlpstorage.storage.chains import ChainQueues, QueuedChain, skipped
from mlpstorage.storage.descriptor import DescriptorStore, Transfer, failed, truncated
from mlpstorage.storage.ops import Chain, Lane, OnDone, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import QUICK_COPY_BYTES, Worker
from mlpstorage.storage.ring import Ring, probe_uring

__all__ = ["UringEngine", "probe_uring"]

_TRANSFERS = frozenset({OpKind.READ, OpKind.WRITE})

_EVENT_BYTES = 8
"""Length of an eventfd's counter."""


class UringEngine:
    """An `ops.IoEngine` over a store whose objects are parts of files.

    Up to `depth` chains are under way, each with a buffer, made when it is first needed. Priorities are those of
    `ChainQueues`, which see as many takers; with a depth of one the lanes take turns.

    Args:
        store: Where objects are; a block store.
        payload: What is in them.
        arena: Slots to copy to and from; None without a DRAM tier.
        depth: How many operations are under way at once, at most.
        priority: Which chain is begun next.
    """

    __slots__ = (
        "_blocking",
        "_blocking_kinds",
        "_broken",
        "_completed",
        "_event",
        "_event_lock",
        "_free",
        "_jobs",
        "_queues",
        "_returned",
        "_ring",
        "_slots",
        "_thread",
        "_turns",
    )

    def __init__(
        self,
        store: DescriptorStore,
        payload: Payload,
        arena: DramArena | None,
        depth: int,
        priority: IoPriority = IoPriority.SPLIT,
    ) -> None:
        self._queues = ChainQueues(priority)
        self._slots = [_Slot(number, store, payload, arena) for number in range(depth)]
        self._free = self._slots[::-1]
        self._turns = 0
        self._blocking_kinds = _blocking_kinds(store)
        self._ring = Ring(depth)
        self._broken: OSError | None = None
        # What the ring's thread will look at: results of transfers and when they were found, slots whose job is done.
        self._completed: deque[tuple[_Slot, int, int]] = deque()
        self._returned: deque[_Slot] = deque()
        self._jobs: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        # An eventfd counts all that the ring's thread waits for: completions, batches, jobs done, the end.
        self._event = -1
        self._event_lock = threading.Lock()
        # Daemons: an I/O that never returns must not keep a failed process alive.
        self._thread = threading.Thread(target=self._work, name="io-ring", daemon=True)
        self._blocking = [
            threading.Thread(target=self._do_jobs, name=f"io-blocking-{number}", daemon=True) for number in range(depth)
        ]

    def start(self) -> None:
        """Open the ring and start the threads.

        Raises:
            ImportError: The package of the ring is not there; see `probe_uring`.
            OSError: The kernel refuses a ring; likewise.
        """
        event = os.eventfd(1, os.EFD_CLOEXEC)  # 1: chains may be queued already
        try:
            self._ring.open(event)
        except BaseException:
            self._ring.close()
            os.close(event)
            raise
        self._event = event
        for thread in (self._thread, *self._blocking):
            thread.start()

    def submit(self, chains: Sequence[Chain], lane: Lane, on_done: OnDone) -> object:
        """See `IoEngine.submit`; `on_done` is called in a thread of the engine, or in the one that cancels.

        Raises:
            RuntimeError: The engine is closed.
        """
        batch = self._queues.put(chains, lane, on_done)
        self._wake()
        return batch

    def cancel(self, batch: object) -> None:
        """See `IoEngine.cancel`."""
        self._queues.cancel(batch)

    def cancel_queued(self) -> None:
        """See `IoEngine.cancel_queued`."""
        self._queues.cancel_all()

    def queued_ops(self, lane: Lane) -> int:
        """See `IoEngine.queued_ops`."""
        return self._queues.queued_ops(lane)

    def close(self) -> None:
        """See `IoEngine.close`."""
        self._queues.close()
        self._wake()
        threads = (self._thread, *self._blocking)
        if self._thread.ident is None or threading.current_thread() in threads:
            return  # never started; or told to by a report, and they end after it
        for thread in threads:
            thread.join()

    def _wake(self) -> None:
        with self._event_lock:
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def _work(self) -> None:
        """What the ring's thread does."""
        while not self._queues.closed or len(self._free) < len(self._slots):
            os.read(self._event, _EVENT_BYTES)  # not eventfd_read, which a signal would end with an error
            self._go_on()
        for _ in self._blocking:
            self._jobs.put(None)
        self._ring.close()
        with self._event_lock:
            event, self._event = self._event, -1
        os.close(event)

    def _do_jobs(self) -> None:
        """What each of the other threads does: a slot's operations, and the next ones too, while they are its kind."""
        while (slot := self._jobs.get()) is not None:
            slot.run()
            while (op := self._next(slot)) is not None and op.kind in self._blocking_kinds:
                slot.run()
            self._returned.append(slot)
            self._wake()

    def _go_on(self) -> None:
        """Do all that can be done, until there is nothing left but to wait."""
        while True:
            self._fill()
            # Before each step, so that the time of a transfer contains the checking of one other object at most.
            for tag, result in self._ring.completions():
                self._completed.append((self._slots[tag], result, time.perf_counter_ns()))
            if self._completed:
                slot, result, now_ns = self._completed.popleft()
                if slot.moved(result, now_ns) or not self._submit(slot):
                    slot.end()
                    self._proceed(slot)
            elif self._returned:
                self._proceed(self._returned.popleft())
            else:
                return

    def _fill(self) -> None:
        """Give queued chains to free slots."""
        while self._free and self._next(self._free[-1]) is not None:
            self._proceed(self._free.pop())

    def _proceed(self, slot: "_Slot") -> None:
        """Begin the next operation of a slot, or free it."""
        while (op := self._next(slot)) is not None:
            if op.kind in self._blocking_kinds:
                self._jobs.put(slot)
                return
            if op.kind not in _TRANSFERS:
                slot.run()
            elif slot.begin():
                if self._submit(slot):
                    return
                slot.end()
        self._free.append(slot)

    def _next(self, slot: "_Slot") -> Op | None:
        """The next operation of a slot's chain or, after its last one, of the next chain; None where none is queued."""
        while True:
            if slot.has_chain:
                op = slot.next_op()
                if op is not None:
                    return op
                self._queues.finish(*slot.leave())
            item = self._queues.take(self._order(slot))
            if item is None:
                return None
            slot.enter(item)

    def _order(self, slot: "_Slot") -> tuple[int, ...]:
        if len(self._slots) > 1:
            return self._queues.order(slot.number, len(self._slots))
        self._turns += 1
        return self._queues.order(self._turns % 2, 2)

    def _submit(self, slot: "_Slot") -> bool:
        """Hand to the ring what is missing of an object; False where that fails."""
        if self._broken is None:
            try:
                slot.submit(self._ring)
            except OSError as error:
                # What the ring did not take, it would take with the next transfer, when the memory is another one's.
                self._broken = error
            else:
                return True
        slot.fail(self._broken)
        return False


class _Slot(Worker):
    """A chain under way, its buffer, and the transfer that is being done.

    Attributes:
        has_chain: Whether a chain is under way.
        number: Of the slot, and tag of its transfers.
        op: The operation that is being done.
    """

    __slots__ = (
        "_done",
        "_done_bytes",
        "_error",
        "_files",
        "_item",
        "_kept",
        "_memory",
        "_transfer",
        "has_chain",
        "number",
        "op",
    )

    op: Op
    _item: QueuedChain
    _memory: memoryview

    def __init__(self, number: int, store: DescriptorStore, payload: Payload, arena: DramArena | None) -> None:
        super().__init__(cast("BlockStore", store), payload, arena)
        self.has_chain = False
        self.number = number
        self._files = store
        self._done: list[OpDone] = []
        self._done_bytes = 0
        self._error: Exception | None = None
        self._kept: object = None
        self._transfer: Transfer | None = None

    def enter(self, item: QueuedChain) -> None:
        """Take a chain."""
        self._item = item
        self._done = []
        self.has_chain = True

    def leave(self) -> tuple[QueuedChain, list[OpDone]]:
        """Let go of the chain; returns it, and what became of it."""
        self.has_chain = False
        return self._item, self._done

    def next_op(self) -> Op | None:
        """The operation to be done next, None after the last one; what follows a failed one is skipped."""
        chain, done = self._item.chain, self._done
        if done and done[-1].error is not None:
            queued_ns = self._item.batch.queued_ns
            done += [skipped(op, queued_ns, "an operation before it in its chain failed") for op in chain[len(done) :]]
        if len(done) == len(chain):
            return None
        self.op = chain[len(done)]
        return self.op

    def run(self) -> None:
        """Do an operation without the ring."""
        self._done += self.run_chain((self.op,), self._item.batch.queued_ns)

    def begin(self) -> bool:
        """Begin a transfer; False where that failed."""
        op = self.op
        self._start_ns = time.perf_counter_ns()
        self._end_ns = self._payload_ns = self._done_bytes = 0
        self._moved = Moved()
        self._error = None
        try:
            if op.kind is OpKind.READ:
                self._memory = (self._buffer or self._new_buffer()).to_read().memory
                begin = self._files.begin_read
            else:
                self._memory = self._stamp(op).memory
                begin = self._files.begin_write
            self._start_ns = time.perf_counter_ns()
            self._transfer = begin(op.object_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, the batch must hear of it and the thread live on
            self._report(error)
        return self._transfer is not None

    def submit(self, ring: Ring) -> None:
        """Hand to the ring what is missing of the object.

        Raises:
            OSError: It was not taken.
        """
        transfer, done_bytes = self._begun(), self._done_bytes
        move = ring.read if self.op.kind is OpKind.READ else ring.write
        part = self._memory[done_bytes:] if done_bytes else self._memory
        self._kept = move(transfer.descriptor, part, transfer.offset_bytes + done_bytes, self.number)

    def moved(self, result: int, now_ns: int) -> bool:
        """Take note of what the ring says; False where the rest of the object is still to be moved."""
        transfer = self._begun()
        self._end_ns = now_ns
        self._done_bytes += max(result, 0)
        if self._done_bytes == self._files.stored_bytes:
            return True
        if result < 0:
            self._error = failed(self._files, transfer, -result)
        elif self.op.kind is OpKind.WRITE:
            self._error = None if result else failed(self._files, transfer, errno.EIO)
        elif not result or (transfer.moved.direct and self._done_bytes % PAGE_BYTES):
            # After an odd number of bytes comes the file's end, and direct I/O could not go on from there anyway.
            self._error = truncated(self._files, transfer, self._done_bytes)
        return self._error is not None

    def fail(self, error: Exception) -> None:
        """Have the transfer end with an error that is not its own."""
        self._end_ns = time.perf_counter_ns()
        self._error = error

    def end(self) -> None:
        """End the transfer: check what was read, or have what was written found."""
        transfer, error, verified_bytes = self._begun(), self._error, 0
        self._transfer = self._kept = None
        try:
            if self.op.kind is OpKind.READ:
                self._files.end_read(transfer)
                if error is None:
                    self._moved = transfer.moved
                    verified_bytes = self._check(self.op)
            elif error is None:
                self._files.commit_write(transfer)
                self._end_ns = time.perf_counter_ns()
                self._moved = transfer.moved
            else:
                self._files.abort_write(transfer)
        except Exception as caught:  # noqa: BLE001 - whatever it is, the batch must hear of it and the thread live on
            error = error or caught
        self._report(error, verified_bytes)

    def _begun(self) -> Transfer:
        assert self._transfer is not None, "a transfer that was begun"
        return self._transfer

    def _report(self, error: Exception | None, verified_bytes: int = 0) -> None:
        moved, end_ns = self._moved, self._end_ns or time.perf_counter_ns()
        done = OpDone(
            self.op,
            self._item.batch.queued_ns,
            self._start_ns,
            end_ns,
            moved.direct,
            verified_bytes,
            error,
            self._payload_ns,
            moved.page_cache_bytes,
            moved.retries + getattr(error, "retries", 0),
        )
        self._done.append(done)


def _blocking_kinds(store: DescriptorStore) -> frozenset[OpKind]:
    """What is done by other threads than the ring's."""
    kinds = {OpKind.SYNC}
    if not store.prompt:
        kinds |= {OpKind.WRITE, OpKind.DELETE}
    if store.stored_bytes > QUICK_COPY_BYTES:
        kinds |= {OpKind.COPY_IN, OpKind.COPY_OUT}
    return frozenset(kinds)
