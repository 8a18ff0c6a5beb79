"""Rigs for tests of I/O engines: an engine with what a test needs to have in hand.

That is: to keep operations under way as long as the test likes, to make one fail, and to wait.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from mlpstorage.storage.ops import Chain, IoEngine, Lane, OpDone, OpKind
from mlpstorage.testing.faults import Fault, FaultKind, FaultyStore, Gate, StoreCall

WAIT_S = 60
"""Far more than any wait of the suite takes: a test that hangs fails by it, none passes by it."""


class Batch:
    """Receives what becomes of a batch."""

    __slots__ = ("_arrived", "handle", "reports")

    def __init__(self) -> None:
        self.reports: list[list[OpDone]] = []
        self.handle: object = None
        self._arrived = threading.Event()

    def report(self, done: list[OpDone]) -> None:
        """Take what became of the batch."""
        self.reports.append(done)
        self._arrived.set()

    @property
    def is_done(self) -> bool:
        """Whether it was reported."""
        return self._arrived.is_set()

    def wait(self) -> None:
        """Return when it was reported.

        Raises:
            TimeoutError: It was not within `WAIT_S`.
        """
        if not self._arrived.wait(WAIT_S):
            raise TimeoutError(f"the batch was not reported within {WAIT_S} s")


class EngineRig(ABC):
    """An engine, started, with what tests of it need in hand.

    Attributes:
        engine: The engine; its depth is the one that was asked for.
        verified_bytes: What a read of a whole object has to say that it verified.
        moves_directly: What reads and writes have to say of direct I/O.
        threaded: Whether several threads may use the engine at once.
        slots: Slots of the DRAM arena; 0 where there is none.
    """

    engine: IoEngine
    verified_bytes: int
    moves_directly: bool | None
    threaded: bool = True
    slots: int = 0

    @abstractmethod
    def hold(self, kind: OpKind) -> None:
        """Keep operations of a kind that begin from now on under way until `release`."""

    @abstractmethod
    def wait_held(self, operations: int) -> None:
        """Return when so many operations are held, or have been."""

    @abstractmethod
    def release(self) -> None:
        """Let all operations that are held come to their end, and hold no more."""

    @abstractmethod
    def step(self, *kinds: OpKind) -> None:
        """Let all operations that are held come to their end, and hold those of some kinds that begin afterwards.

        `wait_held` then counts these alone.
        """

    @abstractmethod
    def fail(self, kind: OpKind, object_id: int) -> None:
        """Let operations of a kind on an object fail, with an error that `is_failure` knows."""

    @abstractmethod
    def is_failure(self, error: Exception | None) -> bool:
        """Whether an error is the one that `fail` asked for."""

    @abstractmethod
    def is_missing(self, error: Exception | None) -> bool:
        """Whether an error says that there is no such object."""

    def now_ns(self) -> int:
        """The clock of the times that the engine tells."""
        return time.perf_counter_ns()

    def submit(self, chains: Sequence[Chain], lane: Lane, then: Callable[[], object] | None = None) -> Batch:
        """Hand over a batch; `then` is called when it is reported, in the thread that reports."""
        batch = Batch()

        def on_done(done: list[OpDone]) -> None:
            if then is not None:
                then()
            batch.report(done)

        batch.handle = self.engine.submit(chains, lane, on_done)
        return batch

    def cancel(self, batch: Batch) -> None:
        """Cancel a batch."""
        self.engine.cancel(batch.handle)

    def cancel_queued(self) -> None:
        """Cancel all that is queued."""
        self.engine.cancel_queued()

    def result(self, batch: Batch) -> list[OpDone]:
        """Wait for a batch; returns what became of its operations."""
        batch.wait()
        return batch.reports[0]

    def begin_close(self) -> Callable[[], None]:
        """Have the engine closed while operations may be under way; returns what waits for the end of that."""
        closer = threading.Thread(target=self.engine.close)
        closer.start()

        def join() -> None:
            closer.join(WAIT_S)
            assert not closer.is_alive(), "closing did not end"

        return join

    def close(self) -> None:
        """End all; calling it again does nothing."""
        self.release()
        self.engine.close()


class StoreRig(EngineRig):
    """A rig for an engine that moves bytes by `read` and `write` of a store.

    Args:
        store: The store, not yet open, in a wrapper that can fail.
        make_engine: Makes the engine over `store`.
        verified_bytes: See `EngineRig`.
        slots: Likewise.
    """

    def __init__(
        self, store: FaultyStore, make_engine: Callable[[], IoEngine], *, verified_bytes: int, slots: int = 0
    ) -> None:
        store.open()
        self.store = store
        self.engine = make_engine()
        self.verified_bytes = verified_bytes
        self.moves_directly = store.capabilities.direct if store.capabilities.aligned else None
        self.slots = slots
        self._gate = Gate()
        self.engine.start()

    def hold(self, kind: OpKind) -> None:
        """See `EngineRig.hold`."""
        self.store.inject(Fault(call=StoreCall[kind.name], kind=FaultKind.WAIT, gate=self._gate))

    def wait_held(self, operations: int) -> None:
        """See `EngineRig.wait_held`."""
        self._gate.wait_arrived(operations, WAIT_S)

    def release(self) -> None:
        """See `EngineRig.release`."""
        self.store.heal()
        self._gate.open()
        self._gate = Gate()

    def step(self, *kinds: OpKind) -> None:
        """See `EngineRig.step`."""
        gate, self._gate = self._gate, Gate()
        self.store.heal()
        for kind in kinds:
            self.hold(kind)
        gate.open()

    def fail(self, kind: OpKind, object_id: int) -> None:
        """See `EngineRig.fail`."""
        self.store.inject(Fault(call=StoreCall[kind.name], kind=FaultKind.EIO, object_id=object_id))

    def is_failure(self, error: Exception | None) -> bool:
        """See `EngineRig.is_failure`."""
        return isinstance(error, OSError) and "injected" in str(error)

    def is_missing(self, error: Exception | None) -> bool:
        """See `EngineRig.is_missing`."""
        return isinstance(error, FileNotFoundError)

    def close(self) -> None:
        """See `EngineRig.close`."""
        super().close()
        self.store.close()
