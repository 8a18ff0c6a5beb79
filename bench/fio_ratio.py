"""Read bandwidth and client CPU of the I/O threads against fio, over the same files, in turns.

    python bench/fio_ratio.py [--dir DIR] [--quick] [--json]

For each object size the files are written once, through `FileStore` and `IoPool`. Then both read them for the same
time, in turns, as disks and neighbours drift: eight threads (ours, every page's stamp checked) against eight
synchronous jobs (fio, which checks nothing); direct, one call an object. fio's jobs read hard links to the very same
files, an eighth each. The ratios are of the medians over the rounds.

What counts is the reading alone, on both sides. Ours: wall clock and `getrusage` of a fresh process from the hand-over
of the first batch to the end of the last, after each thread has read one object. fio: bytes, run time and user and
system time of its jobs, which it takes by `getrusage` around its I/O loop. `wait4` would add fio's set-up and reporting
to its side; the first touch of its buffers falls into the loop unless `malloc` is told to fill them. Both would flatter
us.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpstorage.config import GIB, MIB
from mlpstorage.storage.cache_dir import CacheDirectory
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.ops import Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import IoPool

THREADS = 8
NAMESPACE = "bench|0|full"
OBJECT_BYTES = (2 * MIB, 32 * MIB)
MIN_BANDWIDTH_RATIO = 0.9
MAX_CPU_RATIO = 3.0
_GB = 1e9
_FREE_FACTOR = 1.25
"""How many times the space that is written must be free beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is written and for how long it is read."""

    total_bytes: int
    rounds: int
    read_s: float


FULL = Plan(total_bytes=2 * GIB, rounds=7, read_s=3.0)
QUICK = Plan(total_bytes=GIB, rounds=3, read_s=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes that were moved, and what it took."""

    moved_bytes: int
    wall_s: float
    cpu_s: float

    @property
    def gb_per_s(self) -> float:
        """Bandwidth in GB (1e9 bytes) a second."""
        return self.moved_bytes / _GB / self.wall_s

    @property
    def cpu_ms_per_gb(self) -> float:
        """Processor time per GB."""
        return self.cpu_s * 1e3 / (self.moved_bytes / _GB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Medians at one object size."""

    object_bytes: int
    objects: int
    read_gb_per_s: float
    fio_read_gb_per_s: float
    bandwidth_ratio: float
    read_cpu_ms_per_gb: float
    fio_read_cpu_ms_per_gb: float
    cpu_ratio: float
    met: bool
    write_gb_per_s: float
    write_cpu_ms_per_gb: float
    ours: list[Measured]
    fio: list[Measured]


class WarmingStore:
    """A store in which threads wait for each other in their first operation, so that each gets to touch its buffer."""

    def __init__(self, store: FileStore) -> None:
        self.object_bytes = store.object_bytes
        self.stored_bytes = store.stored_bytes
        self.open = store.open
        self.delete = store.delete
        self.close = store.close
        self._store = store
        self._all_here = threading.Barrier(THREADS)
        self._warm = False

    def read(self, block_id: int, buffer: memoryview) -> bool:
        """Read an object."""
        if not self._warm:
            self._wait()
        return self._store.read(block_id, buffer)

    def write(self, block_id: int, buffer: memoryview) -> bool:
        """Write an object."""
        if not self._warm:
            self._wait()
        return self._store.write(block_id, buffer)

    def _wait(self) -> None:
        self._all_here.wait()
        self._warm = True


class Runner:
    """Runs chains of single operations on a pool, over and over, and measures them."""

    def __init__(self, pool: IoPool, object_bytes: int) -> None:
        self._pool = pool
        self._object_bytes = object_bytes
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._finished: list[OpDone] = []
        self._running = 0

    def run(self, kind: OpKind, objects: int, at_least_s: float) -> Measured:
        """Do all objects, and all of them again until the time is over.

        Two batches are under way at any time, so that threads do not wait for the end of one.
        """
        lane = Lane.STORE if kind is OpKind.WRITE else Lane.LOAD
        chains = [(Op(kind, block_id),) for block_id in range(objects)]
        halves = [half for half in (chains[::2], chains[1::2]) if half]
        self._over.clear()
        self._finished = []
        self._running = len(halves)
        cpu_s, start_s = _cpu_s(), time.perf_counter()
        for half in halves:
            self._submit(half, lane, start_s + at_least_s)
        self._over.wait()
        wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s() - cpu_s
        self._check()
        return Measured(moved_bytes=len(self._finished) * self._object_bytes, wall_s=wall_s, cpu_s=cpu_s)

    def _submit(self, chains: Sequence[Sequence[Op]], lane: Lane, until_s: float) -> None:
        def on_done(finished: list[OpDone]) -> None:
            with self._lock:
                self._finished += finished
            if time.perf_counter() < until_s:
                self._submit(chains, lane, until_s)
                return
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._over.set()

        self._pool.submit(chains, lane, on_done)

    def _check(self) -> None:
        """Every operation must have succeeded, directly, and every read must have been checked in full."""
        for done in self._finished:
            if done.error is not None:
                raise done.error
            if not done.direct or (done.op.kind is OpKind.READ and done.verified_bytes != self._object_bytes):
                raise AssertionError(f"{done.op} was not direct or not checked")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the files are written")
    parser.add_argument("--quick", action="store_true", help="1 GiB, 3 short rounds, instead of 2 GiB and 7")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of the table")
    # How the script starts itself for our half of a round.
    parser.add_argument("--read", nargs=4, metavar=("ROOT", "BYTES", "OBJECTS", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.read:
        root, object_bytes, objects, read_s = args.read
        measured = _read_in_this_process(Path(root), int(object_bytes), int(objects), float(read_s))
        print(json.dumps(asdict(measured)))
        return 0
    fio = shutil.which("fio")
    if fio is None:
        parser.error("fio is not installed; it is Debian's package of that name")
    plan = QUICK if args.quick else FULL
    free_bytes = shutil.disk_usage(args.dir).free
    if free_bytes < plan.total_bytes * _FREE_FACTOR:
        parser.error(f"--dir {args.dir}: {free_bytes / GIB:.1f} GiB are free, {plan.total_bytes / GIB:.0f} are written")
    results = [_compare(fio, args.dir, size, plan) for size in OBJECT_BYTES]
    if args.json:
        version = subprocess.run([fio, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        document = {"fio": version, "threads": THREADS, "results": [asdict(result) for result in results]}
        print(json.dumps(document, indent=2))
    else:
        _print_table(results)
    return 0 if all(result.met for result in results) else 1


def _compare(fio: str, parent: Path, object_bytes: int, plan: Plan) -> Result:
    """Write the files, have both read them in turns, and remove them."""
    objects = plan.total_bytes // object_bytes
    directory = Path(tempfile.mkdtemp(prefix="fio-ratio-", dir=parent))
    claim = CacheDirectory.claim(directory, "bench")
    links = directory / "fio"
    ours: list[Measured] = []
    theirs: list[Measured] = []
    try:
        written = _write(claim.objects, object_bytes, objects)
        _link(claim.objects, links, object_bytes, objects)
        for _ in range(plan.rounds):
            ours.append(_read_ours(claim.objects, object_bytes, objects, plan.read_s))
            theirs.append(_read_fio(fio, links, object_bytes, plan.read_s))
    finally:
        shutil.rmtree(links, ignore_errors=True)
        claim.remove_objects()
        claim.release()
        directory.rmdir()
    our_gb_per_s, fio_gb_per_s = (statistics.median(one.gb_per_s for one in side) for side in (ours, theirs))
    our_cpu, fio_cpu = (statistics.median(one.cpu_ms_per_gb for one in side) for side in (ours, theirs))
    bandwidth_ratio, cpu_ratio = our_gb_per_s / fio_gb_per_s, our_cpu / fio_cpu
    return Result(
        object_bytes=object_bytes,
        objects=objects,
        read_gb_per_s=our_gb_per_s,
        fio_read_gb_per_s=fio_gb_per_s,
        bandwidth_ratio=bandwidth_ratio,
        read_cpu_ms_per_gb=our_cpu,
        fio_read_cpu_ms_per_gb=fio_cpu,
        cpu_ratio=cpu_ratio,
        met=bandwidth_ratio >= MIN_BANDWIDTH_RATIO and cpu_ratio <= MAX_CPU_RATIO,
        write_gb_per_s=written.gb_per_s,
        write_cpu_ms_per_gb=written.cpu_ms_per_gb,
        ours=ours,
        fio=theirs,
    )


def _write(root: Path, object_bytes: int, objects: int) -> Measured:
    store = FileStore(root, NAMESPACE, object_bytes)
    store.open()
    if store.direct_refusal:
        sys.exit(f"{store.direct_refusal}: nothing to compare")
    return _measured(store, OpKind.WRITE, objects, 0)


def _link(root: Path, links: Path, object_bytes: int, objects: int) -> None:
    """Hard links to all objects, in one directory a job."""
    store = FileStore(root, NAMESPACE, object_bytes)
    for job in range(THREADS):
        (links / str(job)).mkdir(parents=True)
    for block_id in range(objects):
        os.link(store.path(block_id), links / str(block_id % THREADS) / str(block_id))


def _read_ours(root: Path, object_bytes: int, objects: int, read_s: float) -> Measured:
    command = [sys.executable, __file__, "--read", str(root), str(object_bytes), str(objects), str(read_s)]
    # As ranks are started: idle threads of numpy's linear algebra spin for a while after their start.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Measured(**json.loads(done.stdout))


def _read_in_this_process(root: Path, object_bytes: int, objects: int, read_s: float) -> Measured:
    store = FileStore(root, NAMESPACE, object_bytes)
    store.open()
    return _measured(store, OpKind.READ, objects, read_s)


def _measured(store: FileStore, kind: OpKind, objects: int, at_least_s: float) -> Measured:
    pool = IoPool(WarmingStore(store), Payload(NAMESPACE, store.stored_bytes), None, THREADS)
    pool.start()
    try:
        runner = Runner(pool, store.object_bytes)
        runner.run(kind, THREADS, 0)
        return runner.run(kind, objects, at_least_s)
    finally:
        pool.close()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _read_fio(fio: str, links: Path, object_bytes: int, read_s: float) -> Measured:
    command = [fio, "--output-format=json", "--rw=read", "--direct=1", "--ioengine=psync", f"--bs={object_bytes}"]
    command += ["--file_service_type=sequential", "--time_based", f"--runtime={read_s:.0f}s"]
    for job in range(THREADS):
        command += [f"--name=job{job}", f"--opendir={links / str(job)}"]
    # glibc fills what it allocates with this byte. fio's own --ramp_time cannot be used for the purpose: in 3.33 jobs
    # that are done with their files during that time may report nothing.
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    # fio puts notes of its own before the JSON document.
    jobs: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    moved_bytes = sum(job["read"]["io_bytes"] for job in jobs)
    gb_per_s = sum(job["read"]["io_bytes"] / _GB / (job["read"]["runtime"] / 1e3) for job in jobs)
    cpu_s = sum((job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3 for job in jobs)
    return Measured(moved_bytes=moved_bytes, wall_s=moved_bytes / _GB / gb_per_s, cpu_s=cpu_s)


def _print_table(results: list[Result]) -> None:
    print("  object   read GB/s:  ours    fio  ratio   CPU ms/GB:  ours    fio  ratio   target   write GB/s  CPU ms/GB")
    for one in results:
        print(
            f"{one.object_bytes // MIB:>4} MiB {one.read_gb_per_s:>17.2f} {one.fio_read_gb_per_s:>6.2f} "
            f"{one.bandwidth_ratio:>6.2f} {one.read_cpu_ms_per_gb:>18.1f} {one.fio_read_cpu_ms_per_gb:>6.1f} "
            f"{one.cpu_ratio:>6.2f} {'met' if one.met else 'MISSED':>8} {one.write_gb_per_s:>12.2f} "
            f"{one.write_cpu_ms_per_gb:>10.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
