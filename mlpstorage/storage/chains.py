"""The queues in front of an I/O engine: batches of chains, in lanes, which can be cancelled and are reported."""

import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mlpstorage.config import IoPriority
from mlpstorage.storage.ops import Chain, Lane, OnDone, Op, OpDone, OperationSkippedError, OpKind

_DELETES = len(Lane)
"""The queue of chains that only delete, beside those of the lanes; used with strict priority."""

_CANCELLED = "it was cancelled before it began"


class Batch:
    """Chains that were handed over together and are reported together.

    Attributes:
        done: What became of each chain's operations.
        lane: What they are for.
        on_done: Who is told in the end.
        queued_ns: When they were handed over.
        remaining: Chains that are not finished.
    """

    __slots__ = ("done", "lane", "on_done", "queued_ns", "remaining")

    def __init__(self, chains: int, lane: Lane, on_done: OnDone, queued_ns: int) -> None:
        self.done: list[list[OpDone]] = [[] for _ in range(chains)]
        self.lane = lane
        self.on_done = on_done
        self.queued_ns = queued_ns
        self.remaining = chains


@dataclass(slots=True, eq=False)
class QueuedChain:
    """A chain of a batch; nobody changes it (see `ops.Op`).

    Attributes:
        batch: The batch.
        number: Which of its chains this is.
        chain: The operations.
    """

    batch: Batch
    number: int
    chain: Chain


class ChainQueues:
    """What was handed over and not begun; any thread may use it.

    Split priority: half of the takers, and at least one, prefer the load lane, the others the store lane; each takes
    from the other lane when its own is empty. Strict priority: every taker takes loads first, then chains of the store
    lane that only delete, then the rest.

    Args:
        priority: Which chain is taken next.
    """

    __slots__ = ("_closed", "_lock", "_queued_ops", "_queues", "_strict")

    def __init__(self, priority: IoPriority) -> None:
        self._closed = False
        self._lock = threading.Lock()
        self._queues: tuple[deque[QueuedChain], ...] = tuple(deque() for _ in (*Lane, _DELETES))
        self._queued_ops = [0 for _ in Lane]
        self._strict = priority is IoPriority.STRICT

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken in."""
        return self._closed

    @property
    def waiting(self) -> bool:
        """Whether any chain waits to be taken."""
        return any(self._queues)

    def put(self, chains: Sequence[Chain], lane: Lane, on_done: OnDone) -> Batch:
        """Queue a batch; one without chains as one chain without operations.

        Raises:
            RuntimeError: The queues are closed.
        """
        items = chains or ((),)
        batch = Batch(len(items), lane, on_done, time.perf_counter_ns())
        with self._lock:
            if self._closed:
                raise RuntimeError("the I/O engine is closed")
            for number, chain in enumerate(items):
                deletes = self._strict and lane is Lane.STORE and _only_deletes(chain)
                self._queues[_DELETES if deletes else lane].append(QueuedChain(batch, number, chain))
            self._queued_ops[lane] += sum(map(len, items))
        return batch

    def order(self, taker: int, takers: int) -> tuple[int, ...]:
        """The queues that one of the takers looks into, first things first."""
        if self._strict:
            return (Lane.LOAD, _DELETES, Lane.STORE)
        loaders = (takers + 1) // 2
        return (Lane.LOAD, Lane.STORE) if taker < loaders else (Lane.STORE, Lane.LOAD)

    def take(self, order: tuple[int, ...]) -> QueuedChain | None:
        """The next chain for a taker; None where none is queued."""
        with self._lock:
            for number in order:
                waiting = self._queues[number]
                if waiting:
                    taken = waiting.popleft()
                    self._queued_ops[taken.batch.lane] -= len(taken.chain)
                    return taken
        return None

    def queued_ops(self, lane: Lane) -> int:
        """Operations of a lane that wait to be taken."""
        return self._queued_ops[lane]

    def cancel(self, batch: object) -> None:
        """Finish every chain of a batch that was not taken; its operations are reported as skipped."""
        with self._lock:
            items = [item for waiting in self._queues for item in waiting if item.batch is batch]
            if not items:
                return
            for waiting in self._queues:
                kept = [item for item in waiting if item.batch is not batch]
                waiting.clear()
                waiting.extend(kept)
            self._queued_ops[items[0].batch.lane] -= sum(len(item.chain) for item in items)
        self._finish_skipped(items)

    def cancel_all(self) -> None:
        """Finish every chain that was not taken; its operations are reported as skipped."""
        with self._lock:
            items = [item for waiting in self._queues for item in waiting]
            for waiting in self._queues:
                waiting.clear()
            self._queued_ops[:] = [0 for _ in Lane]
        self._finish_skipped(items)

    def close(self) -> None:
        """Take nothing more in, and cancel what is queued. Calling it again does nothing."""
        with self._lock:
            self._closed = True
        self.cancel_all()

    def finish(self, item: QueuedChain, done: list[OpDone]) -> None:
        """Take note of what became of a chain; with the last one of a batch, report the batch."""
        batch = item.batch
        batch.done[item.number] = done
        with self._lock:
            batch.remaining -= 1
            unfinished = batch.remaining
        if unfinished:
            return
        try:
            batch.on_done([one for chain in batch.done for one in chain])
        except Exception:  # noqa: BLE001 - the caller's fault is shown like any thread's, and must not end this thread
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def _finish_skipped(self, items: Sequence[QueuedChain]) -> None:
        for item in items:
            self.finish(item, [skipped(op, item.batch.queued_ns, _CANCELLED) for op in item.chain])


def skipped(op: Op, queued_ns: int, why: str) -> OpDone:
    """The report of an operation that was not begun."""
    now_ns = time.perf_counter_ns()
    return OpDone(op, queued_ns, now_ns, now_ns, None, 0, OperationSkippedError(f"{op.kind.name} skipped: {why}"))


def _only_deletes(chain: Chain) -> bool:
    return bool(chain) and all(op.kind is OpKind.DELETE for op in chain)
