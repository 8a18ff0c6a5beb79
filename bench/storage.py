"""The file layout against fio: bandwidth and processor time, in turns, over files of the same number and size.

    python bench/storage.py [--dir DIR] [--engine uring|threads] [--quick] [--only SIZE:DEPTH:KIND ...] [--json]

Cases are reads and writes of 128 KiB, 2 MiB and 32 MiB objects with 8 and 32 in flight. In every round each side does
a case once: ours with stamps (`--verify stamp`), ours without checks (`off`; what is written bears stamps all the
same), and fio, as disks and neighbours drift. There are as many rounds as the case's time allows, but at least three;
ratios are those of the medians. `spread` is the distance from the slowest to the fastest round over the median.

Ours is the default engine, a thread an object in flight (`--engine uring` for the other). fio does it in the same way
by `psync`, a synchronous job an object in flight; with that it is compared. Where files are read `io_uring`, one job
with all of them, is shown beside: CPython takes more processor time for an operation than that does in all.

Both sides use direct I/O, one call an object, and memory in huge pages: a direct transfer from small ones is split into
a segment a page, which costs some disks more than half of their speed, and fio's own default takes small ones. It is
told to by `--iomem_align` and a setting of glibc's malloc; `--fio-memory default` leaves fio as it comes.

Reads: fio's jobs read hard links to the very same files, each its share in order, until the time is over; ours takes
all of them in order. Writes: both create as many fresh files of that size, fio without preallocation, in a directory a
job; ours in its 256 directories, each file renamed, which is part of the layout.

What counts is the I/O alone, on both sides. Ours: see `ours.py`. fio: bytes, run time, and user and system time of its
jobs, which it takes by `getrusage` around its I/O loop. `wait4` would add fio's set-up and reporting to its side; the
first touch of its buffers falls into the loop unless `malloc` is told to fill them. Both would flatter us.

ext4 passes over inodes deleted in the last minutes at every creation of a file, so what a side pays depends on who
deleted before. So every run writes in a fresh directory, placed in a part of the disk of its own (`chattr +T`) that is
the quickest of a few, and files are removed at the end of a case, or when they would exceed `HELD_BYTES`.
"""

import argparse
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpstorage.config import GIB, MIB, IoEngineName
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys

OURS = Path(__file__).with_name("ours.py")
KEYS = ObjectKeys("bench|0|full")
"""Those of `ours.py`."""
MIN_BANDWIDTH_RATIO = 0.95
MIN_OPS_RATIO = 0.8
"""For objects too small for their bandwidth to matter."""
MAX_CPU_RATIO_STAMPED = 2.0
MAX_CPU_RATIO_PLAIN = 1.5
SMALL_OBJECT_BYTES = 128 << 10
HELD_BYTES = 4 * GIB
"""Files of a case are removed before there are more than this: every second or fourth run of a case of large objects,
so that each of the three sides comes first after a removal equally often."""
SPARE_BYTES = GIB
"""What stays free on the disk."""
MIN_ROUNDS = 3
MAX_ROUNDS = 9
_PLACES, _TRIED_FILES = 4, 8
PSYNC, IO_URING = "psync", "io_uring"
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is compared."""

    object_bytes: int
    depth: int
    kind: str

    @property
    def name(self) -> str:
        """What `--only` takes."""
        return f"{self.size.replace(' ', '').removesuffix('iB')}:{self.depth}:{self.kind}"

    @property
    def size(self) -> str:
        """Bytes of an object, for people."""
        return f"{self.object_bytes // MIB} MiB" if self.object_bytes >= MIB else f"{self.object_bytes >> 10} KiB"

    @property
    def sides(self) -> tuple[str, ...]:
        """Who does it."""
        return ("stamp", "off", PSYNC, IO_URING) if self.kind == "read" else ("stamp", "off", PSYNC)

    @property
    def objects(self) -> int:
        """How many there are: at least two for each in flight, and no more than fit `HELD_BYTES` a few times."""
        return max(2 * self.depth, _RUN_BYTES[self.object_bytes] // self.object_bytes)


_RUN_BYTES = {SMALL_OBJECT_BYTES: GIB // 4, 2 * MIB: GIB, 32 * MIB: GIB}
"""What a run writes, more or less, or finds to read; small objects are fewer bytes, as each costs a file."""

CASES = tuple(
    Case(kind=kind, object_bytes=object_bytes, depth=depth)
    for object_bytes in _RUN_BYTES
    for depth in (8, 32)
    for kind in ("read", "write")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long a case takes, removals aside, and a run that reads."""

    case_s: float
    read_s: float


FULL = Plan(case_s=36.0, read_s=1.5)
QUICK = Plan(case_s=12.0, read_s=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was moved, and what it took."""

    ops: int
    moved_bytes: int
    wall_s: float
    cpu_s: float
    payload_s: float = 0.0

    @property
    def gb_per_s(self) -> float:
        """Bandwidth in GB (1e9 bytes) a second."""
        return self.moved_bytes / _GB / self.wall_s

    @property
    def cpu_ms_per_gb(self) -> float:
        """Processor time per GB."""
        return self.cpu_s * 1e3 / (self.moved_bytes / _GB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a case: medians of its rounds."""

    gb_per_s: float
    ops_per_s: float
    cpu_ms_per_gb: float
    spread: float
    payload_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case; ratios are ours over those of `psync`: of bandwidths with stamps, of processor times per byte."""

    case: Case
    rounds: int
    stamp: Side
    off: Side
    psync: Side
    io_uring: Side | None
    bandwidth_ratio: float
    stamp_cpu_ratio: float
    off_cpu_ratio: float
    stamp_io_uring_cpu_ratio: float | None
    off_io_uring_cpu_ratio: float | None
    met: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the files are written")
    parser.add_argument("--quick", action="store_true", help="3 minutes instead of 8")
    parser.add_argument(
        "--only",
        action="append",
        metavar="SIZE:DEPTH:KIND",
        help="do only this case, for example 128K:32:write, or those that match a pattern like '2M:*:read'; repeatable",
    )
    parser.add_argument(
        "--engine",
        type=IoEngineName,
        choices=list(IoEngineName),
        default=IoEngineName.THREADS,
        help="ours",
    )
    parser.add_argument("--fio-memory", choices=("huge", "default"), default="huge", help="pages of fio's buffers")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of the table")
    args = parser.parse_args(argv)
    fio = shutil.which("fio")
    if fio is None:
        parser.error("fio is not installed; it is Debian's package of that name")
    patterns = args.only or ["*"]
    for pattern in patterns:
        if not fnmatch.filter([case.name for case in CASES], pattern):
            parser.error(f"--only {pattern}: no such case; there are {', '.join(case.name for case in CASES)}")
    free_bytes = shutil.disk_usage(args.dir).free
    if free_bytes < HELD_BYTES + SPARE_BYTES:
        parser.error(f"--dir {args.dir}: {free_bytes / GIB:.1f} GiB are free, {HELD_BYTES / GIB:.0f} are written")
    version = subprocess.run([fio, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    load = os.getloadavg()[0]
    results = []
    if not args.json:
        _print_header(f"ours by {args.engine}, {version}", load)
    for case in CASES:
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns):
            comparison = Comparison(fio, args.dir, case, args.engine, huge_pages=args.fio_memory == "huge")
            results.append(comparison.run(QUICK if args.quick else FULL))
            if not args.json:
                _print_row(results[-1])
    if args.json:
        document = {
            "engine": args.engine,
            "fio": version,
            "load": load,
            "results": [asdict(result) for result in results],
        }
        print(json.dumps(document, indent=2))
    return 0 if all(result.met for result in results) else 1


class Comparison:
    """Has all sides do one case in turns, in a directory of its own."""

    def __init__(self, fio: str, parent: Path, case: Case, engine: IoEngineName, *, huge_pages: bool) -> None:
        self._fio = fio
        self._engine = engine
        self._huge_pages = huge_pages
        self._case = case
        self._directory = Path(tempfile.mkdtemp(prefix="bench-storage-", dir=parent))
        self._held: list[Path] = []
        # Not all file systems have it, and those that have not do without.
        subprocess.run(["chattr", "+T", self._directory], check=False, stderr=subprocess.DEVNULL)  # noqa: S607

    def run(self, plan: Plan) -> Result:
        """Do as many rounds as the plan allows."""
        case = self._case
        sides: dict[str, list[Measured]] = {name: [] for name in case.sides}
        try:
            until_s = time.monotonic() + plan.case_s
            if case.kind == "read":
                place = self._new_place()
                written = Case(object_bytes=case.object_bytes, depth=case.depth, kind="write")
                _run_ours(written, place, "off", 0, self._engine)
                _link(case, place)
            while len(sides[PSYNC]) < MIN_ROUNDS or (len(sides[PSYNC]) < MAX_ROUNDS and time.monotonic() < until_s):
                for name in case.sides:
                    sides[name].append(self._run_side(name, plan.read_s))
        finally:
            shutil.rmtree(self._directory)
        return _result(case, sides)

    def _run_side(self, name: str, read_s: float) -> Measured:
        place = self._held[0] if self._case.kind == "read" else self._new_place()
        if name in {PSYNC, IO_URING}:
            return _run_fio(self._fio, self._case, place, read_s, name, huge_pages=self._huge_pages)
        return _run_ours(self._case, place, name, read_s, self._engine)

    def _new_place(self) -> Path:
        """A directory to write the case's files in; earlier ones are removed if space calls for it."""
        run_bytes = self._case.objects * self._case.object_bytes
        free_bytes = shutil.disk_usage(self._directory).free
        if (len(self._held) + 1) * run_bytes > HELD_BYTES or free_bytes < run_bytes + SPARE_BYTES:
            for place in self._held:
                shutil.rmtree(place)
            self._held.clear()
        place = min((Path(tempfile.mkdtemp(dir=self._directory)) for _ in range(_PLACES)), key=_creation_s)
        self._held.append(place)
        return place


def _creation_s(place: Path) -> float:
    """How long it takes at best to create a file."""
    (place / "tried").mkdir()
    times_s = []
    for number in range(_TRIED_FILES):
        start_s = time.perf_counter()
        os.close(os.open(place / "tried" / str(number), os.O_WRONLY | os.O_CREAT))
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


def _link(case: Case, place: Path) -> None:
    """Make hard links to all objects, in one directory a job."""
    store = FileStore(place / "objects", KEYS, case.object_bytes)
    for job in range(case.depth):
        (place / "jobs" / str(job)).mkdir(parents=True)
    for object_id in range(case.objects):
        os.link(store.path(object_id), place / "jobs" / str(object_id % case.depth) / str(object_id))


def _run_ours(case: Case, place: Path, verify: str, read_s: float, engine: IoEngineName) -> Measured:
    words = [case.kind, place / "objects", case.object_bytes, case.objects, case.depth, verify, read_s, engine]
    # As ranks are started: idle threads of numpy's linear algebra spin for a while after their start.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(OURS), *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Measured(**json.loads(done.stdout))


def _run_fio(fio: str, case: Case, place: Path, read_s: float, engine: str, *, huge_pages: bool) -> Measured:
    command = [fio, "--output-format=json", "--direct=1", f"--ioengine={engine}", f"--bs={case.object_bytes}"]
    command += ["--file_service_type=sequential"]
    command += ["--iomem_align=2M"] if huge_pages else []
    if case.kind == "read":
        command += ["--rw=read", "--time_based", f"--runtime={read_s * 1e3:.0f}ms"]
    else:
        command += ["--rw=write", f"--filesize={case.object_bytes}", f"--nrfiles={case.objects // case.depth}"]
        command += ["--create_on_open=1", "--fallocate=none"]
    if engine == IO_URING:
        # As many files are open as objects are in flight; the links of all jobs are below this directory.
        command += [f"--iodepth={case.depth}", f"--openfiles={case.depth}", "--name=job", f"--opendir={place / 'jobs'}"]
    else:
        command += ["--openfiles=1"]
        for job in range(case.depth):
            jobs_place = place / "jobs" / str(job)
            jobs_place.mkdir(parents=True, exist_ok=True)
            command += [f"--name=job{job}", f"--{'opendir' if case.kind == 'read' else 'directory'}={jobs_place}"]
    # glibc takes huge pages, and fills what it allocates with this byte. fio's own --ramp_time cannot be used for the
    # latter: in 3.33 jobs that are done with their files during that time may report nothing.
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    if huge_pages:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    # fio puts notes of its own before the JSON document.
    jobs: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    moved_bytes = sum(job[case.kind]["io_bytes"] for job in jobs)
    if case.kind == "write" and moved_bytes != case.objects * case.object_bytes:
        raise AssertionError(f"fio wrote {moved_bytes} bytes of {case.objects} objects")
    return Measured(
        ops=moved_bytes // case.object_bytes,
        moved_bytes=moved_bytes,
        wall_s=max(job[case.kind]["runtime"] for job in jobs) / 1e3,
        cpu_s=sum((job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3 for job in jobs),
    )


def _result(case: Case, measured: dict[str, list[Measured]]) -> Result:
    sides = {name: _side(measured[name]) for name in case.sides}
    stamp, off, psync, io_uring = sides["stamp"], sides["off"], sides[PSYNC], sides.get(IO_URING)
    ratio = stamp.gb_per_s / psync.gb_per_s
    stamp_cpu_ratio, off_cpu_ratio = stamp.cpu_ms_per_gb / psync.cpu_ms_per_gb, off.cpu_ms_per_gb / psync.cpu_ms_per_gb
    if case.object_bytes <= SMALL_OBJECT_BYTES:
        met = ratio >= MIN_OPS_RATIO
    else:
        met = (
            ratio >= MIN_BANDWIDTH_RATIO
            and stamp_cpu_ratio <= MAX_CPU_RATIO_STAMPED
            and off_cpu_ratio <= MAX_CPU_RATIO_PLAIN
        )
    return Result(
        case=case,
        rounds=len(measured[PSYNC]),
        stamp=stamp,
        off=off,
        psync=psync,
        io_uring=io_uring,
        bandwidth_ratio=ratio,
        stamp_cpu_ratio=stamp_cpu_ratio,
        off_cpu_ratio=off_cpu_ratio,
        stamp_io_uring_cpu_ratio=None if io_uring is None else stamp.cpu_ms_per_gb / io_uring.cpu_ms_per_gb,
        off_io_uring_cpu_ratio=None if io_uring is None else off.cpu_ms_per_gb / io_uring.cpu_ms_per_gb,
        met=met,
    )


def _side(measured: Sequence[Measured]) -> Side:
    rates = [one.gb_per_s for one in measured]
    gb_per_s = statistics.median(rates)
    return Side(
        gb_per_s=gb_per_s,
        ops_per_s=statistics.median(one.ops / one.wall_s for one in measured),
        cpu_ms_per_gb=statistics.median(one.cpu_ms_per_gb for one in measured),
        spread=(max(rates) - min(rates)) / gb_per_s,
        payload_share=statistics.median(one.payload_s / one.cpu_s for one in measured),
    )


def _print_header(version: str, load: float) -> None:
    print(f"{version}, {os.cpu_count()} processors, load {load:.1f}; ratios are ours over fio's")
    groups = (
        " " * 30,
        f"{'GB/s (spread)':^47}",
        " " * 5,
        f"{'CPU ms/GB':^23}",
        f"{'of psync':^11}",
        f"{'of io_uring':^11}",
        "stamps",
    )
    columns = (
        "  object depth   kind  rounds ",
        " ".join(f"{name:>11}" for name in ("stamp", "off", PSYNC, IO_URING)),
        "ratio",
        "stamp   off psync uring",
        "stamp   off",
        "stamp   off",
        "of CPU",
    )
    print(" | ".join(groups), " | ".join(columns), sep="\n")


def _print_row(one: Result) -> None:
    case, sides = one.case, (one.stamp, one.off, one.psync, one.io_uring)
    ratios = (one.stamp_cpu_ratio, one.off_cpu_ratio, one.stamp_io_uring_cpu_ratio, one.off_io_uring_cpu_ratio)
    shown = [f"{'-' if ratio is None else format(ratio, '.2f'):>5}" for ratio in ratios]
    parts = (
        f"{case.size:>8} {case.depth:>5}  {case.kind:<5} {one.rounds:>7}",
        " ".join(f"{'-':>11}" if side is None else f"{side.gb_per_s:>5.2f} ({side.spread:>3.0%})" for side in sides),
        f"{one.bandwidth_ratio:>5.2f}",
        " ".join(f"{'-' if side is None else format(side.cpu_ms_per_gb, '.0f'):>5}" for side in sides),
        " ".join(shown[:2]),
        " ".join(shown[2:]),
        f"{one.stamp.payload_share:>6.1%}",
        "met" if one.met else "MISSED",
    )
    print(" | ".join(parts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
