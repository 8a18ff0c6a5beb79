"""The I/O engines against each other, threads and ring: rate and processor time, over object sizes and layouts.

    python bench/engines.py [--dir DIR] [--depth N] [--quick] [--json]

Both engines do the same operations on the same store, in turns, as disks and neighbours drift; what is shown are
medians over the rounds. Direct I/O, one operation an object, stamps written and checked (`--verify stamp`), `--depth`
operations under way. Reads: all objects, and again, until the time is over. Writes: new objects, which are deleted
between the measurements. What counts is wall clock and `getrusage` of this process from the hand-over of the first
batch to the end of the last, with memory that has been used before.

4 KiB is no size that objects have; it shows the cost of an operation without that of its bytes.

Exit code 1: the ring is ahead nowhere. Ahead is 5 % more operations a second, or as many for 10 % less processor time.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlpstorage.config import GIB, MIB, PAGE_BYTES, DirectMode, IoEngineName, Layout, Verify
from mlpstorage.storage.affinity import SharedCpu
from mlpstorage.storage.base import written_parts
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.ops import Chain, IoEngine, Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload, PayloadBuffer, VerifyError
from mlpstorage.storage.pool import IoPool
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.storage.uring import UringEngine, probe_uring

KEYS = ObjectKeys("bench|0|full")
THREADS, URING = IoEngineName.THREADS, IoEngineName.URING
SIZES_BYTES = (PAGE_BYTES, 128 << 10, MIB, 2 * MIB)
LAYOUTS = (Layout.SLAB, Layout.FILE)
MAX_READ_OBJECTS = 2000
MAX_WRITTEN_OBJECTS = 500
FREE_BYTES = GIB
"""More than what is written at any time."""
MIN_RATE_RATIO = 1.05
EQUAL_RATE_RATIO = 0.95
MAX_CPU_RATIO = 0.9
_MB = 1e6

Store = FileStore | SlabStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is done, and how often.

    Attributes:
        read_bytes: Objects to read are as many as this holds, but no more than `MAX_READ_OBJECTS`.
        write_bytes: Likewise those that a measurement writes, no more than `MAX_WRITTEN_OBJECTS`.
        rounds: Measurements of each engine.
        read_s: How long a measurement reads, at least.
    """

    read_bytes: int
    write_bytes: int
    rounds: int
    read_s: float


FULL = Plan(read_bytes=512 * MIB, write_bytes=256 * MIB, rounds=5, read_s=0.3)
QUICK = Plan(read_bytes=256 * MIB, write_bytes=128 * MIB, rounds=3, read_s=0.15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was done, and what it took."""

    ops: int
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Medians of an engine."""

    ops_per_s: float
    mb_per_s: float
    cpu_us_per_op: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One kind of operation on one layout and size; the ratios are those of the ring over the threads."""

    layout: Layout
    kind: str
    object_bytes: int
    depth: int
    threads: Side
    uring: Side
    rate_ratio: float
    cpu_ratio: float
    ahead: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 if the ring is ahead nowhere."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the files are written")
    parser.add_argument("--depth", type=int, default=32, help="operations under way at once (32)")
    parser.add_argument("--quick", action="store_true", help="3 short rounds instead of 5")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of the table")
    args = parser.parse_args(argv)
    refusal = probe_uring()
    if refusal is not None:
        parser.error(f"there is no ring here: {refusal}")
    free_bytes = shutil.disk_usage(args.dir).free
    if free_bytes < FREE_BYTES:
        parser.error(f"--dir {args.dir}: {free_bytes / MIB:.0f} MiB are free, {FREE_BYTES / MIB:.0f} are needed")
    sys.setswitchinterval(0.0005)  # as a rank does
    if not args.json:
        _print_header()
    results: list[Result] = []
    for layout in LAYOUTS:
        for object_bytes in SIZES_BYTES:
            for result in _compare(layout, object_bytes, args.depth, QUICK if args.quick else FULL, args.dir):
                results.append(result)
                if not args.json:
                    _print_row(result)
    if args.json:
        print(json.dumps({"results": [asdict(result) for result in results]}, indent=2))
    return 0 if any(result.ahead for result in results) else 1


def _compare(layout: Layout, object_bytes: int, depth: int, plan: Plan, parent: Path) -> list[Result]:
    """Have both engines read and write objects of a size, in turns, in a directory of their own."""
    written = range(min(MAX_WRITTEN_OBJECTS, plan.write_bytes // object_bytes))
    read = range(len(written), len(written) + min(MAX_READ_OBJECTS, plan.read_bytes // object_bytes))
    directory = Path(tempfile.mkdtemp(prefix="bench-engines-", dir=parent))
    try:
        store = _store(layout, directory, object_bytes, read.stop + depth)
        store.open()
        payload = UsedPayload(store.stored_bytes, depth)
        _once(THREADS, store, payload, OpKind.WRITE, read)
        sides: dict[OpKind, dict[IoEngineName, list[Measured]]] = {
            OpKind.READ: {THREADS: [], URING: []},
            OpKind.WRITE: {THREADS: [], URING: []},
        }
        for _ in range(plan.rounds):
            for name in (THREADS, URING):
                sides[OpKind.READ][name].append(_once(name, store, payload, OpKind.READ, read, plan.read_s))
            for name in (THREADS, URING):
                sides[OpKind.WRITE][name].append(_once(name, store, payload, OpKind.WRITE, written))
                for object_id in written:
                    store.delete(object_id)
        store.close()
    finally:
        shutil.rmtree(directory)
    return [_result(layout, kind, object_bytes, depth, measured) for kind, measured in sides.items()]


def _store(layout: Layout, directory: Path, object_bytes: int, slots: int) -> Store:
    if layout is Layout.FILE:
        return FileStore(directory / "objects", KEYS, object_bytes, direct=DirectMode.ALWAYS)
    return SlabStore(directory / "objects", KEYS, object_bytes, slots=slots, direct=DirectMode.ALWAYS)


def _once(
    name: IoEngineName, store: Store, payload: Payload, kind: OpKind, object_ids: range, at_least_s: float = 0
) -> Measured:
    """Measure an engine that is made for it."""
    depth = payload.buffers
    engine: IoEngine = IoPool(store, payload, None, depth, cpu=SharedCpu(0))
    if name is URING:
        engine = UringEngine(store, payload, None, depth)
    engine.start()
    try:
        Runner(engine).run(kind, object_ids[: 2 * depth], 0)
        return Runner(engine).run(kind, object_ids, at_least_s)
    finally:
        engine.close()


class UsedPayload(Payload):
    """Payloads whose buffers were made and used beforehand; one engine after the other takes the same ones."""

    def __init__(self, stored_bytes: int, depth: int) -> None:
        super().__init__(KEYS, stored_bytes, Verify.STAMP, buffers=depth)
        self._numbers = itertools.count()
        self._used = [super(UsedPayload, self).new_buffer() for _ in range(depth)]
        for buffer in self._used:
            buffer.to_read().memory[:] = bytes(stored_bytes)
            with contextlib.suppress(VerifyError):
                buffer.check(0)
            for _ in range(written_parts(stored_bytes, depth)):
                buffer.to_write(0)

    def new_buffer(self) -> PayloadBuffer:
        """A buffer; an engine takes no more than there are."""
        return self._used[next(self._numbers) % len(self._used)]


class Runner:
    """Runs single operations on an engine, over and over, and measures them."""

    def __init__(self, engine: IoEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._finished: list[OpDone] = []
        self._running = 0

    def run(self, kind: OpKind, object_ids: range, at_least_s: float) -> Measured:
        """Do all objects, and all of them again until the time is over.

        Two batches are under way at any time, so that the engine does not wait for the end of one.
        """
        chains = [(Op(kind, object_id),) for object_id in object_ids]
        self._running = 2
        cpu_s, start_s = _cpu_s(), time.perf_counter()
        for half in (chains[::2], chains[1::2]):
            self._submit(half, start_s + at_least_s)
        self._over.wait()
        wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s() - cpu_s
        for done in self._finished:
            if done.error is not None:
                raise done.error
        return Measured(ops=len(self._finished), wall_s=wall_s, cpu_s=cpu_s)

    def _submit(self, batch: Sequence[Chain], until_s: float) -> None:
        def on_done(finished: list[OpDone]) -> None:
            with self._lock:
                self._finished += finished
            if time.perf_counter() < until_s:
                self._submit(batch, until_s)
                return
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._over.set()

        self._engine.submit(batch, Lane.LOAD, on_done)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _result(
    layout: Layout, kind: OpKind, object_bytes: int, depth: int, measured: dict[IoEngineName, list[Measured]]
) -> Result:
    threads, uring = _side(measured[THREADS], object_bytes), _side(measured[URING], object_bytes)
    rate_ratio = uring.ops_per_s / threads.ops_per_s
    cpu_ratio = uring.cpu_us_per_op / threads.cpu_us_per_op
    return Result(
        layout=layout,
        kind=kind.name.lower(),
        object_bytes=object_bytes,
        depth=depth,
        threads=threads,
        uring=uring,
        rate_ratio=rate_ratio,
        cpu_ratio=cpu_ratio,
        ahead=rate_ratio >= MIN_RATE_RATIO or (rate_ratio >= EQUAL_RATE_RATIO and cpu_ratio <= MAX_CPU_RATIO),
    )


def _side(measured: Sequence[Measured], object_bytes: int) -> Side:
    ops_per_s = statistics.median(one.ops / one.wall_s for one in measured)
    return Side(
        ops_per_s=ops_per_s,
        mb_per_s=ops_per_s * object_bytes / _MB,
        cpu_us_per_op=statistics.median(one.cpu_s * 1e6 / one.ops for one in measured),
    )


def _print_header() -> None:
    print("                               |      op/s      |     MB/s       |  CPU us/op     | uring/threads |")
    print("layout   object  kind    depth | threads  uring | threads  uring | threads  uring |  op/s    CPU  | uring")


def _print_row(one: Result) -> None:
    size = f"{one.object_bytes // MIB} MiB" if one.object_bytes >= MIB else f"{one.object_bytes >> 10} KiB"
    threads, uring = one.threads, one.uring
    parts = (
        f"{one.layout:<6} {size:>8}  {one.kind:<6} {one.depth:>6}",
        f"{threads.ops_per_s:>7.0f} {uring.ops_per_s:>6.0f}",
        f"{threads.mb_per_s:>7.0f} {uring.mb_per_s:>6.0f}",
        f"{threads.cpu_us_per_op:>7.1f} {uring.cpu_us_per_op:>6.1f}",
        f"{one.rate_ratio:>5.2f}  {one.cpu_ratio:>5.2f} ",
        "ahead" if one.ahead else "",
    )
    print(" | ".join(parts).rstrip(), flush=True)


if __name__ == "__main__":
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        # As ranks are started: idle threads of numpy's linear algebra spin for a while after their start.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606 - itself, without a shell
    sys.exit(main())
