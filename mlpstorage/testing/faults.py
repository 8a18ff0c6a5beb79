"""A block store that fails on purpose: a wrapper around another, which injects the faults that a test asks for.

A verified fake: without faults it passes the conformance suite, and with each fault exactly those tests of the suite
fail that ask for what the fault takes away.
"""

import dataclasses
import enum
import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.base import (
    BlockStore,
    Capabilities,
    Capacity,
    Listing,
    Moved,
    ShortObjectError,
    aligned_memory,
)


class StoreCall(enum.StrEnum):
    """A call in which a fault is injected."""

    READ = "read"
    WRITE = "write"
    DELETE = "delete"
    SYNC = "sync"
    EXISTS = "exists"
    LISTING = "listing"


class FaultKind(enum.StrEnum):
    """What goes wrong."""

    EIO = "eio"
    """The call fails with EIO; nothing was done."""
    ENOSPC = "enospc"
    """The call fails with ENOSPC; nothing was done."""
    SHORT_READ = "short-read"
    """Only the first half of the object is read, which is reported (`ShortObjectError`)."""
    PARTIAL_READ = "partial-read"
    """Only the first half of the object is read, but success is reported; the rest of the buffer stays as it was."""
    STALE_READ = "stale-read"
    """The version before the last one is read, as long as there was one."""
    SWAPPED_OBJECT = "swapped-object"
    """Another object is read."""
    FLIPPED_BYTE = "flipped-byte"
    """One byte of what is read or written has all its bits turned over."""
    TORN_WRITE = "torn-write"
    """Only the first half of the object arrives, the rest are zeros, but success is reported."""
    LOST = "lost"
    """Nothing is done, but success is reported."""
    WAIT = "wait"
    """The call waits at a gate before it does anything: latency, or, where the gate is never opened, a hang."""


_CALLS = {
    FaultKind.EIO: frozenset(StoreCall),
    FaultKind.ENOSPC: frozenset(StoreCall),
    FaultKind.WAIT: frozenset(StoreCall),
    FaultKind.SHORT_READ: frozenset({StoreCall.READ}),
    FaultKind.PARTIAL_READ: frozenset({StoreCall.READ}),
    FaultKind.STALE_READ: frozenset({StoreCall.READ}),
    FaultKind.SWAPPED_OBJECT: frozenset({StoreCall.READ}),
    FaultKind.FLIPPED_BYTE: frozenset({StoreCall.READ, StoreCall.WRITE}),
    FaultKind.TORN_WRITE: frozenset({StoreCall.WRITE}),
    FaultKind.LOST: frozenset({StoreCall.WRITE, StoreCall.DELETE, StoreCall.SYNC}),
}

_ERRORS = {FaultKind.EIO: errno.EIO, FaultKind.ENOSPC: errno.ENOSPC}


class Gate:
    """Where calls wait until a test opens it, in the place of a sleep. As a context manager it opens at the end."""

    __slots__ = ("_arrived", "_condition", "_is_open")

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._arrived = 0
        self._is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    @property
    def arrived(self) -> int:
        """Calls that came to the gate so far, those that went on included."""
        return self._arrived

    def open(self) -> None:
        """Let all calls go on, those that wait and those that come later."""
        with self._condition:
            self._is_open = True
            self._condition.notify_all()

    def pass_through(self) -> None:
        """Arrive, and return when the gate is open."""
        with self._condition:
            self._arrived += 1
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._is_open)

    def wait_arrived(self, calls: int, timeout_s: float) -> None:
        """Return when so many calls have come to the gate.

        Raises:
            TimeoutError: They did not within `timeout_s` seconds.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._arrived >= calls, timeout_s):
                raise TimeoutError(f"{self._arrived} calls came to the gate within {timeout_s} s, not {calls}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault, and the calls in which it is injected.

    Attributes:
        call: Which calls.
        kind: What goes wrong.
        object_id: Of which object; None for any. A call for many objects is not of any one object.
        nth: The how many-th such call, from 1; None for each.
        at_bytes: Which byte of the object is flipped.
        other_id: Which object is read in the place of the right one; None for the one that was written last, of those
            that are others.
        gate: Where the call waits.
    """

    call: StoreCall
    kind: FaultKind
    object_id: int | None = None
    nth: int | None = None
    at_bytes: int = 100
    other_id: int | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be injected.

        Raises:
            ValueError: The kind does not occur in that call, or a gate is missing or too many.
        """
        if self.call not in _CALLS[self.kind]:
            raise ValueError(f"{self.kind.value} does not occur in {self.call.value}")
        if (self.gate is not None) != (self.kind is FaultKind.WAIT):
            raise ValueError(f"{self.kind.value} {'needs a' if self.gate is None else 'has no'} gate")


class FaultyStore:
    """A block store around another one, with faults.

    It offers no descriptors, so that whoever moves the bytes comes through here.

    Args:
        store: The store below; whoever has it open does without the faults.
        faults: What goes wrong; where several hit one call, calls wait first and then fail by the first error.

    Attributes:
        injected: The faults that were injected so far, in order: what a test can tell an empty run by.
    """

    __slots__ = ("_counts", "_faults", "_last_written", "_lock", "_previous", "_store", "injected")

    def __init__(self, store: BlockStore, faults: Sequence[Fault] = ()) -> None:
        self.injected: list[Fault] = []
        self._store = store
        self._faults: list[Fault] = []
        self._counts: list[int] = []
        self._lock = threading.Lock()
        # Contents that stale reads get, and the objects in the order in which they were last written.
        self._previous: dict[int, bytes] = {}
        self._last_written: dict[int, None] = {}
        self.inject(*faults)

    def inject(self, *faults: Fault) -> None:
        """Let more go wrong, from the next call on. Earlier versions are kept from the first stale read's fault on."""
        with self._lock:
            self._faults += faults
            self._counts += [0] * len(faults)

    def heal(self) -> None:
        """Let nothing go wrong any more. Calls that wait at a gate do so until it is opened."""
        with self._lock:
            self._faults.clear()
            self._counts.clear()

    @property
    def object_bytes(self) -> int:
        """See `BlockStore.object_bytes`."""
        return self._store.object_bytes

    @property
    def stored_bytes(self) -> int:
        """See `BlockStore.stored_bytes`."""
        return self._store.stored_bytes

    @property
    def capabilities(self) -> Capabilities:
        """Those of the store below, but for `descriptors`."""
        return dataclasses.replace(self._store.capabilities, descriptors=False)

    def open(self) -> None:
        """See `BlockStore.open`."""
        self._store.open()

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.read`."""
        faults = self._due(StoreCall.READ, object_id)
        if not faults:
            return self._store.read(object_id, buffer)
        half_bytes = self._half_bytes
        rest = bytes(buffer[half_bytes:])
        moved = self._store.read(self._source(object_id, faults), buffer)
        for fault in faults:
            match fault.kind:
                case FaultKind.FLIPPED_BYTE:
                    buffer[fault.at_bytes] ^= 0xFF
                case FaultKind.STALE_READ if object_id in self._previous:
                    buffer[:] = self._previous[object_id]
                case FaultKind.SHORT_READ | FaultKind.PARTIAL_READ:
                    buffer[half_bytes:] = rest
                case _:
                    continue
            self.injected.append(fault)
            if fault.kind is FaultKind.SHORT_READ:
                raise ShortObjectError(errno.EIO, f"{half_bytes} bytes were read (injected)", f"object {object_id}")
        return moved

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.write`."""
        faults = self._due(StoreCall.WRITE, object_id)
        if any(fault.kind is FaultKind.STALE_READ for fault in tuple(self._faults)):
            self._keep_previous(object_id)
        if any(fault.kind is FaultKind.LOST for fault in faults):
            self.injected += faults
            return Moved(direct=self.capabilities.direct)
        if faults:
            changed = aligned_memory(self.stored_bytes)
            changed[:] = buffer
            for fault in faults:
                if fault.kind is FaultKind.FLIPPED_BYTE:
                    changed[fault.at_bytes] ^= 0xFF
                else:
                    changed[self._half_bytes :] = bytes(self.stored_bytes - self._half_bytes)
            buffer = changed
            self.injected += faults
        moved = self._store.write(object_id, buffer)
        with self._lock:
            self._last_written.pop(object_id, None)
            self._last_written[object_id] = None
        return moved

    def delete(self, object_id: int) -> Moved:
        """See `BlockStore.delete`."""
        faults = self._due(StoreCall.DELETE, object_id)
        if faults:
            self.injected += faults
            return Moved()
        moved = self._store.delete(object_id)
        with self._lock:
            self._last_written.pop(object_id, None)
        self._previous.pop(object_id, None)
        return moved

    def sync(self, object_id: int) -> None:
        """See `BlockStore.sync`."""
        faults = self._due(StoreCall.SYNC, object_id)
        self.injected += faults
        if not faults:
            self._store.sync(object_id)

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """See `BlockStore.exists`."""
        self._due(StoreCall.EXISTS, None)
        return self._store.exists(object_ids)

    def listing(self) -> Listing:
        """See `BlockStore.listing`."""
        self._due(StoreCall.LISTING, None)
        return self._store.listing()

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:
        """See `BlockStore.drop_page_cache`."""
        return self._store.drop_page_cache(object_ids)

    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`."""
        return self._store.capacity()

    def close(self) -> None:
        """See `BlockStore.close`."""
        self._store.close()

    @property
    def _half_bytes(self) -> int:
        """The first half of an object, in full pages; nothing of an object of one page."""
        return self.stored_bytes // PAGE_BYTES // 2 * PAGE_BYTES

    def _due(self, call: StoreCall, object_id: int | None) -> list[Fault]:
        """Wait at the gates and raise the errors of a call; returns its other faults."""
        due: list[Fault] = []
        with self._lock:
            for place, fault in enumerate(self._faults):
                if fault.call is call and fault.object_id in {None, object_id}:
                    self._counts[place] += 1
                    if fault.nth in {None, self._counts[place]}:
                        due.append(fault)
        for fault in due:
            if fault.gate is not None:
                self.injected.append(fault)
                fault.gate.pass_through()
        for fault in due:
            if fault.kind in _ERRORS:
                self.injected.append(fault)
                number = _ERRORS[fault.kind]
                where = None if object_id is None else f"object {object_id}"
                raise OSError(number, f"{os.strerror(number)} (injected)", where)
        return [fault for fault in due if fault.gate is None]

    def _source(self, object_id: int, faults: Sequence[Fault]) -> int:
        """The object that is read in the place of one."""
        for fault in faults:
            if fault.kind is not FaultKind.SWAPPED_OBJECT:
                continue
            with self._lock:
                others = [one for one in self._last_written if one != object_id]
            other_id = fault.other_id if fault.other_id is not None else next(reversed(others), None)
            if other_id is not None and self._store.exists([object_id, other_id]) == [True, True]:
                self.injected.append(fault)
                return other_id
        return object_id

    def _keep_previous(self, object_id: int) -> None:
        if self._store.exists([object_id])[0]:
            current = aligned_memory(self.stored_bytes)
            self._store.read(object_id, current)
            self._previous[object_id] = bytes(current)
