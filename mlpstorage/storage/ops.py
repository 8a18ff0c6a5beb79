"""Operations that are handed to an I/O engine, what comes back, and what an I/O engine is."""

import enum
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class OpKind(enum.IntEnum):
    """What is done with one object."""

    READ = 0
    """Read from the store into the engine's memory and check it."""
    WRITE = 1
    """Write a fresh payload to the store."""
    DELETE = 2
    """Delete from the store."""
    COPY_IN = 3
    """Copy a payload into the DRAM arena."""
    COPY_OUT = 4
    """Copy from the DRAM arena into the engine's memory."""
    SYNC = 5
    """Wait until an object that was written is on stable storage."""


class Lane(enum.IntEnum):
    """What an operation is for: a request that waits for it, or the work behind requests."""

    LOAD = 0
    STORE = 1


@dataclass(slots=True, unsafe_hash=True)
class Op:
    """One operation on one object; `slot` is the arena slot (of the object's block) of a copy.

    Nobody changes one. It is not frozen, since making it would take three times as long, as with `OpDone`: there are
    two for every object that is moved.
    """

    kind: OpKind
    object_id: int
    slot: int = -1


@dataclass(slots=True, unsafe_hash=True)
class OpDone:
    """What became of an operation; nobody changes it. Times are of `time.perf_counter_ns`, but for `payload_ns`.

    Attributes:
        op: The operation.
        queued_ns: When it was handed over.
        start_ns: When its I/O began; `start_ns - queued_ns` is the wait in the queue.
        end_ns: When its I/O was complete. The payload's stamping and checking lie outside `start_ns` to `end_ns`.
        direct: Whether the file was opened for direct I/O; None where no file was opened.
        verified_bytes: Bytes of the pages that were checked and found right.
        error: Why it failed; None where it did not. A failed operation moved no bytes that count.
        payload_ns: Processor time of filling, stamping and checking its payload.
        page_cache_bytes: See `storage.base.Moved`.
        retries: Likewise; of a failed operation too, where its error tells them (attribute `retries`).
    """

    op: Op
    queued_ns: int
    start_ns: int
    end_ns: int
    direct: bool | None
    verified_bytes: int
    error: Exception | None
    payload_ns: int = 0
    page_cache_bytes: int | None = 0
    retries: int = 0


Chain = Sequence[Op]
"""Operations that are done in order, one after the other."""

OnDone = Callable[[list[OpDone]], None]


_NEED_AN_OBJECT = frozenset({OpKind.READ, OpKind.DELETE, OpKind.SYNC})


def is_gone(done: OpDone) -> bool:
    """Whether an operation failed because its object is not there (any more), as one that another rank deleted.

    A file that another client of a network file system deletes while it is open here may fail with ESTALE.
    """
    if not isinstance(done.error, OSError) or done.op.kind not in _NEED_AN_OBJECT:
        return False
    return isinstance(done.error, FileNotFoundError) or done.error.errno == errno.ESTALE


class OperationSkippedError(Exception):
    """An operation was not begun: one before it in its chain failed, or it was cancelled."""


class IoEngine(Protocol):
    """Does operations, as many at once as its depth; `storage.pool` and others."""

    def start(self) -> None:
        """Begin to take operations."""
        ...

    def submit(self, chains: Sequence[Chain], lane: Lane, on_done: OnDone) -> object:
        """Queue a batch: each chain is done in order, different chains at once as far as the depth allows.

        When all are finished `on_done` is called once, in a thread of the engine (or in the one that cancels), with
        what became of every operation, chain after chain. After a failed operation the rest of its chain is skipped.
        Returns what `cancel` takes.

        Raises:
            RuntimeError: The engine is closed.
        """
        ...

    def cancel(self, batch: object) -> None:
        """Give up those chains of a batch that were not begun; their operations are reported as skipped."""
        ...

    def cancel_queued(self) -> None:
        """Give up every chain that was not begun."""
        ...

    def queued_ops(self, lane: Lane) -> int:
        """Operations of a lane that were not begun."""
        ...

    def close(self) -> None:
        """Cancel what is queued, wait for what is running, and end. Calling it again does nothing."""
        ...
