"""Read bandwidth and client CPU of the I/O threads against fio, over the same files, in turns.

    python bench/fio_ratio.py [--dir DIR] [--quick] [--json]

For each object size the files are written once, through `FileStore` and `IoPool`. Then both read all of them, in turns,
as disks and neighbours drift: eight threads (ours, every page's stamp checked) against eight synchronous jobs (fio, which
checks nothing), direct, one call an object. fio's jobs read hard links to the very same files, an eighth each.

What is measured is the reading alone, on both sides. Ours: wall clock and `getrusage` of a fresh process from the hand-over
of the batch to its completion, after each thread has read one object. fio: `bw` of its group, and user plus system time
of its jobs, which it takes by `getrusage` around the I/O loop, after its buffers are laid out; the CPU of its set-up and
its reporting (which `wait4` would add to fio's side, and which is larger than ours) is left out. The ratios are of the
medians over the rounds.
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
"""Share of the space that is to be written which must be free beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One reading of all files: bytes, and what it took."""

    read_bytes: int
    wall_s: float
    cpu_s: float

    @property
    def gb_per_s(self) -> float:
        """Bandwidth in GB (1e9 bytes) a second."""
        return self.read_bytes / _GB / self.wall_s

    @property
    def cpu_ms_per_gb(self) -> float:
        """Processor time per GB read."""
        return self.cpu_s * 1e3 / (self.read_bytes / _GB)


class AllThreadsOnce:
    """The store, except that each read waits until every thread has come to one: so all get to touch their buffer."""

    def __init__(self, store: FileStore) -> None:
        self.object_bytes = store.object_bytes
        self.stored_bytes = store.stored_bytes
        self.open = store.open
        self.write = store.write
        self.delete = store.delete
        self.close = store.close
        self._read = store.read
        self._all_here = threading.Barrier(THREADS)
        self._warm = False

    def read(self, block_id: int, buffer: memoryview) -> bool:
        """Read an object."""
        if not self._warm:
            self._all_here.wait()
            self._warm = True
        return self._read(block_id, buffer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the files are written")
    parser.add_argument("--quick", action="store_true", help="1 GiB and 3 rounds instead of 2 GiB and 7")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of the table")
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "BYTES"), help=argparse.SUPPRESS)
    parser.add_argument("--objects", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        root, object_bytes = args.child
        print(json.dumps(asdict(_read_in_this_process(Path(root), int(object_bytes), args.objects))))
        return 0
    if shutil.which("fio") is None:
        parser.error("fio is not installed; it is Debian's package of that name")
    total_bytes, rounds = (GIB, 3) if args.quick else (2 * GIB, 7)
    free_bytes = shutil.disk_usage(args.dir).free
    if free_bytes < total_bytes * _FREE_FACTOR:
        parser.error(f"--dir {args.dir}: {free_bytes / GIB:.1f} GiB are free, {total_bytes / GIB:.0f} are written")
    results = [_compare(args.dir, size, total_bytes // size, rounds) for size in OBJECT_BYTES]
    if args.json:
        print(json.dumps({"fio": _fio_version(), "threads": THREADS, "results": results}, indent=2))
    else:
        _print_table(results)
    return 0 if all(result["met"] for result in results) else 1


def _compare(parent: Path, object_bytes: int, objects: int, rounds: int) -> dict[str, object]:
    """Write the files, have both read them in turns, and remove them."""
    directory = Path(tempfile.mkdtemp(prefix="fio-ratio-", dir=parent))
    claim = CacheDirectory.claim(directory, "bench")
    links = directory / "fio"
    try:
        written = _write(claim.objects, object_bytes, objects)
        _link(claim.objects, links, object_bytes, objects)
        ours: list[Round] = []
        theirs: list[Round] = []
        for number in range(rounds):
            turns = [(ours, _read_ours), (theirs, _read_fio)]
            for results, read in turns if number % 2 else reversed(turns):
                results.append(read(directory, object_bytes, objects))
    finally:
        shutil.rmtree(links, ignore_errors=True)
        claim.remove_objects()
        claim.release()
        directory.rmdir()
    return _result(object_bytes, objects, written, ours, theirs)


def _result(object_bytes: int, objects: int, written: Round, ours: list[Round], theirs: list[Round]) -> dict[str, object]:
    our_gb_per_s, fio_gb_per_s = (statistics.median(one.gb_per_s for one in side) for side in (ours, theirs))
    our_cpu, fio_cpu = (statistics.median(one.cpu_ms_per_gb for one in side) for side in (ours, theirs))
    bandwidth_ratio, cpu_ratio = our_gb_per_s / fio_gb_per_s, our_cpu / fio_cpu
    return {
        "object_bytes": object_bytes,
        "objects": objects,
        "write_gb_per_s": written.gb_per_s,
        "write_cpu_ms_per_gb": written.cpu_ms_per_gb,
        "read_gb_per_s": our_gb_per_s,
        "fio_read_gb_per_s": fio_gb_per_s,
        "bandwidth_ratio": bandwidth_ratio,
        "read_cpu_ms_per_gb": our_cpu,
        "fio_read_cpu_ms_per_gb": fio_cpu,
        "cpu_ratio": cpu_ratio,
        "met": bandwidth_ratio >= MIN_BANDWIDTH_RATIO and cpu_ratio <= MAX_CPU_RATIO,
        "rounds": [{"ours": asdict(our), "fio": asdict(fio)} for our, fio in zip(ours, theirs, strict=True)],
    }


def _write(root: Path, object_bytes: int, objects: int) -> Round:
    store = FileStore(root, NAMESPACE, object_bytes)
    store.open()
    if store.direct_refusal:
        sys.exit(f"{store.direct_refusal}: nothing to compare")
    pool = IoPool(store, Payload(NAMESPACE, store.stored_bytes), None, THREADS)
    pool.start()
    written = _timed(pool, Lane.STORE, [(Op(OpKind.WRITE, block_id),) for block_id in range(objects)], object_bytes)
    pool.close()
    return written


def _link(root: Path, links: Path, object_bytes: int, objects: int) -> None:
    """Hard links to all objects, in one directory a job."""
    store = FileStore(root, NAMESPACE, object_bytes)
    for job in range(THREADS):
        (links / str(job)).mkdir(parents=True)
    for block_id in range(objects):
        os.link(store.path(block_id), links / str(block_id % THREADS) / f"{block_id}")


def _read_ours(directory: Path, object_bytes: int, objects: int) -> Round:
    command = [sys.executable, __file__, "--child", str(directory / "bench"), str(object_bytes), "--objects", str(objects)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Round(**json.loads(done.stdout))


def _read_in_this_process(root: Path, object_bytes: int, objects: int) -> Round:
    file_store = FileStore(root, NAMESPACE, object_bytes)
    file_store.open()
    pool = IoPool(AllThreadsOnce(file_store), Payload(NAMESPACE, file_store.stored_bytes), None, THREADS)
    pool.start()
    chains = [(Op(OpKind.READ, block_id),) for block_id in range(objects)]
    _timed(pool, Lane.LOAD, chains[:THREADS], object_bytes)
    result = _timed(pool, Lane.LOAD, chains, object_bytes)
    pool.close()
    return result


def _timed(pool: IoPool, lane: Lane, chains: list[tuple[Op, ...]], object_bytes: int) -> Round:
    """Run a batch; every operation must succeed, directly, and reads must have been checked in full."""
    finished: list[OpDone] = []
    over = threading.Event()

    def on_done(done: list[OpDone]) -> None:
        finished.extend(done)
        over.set()

    cpu_s, wall_s = _cpu_s(), time.perf_counter()
    pool.submit(chains, lane, on_done)
    over.wait()
    wall_s, cpu_s = time.perf_counter() - wall_s, _cpu_s() - cpu_s
    for done in finished:
        if done.error is not None:
            raise done.error
        if not done.direct or (done.op.kind is OpKind.READ and done.verified_bytes != object_bytes):
            raise AssertionError(f"{done.op} was not direct or not checked")
    return Round(read_bytes=len(finished) * object_bytes, wall_s=wall_s, cpu_s=cpu_s)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _read_fio(directory: Path, object_bytes: int, objects: int) -> Round:
    command = ["fio", "--output-format=json", "--rw=read", "--direct=1", "--ioengine=psync", f"--bs={object_bytes}"]
    command += ["--file_service_type=sequential"]
    for job in range(THREADS):
        command += [f"--name=job{job}", f"--opendir={directory / 'fio' / str(job)}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=directory)
    # fio puts notes of its own before the JSON document.
    jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    read_bytes = sum(job["read"]["io_bytes"] for job in jobs)
    if read_bytes != objects * object_bytes:
        raise AssertionError(f"fio read {read_bytes} bytes of {objects * object_bytes}")
    # The slowest job ends the reading, as our batch ends with its last object.
    wall_s = max(job["read"]["runtime"] for job in jobs) / 1e3
    cpu_s = sum((job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3 for job in jobs)
    return Round(read_bytes=read_bytes, wall_s=wall_s, cpu_s=cpu_s)


def _fio_version() -> str:
    return subprocess.run(["fio", "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _print_table(results: list[dict[str, object]]) -> None:
    print(f"{'':>10} {'read GB/s':>18} {'':>6} {'CPU ms/GB':>18} {'':>6} {'write':>6} {'CPU':>6}")
    print(f"{'object':>10} {'ours':>9}{'fio':>9} {'ratio':>6} {'ours':>9}{'fio':>9} {'ratio':>6} {'GB/s':>6} {'ms/GB':>6}")
    for one in results:
        print(
            f"{int(str(one['object_bytes'])) // MIB:>6} MiB {one['read_gb_per_s']:>9.2f}{one['fio_read_gb_per_s']:>9.2f} "
            f"{one['bandwidth_ratio']:>6.2f} {one['read_cpu_ms_per_gb']:>9.1f}{one['fio_read_cpu_ms_per_gb']:>9.1f} "
            f"{one['cpu_ratio']:>6.2f} {one['write_gb_per_s']:>6.2f} {one['write_cpu_ms_per_gb']:>6.1f}  "
            f"{'met' if one['met'] else 'MISSED'}"
        )


if __name__ == "__main__":
    sys.exit(main())
