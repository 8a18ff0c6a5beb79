"""Our side of one comparison with fio, in a process of its own, as a rank is one; `bench/storage.py` starts it.

    python bench/ours.py read|write DIR OBJECT_BYTES OBJECTS DEPTH off|stamp|full SECONDS threads|uring

Reads the objects of a file store, over and over until the time is over, or writes them once, and prints as JSON what
was moved and what it took: operations, bytes, wall clock, and the processor time of the process (`getrusage`).

What a process does only once is done before: the buffers' memory is taken, and filled with the random bytes that
objects are written from.
"""

import argparse
import contextlib
import itertools
import json
import math
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlpstorage.config import DirectMode, IoEngineName, Verify
from mlpstorage.kvcache.rank import SWITCH_INTERVAL_S
from mlpstorage.storage.affinity import SharedCpu
from mlpstorage.storage.base import written_parts
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.ops import Chain, IoEngine, Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload, PayloadBuffer, VerifyError, WriteNumbers
from mlpstorage.storage.pool import IoPool
from mlpstorage.storage.uring import UringEngine

KEYS = ObjectKeys("bench|0|full")
_SPARE_ID = (1 << 63) - 1
"""An object that is neither read nor written: what a payload knows of it makes no read wrong."""
_BATCHES = 4
"""Batches under way at any time, so that threads do not wait for the slowest operation of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was moved, and what it took."""

    ops: int
    moved_bytes: int
    wall_s: float
    cpu_s: float
    payload_s: float


class UsedPayload(Payload):
    """Payloads whose buffers are there before the threads ask for them, and were used for reading and writing."""

    def __init__(self, stored_bytes: int, verify: Verify, depth: int) -> None:
        # As a rank does.
        writes = None if verify is Verify.OFF else WriteNumbers()
        super().__init__(KEYS, stored_bytes, verify, buffers=depth, writes=writes)
        self._unclaimed = [self._used_buffer() for _ in range(depth)]

    def new_buffer(self) -> PayloadBuffer:
        """One of the buffers."""
        return self._unclaimed.pop()

    def _used_buffer(self) -> PayloadBuffer:
        buffer = super().new_buffer()
        memory = buffer.to_read().memory
        memory[:] = bytes(memory.nbytes)
        with contextlib.suppress(VerifyError):
            buffer.check(_SPARE_ID)
        for _ in range(max(1, written_parts(self.stored_bytes, self.buffers))):
            buffer.to_write(_SPARE_ID)
        return buffer


class Runner:
    """Runs chains of single operations on an engine and measures them."""

    def __init__(self, engine: IoEngine, object_bytes: int, depth: int) -> None:
        self._engine = engine
        self._object_bytes = object_bytes
        self._batch_ops = -(-depth * 2 // _BATCHES)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._finished: list[OpDone] = []
        self._running = 0
        self._until_s = math.inf
        self._waiting: Iterator[Chain] = iter(())

    def run(self, kind: OpKind, object_ids: Sequence[int], seconds: float | None = None) -> Measured:
        """Do all objects once, or over and over until the time is over."""
        lane = Lane.STORE if kind is OpKind.WRITE else Lane.LOAD
        chains = [(Op(kind, object_id),) for object_id in object_ids]
        self._waiting = iter(chains) if seconds is None else itertools.cycle(chains)
        self._over.clear()
        self._finished = []
        self._running = _BATCHES
        cpu_s, start_s = _cpu_s(), time.perf_counter()
        self._until_s = math.inf if seconds is None else start_s + seconds
        for _ in range(_BATCHES):
            self._submit(lane)
        self._over.wait()
        wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s() - cpu_s
        for done in self._finished:
            if done.error is not None:
                raise done.error
            if not done.direct:
                raise AssertionError(f"{done.op} was not direct")
        return Measured(
            ops=len(self._finished),
            moved_bytes=len(self._finished) * self._object_bytes,
            wall_s=wall_s,
            cpu_s=cpu_s,
            payload_s=sum(done.payload_ns for done in self._finished) / 1e9,
        )

    def _submit(self, lane: Lane) -> None:
        """Hand the next batch over, or count one batch less under way where there is nothing more to do."""

        def on_done(finished: list[OpDone]) -> None:
            with self._lock:
                self._finished += finished
            self._submit(lane)

        with self._lock:
            over = time.perf_counter() >= self._until_s
            chains = [] if over else list(itertools.islice(self._waiting, self._batch_ops))
            if not chains:
                self._running -= 1
                if not self._running:
                    self._over.set()
                return
        self._engine.submit(chains, lane, on_done)


def main(argv: Sequence[str] | None = None) -> int:
    """Read or write, and print what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("kind", choices=("read", "write"))
    parser.add_argument("dir", type=Path)
    parser.add_argument("object_bytes", type=int)
    parser.add_argument("objects", type=int)
    parser.add_argument("depth", type=int, help="objects in flight")
    parser.add_argument("verify", type=Verify)
    parser.add_argument("seconds", type=float, help="how long to read")
    parser.add_argument("engine", type=IoEngineName)
    args = parser.parse_args(argv)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    store = FileStore(args.dir, KEYS, args.object_bytes, direct=DirectMode.ALWAYS)
    store.open()
    payload = UsedPayload(store.stored_bytes, args.verify, args.depth)
    engine: IoEngine = IoPool(store, payload, None, args.depth, cpu=SharedCpu(0))
    if args.engine is IoEngineName.URING:
        engine = UringEngine(store, payload, None, args.depth)
    engine.start()
    try:
        runner = Runner(engine, args.object_bytes, args.depth)
        if args.kind == "read":
            measured = runner.run(OpKind.READ, range(args.objects), args.seconds)
        else:
            measured = runner.run(OpKind.WRITE, range(args.objects))
    finally:
        engine.close()
    print(json.dumps(asdict(measured)))
    return 0


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
