"""Operations that the engine hands to the I/O threads, and what comes back."""

import enum
from dataclasses import dataclass


class OpKind(enum.IntEnum):
    """What is done with one object."""

    READ = 0
    """Read from the store into the thread's buffer and check it."""
    WRITE = 1
    """Write a fresh payload to the store."""
    DELETE = 2
    """Delete from the store."""
    COPY_IN = 3
    """Copy a payload into a slot of the DRAM arena."""
    COPY_OUT = 4
    """Copy a slot of the DRAM arena into the thread's buffer."""


class Lane(enum.IntEnum):
    """Which threads take an operation first: half of them prefer loads, the other half stores."""

    LOAD = 0
    STORE = 1


@dataclass(frozen=True, slots=True)
class Op:
    """One operation on one object; `slot` is the arena slot of a copy."""

    kind: OpKind
    block_id: int
    slot: int = -1


@dataclass(frozen=True, slots=True)
class OpDone:
    """What became of an operation. Times are of `time.perf_counter_ns`.

    Attributes:
        op: The operation.
        queued_ns: When it was handed over.
        start_ns: When its I/O began; `start_ns - queued_ns` is the wait in the queue.
        end_ns: When its I/O was complete. The payload's stamping and checking lie outside `start_ns` to `end_ns`.
        direct: Whether the file was opened for direct I/O; None where no file was opened.
        verified_bytes: Bytes of the pages whose stamps were checked and found right.
        error: Why it failed; None where it did not. A failed operation moved no bytes that count.
    """

    op: Op
    queued_ns: int
    start_ns: int
    end_ns: int
    direct: bool | None
    verified_bytes: int
    error: Exception | None
