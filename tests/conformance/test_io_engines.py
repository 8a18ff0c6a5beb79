"""I/O engines pass their suite: the threads over several stores, and the modelled one, which is thereby verified."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from mlpstorage.config import IoPriority, Verify
from mlpstorage.measure.clock import NS
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.null_store import NullStore
from mlpstorage.storage.ops import Chain, Lane, Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import IoPool
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.storage.uring import UringEngine, probe_uring
from mlpstorage.testing.faults import FaultyStore
from mlpstorage.testing.io_rig import Batch, EngineRig, StoreRig
from mlpstorage.testing.io_suite import STORED_BYTES, IoEngineSuite
from mlpstorage.testing.memory_store import MemoryStore
from mlpstorage.testing.virtual import ModelError, ModelledIO, VirtualLoop
from tests.conformance.held_store import HeldRig, HeldStore

T = TypeVar("T")

KEYS = ObjectKeys("tiny-1b|0|full")
SLOTS = 4
"""Of the DRAM arena."""

SLAB_SLOTS = 1000


def pool_rig(store: BlockStore, depth: int, verify: Verify, priority: IoPriority = IoPriority.SPLIT) -> EngineRig:
    """A pool of threads over a store."""
    faulty = FaultyStore(store)
    payload = Payload(KEYS, store.stored_bytes, verify)
    arena = DramArena(SLOTS, store.stored_bytes)
    verified_bytes = 0 if verify is Verify.OFF else store.stored_bytes
    return StoreRig(
        faulty,
        lambda: IoPool(faulty, payload, arena, depth, priority),
        verified_bytes=verified_bytes,
        slots=0 if verify is Verify.OFF else SLOTS,
    )


class TestPoolOverFiles(IoEngineSuite):
    """Threads over layout `file`, every byte verified."""

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        return pool_rig(FileStore(directory / "objects", KEYS, STORED_BYTES), depth, Verify.FULL)


class TestPoolOverMemory(IoEngineSuite):
    """Threads over the reference store, stamps verified."""

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        del directory
        return pool_rig(MemoryStore(KEYS, STORED_BYTES), depth, Verify.STAMP)


class TestStrictPool(IoEngineSuite):
    """Threads that take loads before all else."""

    both_lanes = False

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        del directory
        return pool_rig(MemoryStore(KEYS, STORED_BYTES), depth, Verify.STAMP, IoPriority.STRICT)


class TestPoolOverSlab(IoEngineSuite):
    """Threads over layout `slab`."""

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        return pool_rig(SlabStore(directory / "objects", KEYS, STORED_BYTES, slots=SLAB_SLOTS), depth, Verify.FULL)


class TestPoolOverNull(IoEngineSuite):
    """Threads over no storage, where there is nothing to verify."""

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        del directory
        return pool_rig(NullStore(KEYS, STORED_BYTES), depth, Verify.OFF)


def uring_rig(store: FileStore | SlabStore, depth: int) -> EngineRig:
    """The ring over a store."""
    refusal = probe_uring()
    if refusal is not None:
        pytest.skip(refusal)
    held = HeldStore(store)
    payload = Payload(KEYS, held.stored_bytes, Verify.FULL, buffers=depth)
    arena = DramArena(SLOTS, held.stored_bytes)
    return HeldRig(
        held, lambda: UringEngine(held, payload, arena, depth), verified_bytes=held.stored_bytes, slots=SLOTS
    )


class TestUringOverFiles(IoEngineSuite):
    """The ring over layout `file`."""

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        return uring_rig(FileStore(directory / "objects", KEYS, STORED_BYTES), depth)


class TestUringOverSlab(IoEngineSuite):
    """The ring over layout `slab`."""

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        return uring_rig(SlabStore(directory / "objects", KEYS, STORED_BYTES, slots=SLAB_SLOTS), depth)


class ModelledRig(EngineRig):
    """The modelled engine, on a virtual loop that runs only while the rig waits: time stands still in between.

    An operation takes a virtual second, or a thousand while its kind is held: none ends before it is waited for.
    """

    def __init__(self, depth: int) -> None:
        self._latency_ns: dict[OpKind, int | None] = dict.fromkeys(OpKind, NS)
        self._failures: dict[tuple[OpKind, int], Exception] = {}
        self._bad: set[Op] = set()
        self._queued_before: int | None = None
        self._runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.engine = self.model = ModelledIO(
            latency_ns=self._latency_ns, servers=depth, failures=self._failures, object_bytes=STORED_BYTES
        )
        self.verified_bytes = STORED_BYTES
        self.moves_directly = True
        self.threaded = False
        self.slots = SLOTS

    def hold(self, kind: OpKind) -> None:
        """See `EngineRig.hold`."""
        self._latency_ns[kind] = 1000 * NS

    def wait_held(self, operations: int) -> None:
        """See `EngineRig.wait_held`: what can begin has begun, unless something has to end first."""
        if self._queued_before is None:
            assert self.model.most_running >= operations
        else:
            self._pass_time_until(lambda: self._queued_before == self._queued_ops() + operations)

    def release(self) -> None:
        """See `EngineRig.release`: what is held ends in its time."""
        self._latency_ns.update(dict.fromkeys(OpKind, NS))
        self._bad.clear()
        self._failures.clear()

    def step(self, *kinds: OpKind) -> None:
        """See `EngineRig.step`."""
        self.release()
        for kind in kinds:
            self.hold(kind)
        self._queued_before = self._queued_ops()

    def fail(self, kind: OpKind, object_id: int) -> None:
        """See `EngineRig.fail`: the model counts operations of a kind, which begin in their order."""
        self._bad.add(Op(kind, object_id))

    def is_failure(self, error: Exception | None) -> bool:
        """See `EngineRig.is_failure`."""
        return isinstance(error, InjectedError)

    def is_missing(self, error: Exception | None) -> bool:
        """See `EngineRig.is_missing`."""
        return isinstance(error, ModelError) and "it is not there" in str(error)

    def now_ns(self) -> int:
        """See `EngineRig.now_ns`."""
        loop = self._runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        return loop.now_ns()

    def submit(self, chains: Sequence[Chain], lane: Lane, then: Callable[[], object] | None = None) -> Batch:
        """See `EngineRig.submit`."""
        ops = [op for chain in chains for op in chain]
        for op in self._bad.intersection(ops):
            begun = [done.op.kind for done in self.model.finished if not isinstance(done.error, OperationSkippedError)]
            before = [one.kind for one in ops[: ops.index(op)]]
            self._failures[op.kind, (begun + before).count(op.kind) + 1] = InjectedError()
        return self._in_loop(partial(super().submit, chains, lane, then))

    def cancel(self, batch: Batch) -> None:
        """See `EngineRig.cancel`."""
        self._in_loop(partial(super().cancel, batch))

    def cancel_queued(self) -> None:
        """See `EngineRig.cancel_queued`."""
        self._in_loop(super().cancel_queued)

    def result(self, batch: Batch) -> list[OpDone]:
        """See `EngineRig.result`."""
        self._pass_time_until(lambda: batch.is_done)
        return batch.reports[0]

    def begin_close(self) -> Callable[[], None]:
        """See `EngineRig.begin_close`: the model does not wait for what is under way."""
        self._in_loop(self.engine.close)
        return lambda: None

    def close(self) -> None:
        """See `EngineRig.close`."""
        self._in_loop(super().close)
        self._runner.close()

    def _queued_ops(self) -> int:
        return sum(map(self.engine.queued_ops, Lane))

    def _pass_time_until(self, condition: Callable[[], bool]) -> None:
        """Let virtual time pass, which ends by a `VirtualTimeError`, not by patience."""

        async def wait() -> None:
            while not condition():  # noqa: ASYNC110 - the engine knows no event of the rig's
                await asyncio.sleep(1)

        self._runner.run(wait())

    def _in_loop(self, call: Callable[[], T]) -> T:
        """Call something where the virtual loop is the running one."""

        async def call_it() -> T:
            return call()

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._runner.run(call_it())
        return call()


class InjectedError(Exception):
    """What the model was told to fail with."""


class TestModelledIO(IoEngineSuite):
    """The fake that other tests rely on does what the real engines do."""

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """See `IoEngineSuite.make_rig`."""
        del directory
        return ModelledRig(depth)
