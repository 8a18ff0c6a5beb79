"""The threads that do blocking I/O, and the queues in front of them."""

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.ops import Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload, PayloadBuffer

Chain = Sequence[Op]
"""Operations that are done in order, by one thread."""

OnDone = Callable[[list[OpDone]], None]


class OperationSkippedError(Exception):
    """An operation was not begun: one before it in its chain failed, or it was cancelled."""


class _Batch:
    """Chains that were handed over together and are reported together."""

    __slots__ = ("done", "on_done", "queued_ns", "remaining")

    def __init__(self, chains: int, on_done: OnDone, queued_ns: int) -> None:
        self.done: list[list[OpDone]] = [[] for _ in range(chains)]
        self.remaining = chains
        self.on_done = on_done
        self.queued_ns = queued_ns


_Item = tuple[_Batch, int, Chain]


class IoPool:
    """A fixed set of threads over one store; each owns a buffer of one object, made when it is first needed.

    Half of the threads, and at least one, prefer the load lane, the others the store lane; each takes from the other
    lane when its own is empty.
    """

    __slots__ = ("_arena", "_closed", "_lock", "_payload", "_queued_ops", "_queues", "_store", "_threads", "_tokens")

    def __init__(self, store: BlockStore, payload: Payload, arena: DramArena | None, threads: int) -> None:
        self._store = store
        self._payload = payload
        self._arena = arena
        self._closed = False
        self._lock = threading.Lock()
        self._queues: tuple[deque[_Item], deque[_Item]] = (deque(), deque())
        self._queued_ops = [0, 0]
        # One token a queued chain. Idle threads wait for a token, which costs less than a condition variable; a
        # token without a chain (cancelled) is harmless, a chain without a token cannot be, as tokens follow chains.
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        loaders = (threads + 1) // 2
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(Lane.LOAD if number < loaders else Lane.STORE,),
                name=f"io-{number}",
                daemon=True,  # an I/O that never returns must not keep a failed process alive
            )
            for number in range(threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, chains: Sequence[Chain], lane: Lane, on_done: OnDone) -> None:
        """Queue a batch: each chain is done in order by one thread, different chains by any threads at once.

        When all are finished `on_done` is called once, in an I/O thread (or in the one that cancels), with what became
        of every operation, chain after chain. After a failed operation the rest of its chain is skipped.

        Raises:
            RuntimeError: The pool is closed.
        """
        items = chains or ((),)
        batch = _Batch(len(items), on_done, time.perf_counter_ns())
        with self._lock:
            if self._closed:
                raise RuntimeError("the I/O pool is closed")
            self._queues[lane].extend((batch, number, chain) for number, chain in enumerate(items))
            self._queued_ops[lane] += sum(map(len, items))
        for _ in items:
            self._tokens.put(True)

    def queued_ops(self, lane: Lane) -> int:
        """Operations of a lane that wait for a thread."""
        return self._queued_ops[lane]

    def cancel_queued(self) -> None:
        """Finish every chain that no thread has begun; its operations are reported as skipped."""
        with self._lock:
            items = [item for waiting in self._queues for item in waiting]
            for lane, waiting in enumerate(self._queues):
                waiting.clear()
                self._queued_ops[lane] = 0
        for batch, number, chain in items:
            done = [_skipped(op, batch.queued_ns, "it was cancelled before it began") for op in chain]
            self._finish(batch, number, done)

    def close(self) -> None:
        """Cancel what is queued, wait for what is running, and end the threads. Calling it again does nothing."""
        with self._lock:
            self._closed = True
        self.cancel_queued()
        for _ in self._threads:
            self._tokens.put(False)
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def _work(self, preferred: Lane) -> None:
        take_token = self._tokens.get
        worker = _Worker(self._store, self._payload, self._arena)
        own, other = preferred, Lane(1 - preferred)
        own_queue, other_queue = self._queues[own], self._queues[other]
        while take_token():
            with self._lock:
                if own_queue:
                    batch, number, chain = own_queue.popleft()
                    self._queued_ops[own] -= len(chain)
                elif other_queue:
                    batch, number, chain = other_queue.popleft()
                    self._queued_ops[other] -= len(chain)
                else:
                    continue
            self._finish(batch, number, worker.run_chain(chain, batch.queued_ns))

    def _finish(self, batch: _Batch, number: int, done: list[OpDone]) -> None:
        batch.done[number] = done
        with self._lock:
            batch.remaining -= 1
            unfinished = batch.remaining
        if unfinished:
            return
        try:
            batch.on_done([one for chain in batch.done for one in chain])
        except Exception:  # noqa: BLE001 - the caller's fault is shown like any thread's, and must not end this thread
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


class _Worker:
    """What one thread needs to do operations, and the times of the one that it is doing."""

    __slots__ = ("_arena", "_buffer", "_direct", "_do", "_end_ns", "_payload", "_start_ns", "_store")

    def __init__(self, store: BlockStore, payload: Payload, arena: DramArena | None) -> None:
        self._store = store
        self._payload = payload
        self._arena = arena
        self._buffer: PayloadBuffer | None = None
        self._start_ns = 0
        self._end_ns = 0
        self._direct: bool | None = None
        self._do = {
            OpKind.READ: self._read,
            OpKind.WRITE: self._write,
            OpKind.DELETE: self._delete,
            OpKind.COPY_IN: self._copy_in,
            OpKind.COPY_OUT: self._copy_out,
        }

    def run_chain(self, chain: Chain, queued_ns: int) -> list[OpDone]:
        """Do a chain's operations in order, up to the first that fails."""
        done: list[OpDone] = []
        failed = False
        for op in chain:
            if failed:
                done.append(_skipped(op, queued_ns, "an operation before it in its chain failed"))
            else:
                one = self._run(op, queued_ns)
                failed = one.error is not None
                done.append(one)
        return done

    def _run(self, op: Op, queued_ns: int) -> OpDone:
        self._start_ns = time.perf_counter_ns()
        self._end_ns = 0
        self._direct = None
        error: Exception | None = None
        verified_bytes = 0
        try:
            verified_bytes = self._do[op.kind](op)
        except Exception as caught:  # noqa: BLE001 - whatever it is, the batch must hear of it and the thread live on
            error = caught
        end_ns = self._end_ns or time.perf_counter_ns()
        return OpDone(op, queued_ns, self._start_ns, end_ns, self._direct, verified_bytes, error)

    def _read(self, op: Op) -> int:
        buffer = self._buffer or self._new_buffer()
        memory = buffer.to_read().memory
        self._start_ns = time.perf_counter_ns()
        self._direct = self._store.read(op.block_id, memory)
        self._end_ns = time.perf_counter_ns()
        return buffer.check(op.block_id)

    def _write(self, op: Op) -> int:
        memory = (self._buffer or self._new_buffer()).to_write(op.block_id).memory
        self._start_ns = time.perf_counter_ns()
        self._direct = self._store.write(op.block_id, memory)
        self._end_ns = time.perf_counter_ns()
        return 0

    def _delete(self, op: Op) -> int:
        self._start_ns = time.perf_counter_ns()
        self._store.delete(op.block_id)
        self._end_ns = time.perf_counter_ns()
        return 0

    def _copy_in(self, op: Op) -> int:
        slot = self._slot(op)
        part = (self._buffer or self._new_buffer()).to_write(op.block_id)
        self._start_ns = time.perf_counter_ns()
        part.copy_to(slot)
        self._end_ns = time.perf_counter_ns()
        return 0

    def _copy_out(self, op: Op) -> int:
        slot = self._slot(op)
        buffer = self._buffer or self._new_buffer()
        part = buffer.to_read()
        self._start_ns = time.perf_counter_ns()
        part.copy_from(slot)
        self._end_ns = time.perf_counter_ns()
        # A slot that holds another object is an error, but what is right here says nothing about storage.
        buffer.check(op.block_id)
        return 0

    def _new_buffer(self) -> PayloadBuffer:
        self._buffer = self._payload.new_buffer()
        return self._buffer

    def _slot(self, op: Op) -> memoryview:
        if self._arena is None:
            raise ValueError("there is no DRAM arena to copy to or from")
        return self._arena.view(op.slot)


def _skipped(op: Op, queued_ns: int, why: str) -> OpDone:
    now_ns = time.perf_counter_ns()
    return OpDone(op, queued_ns, now_ns, now_ns, None, 0, OperationSkippedError(f"{op.kind.name} skipped: {why}"))
