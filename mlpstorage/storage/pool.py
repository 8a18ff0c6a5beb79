"""The threads that do blocking I/O."""

import queue
import threading
import time
from collections.abc import Sequence

from mlpstorage.config import IoPriority, Verify
from mlpstorage.storage.affinity import SharedCpu
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore, Moved
from mlpstorage.storage.chains import ChainQueues, QueuedChain, skipped
from mlpstorage.storage.ops import Chain, Lane, OnDone, Op, OpDone, OpKind
from mlpstorage.storage.payload import PagedMemory, Payload, PayloadBuffer

QUICK_COPY_BYTES = 512 << 10
"""Copies up to this size take less time than to have another thread, or another CPU, do them: 0.1 ms, at 5 GB/s."""

_COPIES = frozenset({OpKind.COPY_IN, OpKind.COPY_OUT})
_NOTHING_MOVED = Moved()
_NO_BYTES = memoryview(b"")


class IoPool:
    """A fixed set of threads over one store; each owns a buffer, made when it is first needed. An `ops.IoEngine`.

    Which chain a thread takes next is said at `ChainQueues`.

    Args:
        store: Where objects are.
        payload: What is in them.
        arena: Slots to copy to and from, `payload.stored_bytes` for each part of a block; None without a DRAM tier.
        threads: How many operations are under way at once, at most.
        priority: Which chain a thread takes next.
        cpu: The CPU that the threads share for all but large copies; None leaves them where the system puts them.
    """

    __slots__ = ("_arena", "_cpu", "_payload", "_queues", "_roaming_kinds", "_store", "_threads", "_tokens")

    def __init__(
        self,
        store: BlockStore,
        payload: Payload,
        arena: DramArena | None,
        threads: int,
        priority: IoPriority = IoPriority.SPLIT,
        cpu: SharedCpu | None = None,
    ) -> None:
        self._store = store
        self._payload = payload
        self._arena = arena
        self._cpu = cpu
        self._roaming_kinds = _COPIES if payload.stored_bytes > QUICK_COPY_BYTES else frozenset[OpKind]()
        self._queues = ChainQueues(priority)
        # Idle threads wait for a token, which costs less than a condition variable. One lies there as long as chains
        # are queued and nobody is about to take them: whoever queues chains, or takes one of several, puts it. So a
        # thread wakes the next before its own I/O begins, and where I/O takes no time it alone does all of a batch. A
        # token without a chain is harmless.
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(self._queues.order(number, threads),),
                name=f"io-{number}",
                daemon=True,  # an I/O that never returns must not keep a failed process alive
            )
            for number in range(threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, chains: Sequence[Chain], lane: Lane, on_done: OnDone) -> object:
        """Queue a batch: each chain is done in order by one thread, different chains by any threads at once.

        When all are finished `on_done` is called once, in an I/O thread (or in the one that cancels), with what became
        of every operation, chain after chain. After a failed operation the rest of its chain is skipped. Returns what
        `cancel` takes.

        Raises:
            RuntimeError: The pool is closed.
        """
        batch = self._queues.put(chains, lane, on_done)
        self._wake_one()
        return batch

    def queued_ops(self, lane: Lane) -> int:
        """Operations of a lane that wait for a thread."""
        return self._queues.queued_ops(lane)

    def cancel(self, batch: object) -> None:
        """Finish every chain of a batch that no thread has begun; its operations are reported as skipped."""
        self._queues.cancel(batch)

    def cancel_queued(self) -> None:
        """Finish every chain that no thread has begun; its operations are reported as skipped."""
        self._queues.cancel_all()

    def close(self) -> None:
        """Cancel what is queued, wait for what is running, and end the threads. Calling it again does nothing."""
        self._queues.close()
        for _ in self._threads:
            self._tokens.put(False)
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def _work(self, order: tuple[int, ...]) -> None:
        queues = self._queues
        worker = Worker(self._store, self._payload, self._arena)
        if self._cpu is not None:
            self._cpu.enter()
        while self._tokens.get():
            while (item := queues.take(order)) is not None:
                if queues.waiting:
                    self._wake_one()
                queues.finish(item, self._run(worker, item))

    def _run(self, worker: "Worker", item: QueuedChain) -> list[OpDone]:
        """Do a chain, on any CPU if a large copy is part of it: copies need no interpreter lock."""
        chain, queued_ns = item.chain, item.batch.queued_ns
        if self._cpu is None or not any(op.kind in self._roaming_kinds for op in chain):
            return worker.run_chain(chain, queued_ns)
        self._cpu.leave()
        try:
            return worker.run_chain(chain, queued_ns)
        finally:
            self._cpu.enter()

    def _wake_one(self) -> None:
        """Have one more thread look for chains, unless one is about to."""
        if self._tokens.empty():
            self._tokens.put(True)


class Worker:
    """What one thread needs to do operations, and what is known of the one that it is doing."""

    __slots__ = (
        "_arena",
        "_buffer",
        "_bytes_matter",
        "_do",
        "_end_ns",
        "_moved",
        "_payload",
        "_payload_ns",
        "_start_ns",
        "_store",
    )

    def __init__(self, store: BlockStore, payload: Payload, arena: DramArena | None) -> None:
        self._store = store
        self._payload = payload
        self._arena = arena
        self._buffer: PayloadBuffer | None = None
        # A store that keeps no bytes needs none made, where nobody looks at them either.
        self._bytes_matter = store.capabilities.holds_data or payload.verify is not Verify.OFF
        self._start_ns = 0
        self._end_ns = 0
        self._payload_ns = 0
        self._moved = _NOTHING_MOVED
        self._do = {
            OpKind.READ: self._read,
            OpKind.WRITE: self._write,
            OpKind.DELETE: self._delete,
            OpKind.COPY_IN: self._copy_in,
            OpKind.COPY_OUT: self._copy_out,
            OpKind.SYNC: self._sync,
        }

    def run_chain(self, chain: Chain, queued_ns: int) -> list[OpDone]:
        """Do a chain's operations in order, up to the first that fails."""
        done: list[OpDone] = []
        failed = False
        for op in chain:
            if failed:
                done.append(skipped(op, queued_ns, "an operation before it in its chain failed"))
            else:
                one = self._run(op, queued_ns)
                failed = one.error is not None
                done.append(one)
        return done

    def _run(self, op: Op, queued_ns: int) -> OpDone:
        self._start_ns = time.perf_counter_ns()
        self._end_ns = self._payload_ns = 0
        self._moved = _NOTHING_MOVED
        error: Exception | None = None
        verified_bytes = 0
        try:
            verified_bytes = self._do[op.kind](op)
        except Exception as caught:  # noqa: BLE001 - whatever it is, the batch must hear of it and the thread live on
            error = caught
        end_ns = self._end_ns or time.perf_counter_ns()
        moved = self._moved
        return OpDone(
            op,
            queued_ns,
            self._start_ns,
            end_ns,
            moved.direct,
            verified_bytes,
            error,
            self._payload_ns,
            moved.page_cache_bytes,
            moved.retries if error is None else moved.retries + getattr(error, "retries", 0),
        )

    def _read(self, op: Op) -> int:
        memory = (self._buffer or self._new_buffer()).to_read().memory if self._bytes_matter else _NO_BYTES
        self._start_ns = time.perf_counter_ns()
        self._moved = self._store.read(op.object_id, memory)
        self._end_ns = time.perf_counter_ns()
        return self._check(op) if self._bytes_matter else 0

    def _write(self, op: Op) -> int:
        memory = self._stamp(op).memory if self._bytes_matter else _NO_BYTES
        self._start_ns = time.perf_counter_ns()
        self._moved = self._store.write(op.object_id, memory)
        self._end_ns = time.perf_counter_ns()
        return 0

    def _delete(self, op: Op) -> int:
        self._start_ns = time.perf_counter_ns()
        self._moved = self._store.delete(op.object_id)
        self._end_ns = time.perf_counter_ns()
        if self._payload.writes is not None:
            self._payload.writes.forget(op.object_id)
        return 0

    def _sync(self, op: Op) -> int:
        self._start_ns = time.perf_counter_ns()
        self._store.sync(op.object_id)
        self._end_ns = time.perf_counter_ns()
        return 0

    def _copy_in(self, op: Op) -> int:
        part = self._slot_part(op)
        payload = self._stamp(op)
        self._start_ns = time.perf_counter_ns()
        payload.copy_to(part)
        self._end_ns = time.perf_counter_ns()
        return 0

    def _copy_out(self, op: Op) -> int:
        part = self._slot_part(op)
        payload = (self._buffer or self._new_buffer()).to_read()
        self._start_ns = time.perf_counter_ns()
        payload.copy_from(part)
        self._end_ns = time.perf_counter_ns()
        # A slot that holds another object is an error, but what is right here says nothing about storage.
        self._check(op)
        return 0

    def _stamp(self, op: Op) -> PagedMemory:
        buffer = self._buffer or self._new_buffer()
        begin_ns = time.thread_time_ns()
        payload = buffer.to_write(op.object_id, numbered=op.kind is OpKind.WRITE)
        self._payload_ns = time.thread_time_ns() - begin_ns
        return payload

    def _check(self, op: Op) -> int:
        buffer = self._buffer or self._new_buffer()
        begin_ns = time.thread_time_ns()
        try:
            return buffer.check(op.object_id, numbered=op.kind is OpKind.READ)
        finally:
            self._payload_ns = time.thread_time_ns() - begin_ns

    def _new_buffer(self) -> PayloadBuffer:
        self._buffer = self._payload.new_buffer()
        return self._buffer

    def _slot_part(self, op: Op) -> memoryview:
        if self._arena is None:
            raise ValueError("there is no DRAM arena to copy to or from")
        parts = self._payload.keys.parts
        return self._arena.view(op.slot, op.object_id % parts, parts)
