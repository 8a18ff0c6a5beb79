"""How much the storage bandwidth differs from run to run: ours beside fio's, in turns.

    python bench/trials.py [--dir DIR] [--seconds N] [--trials N] [--json]

In every round the installed command plays the same closed loop once, without think and compute time, so that the
storage is busy all the time; then fio does random reads and writes in the same proportion, of the same size, with as
many in flight, both with direct I/O and in place: ours in a slab, as what files cost that are created and deleted hangs
on the file system's past. What is compared is the coefficient of variation (standard deviation of the sample over the
mean) of the bytes moved a second. A disk whose own speed wanders shows in both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlpstorage.config import GIB

PROGRAM = Path(sys.executable).parent / "mlpstorage"
MAX_CV_RATIO = 1.5
DEPTH = 8
STORAGE_GIB = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run both sides in turns; returns 1 where ours varies too much."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a run")
    parser.add_argument("--trials", type=int, default=5, help="runs of each side")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of the table")
    args = parser.parse_args(argv)
    ours: list[float] = []
    fio: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-trials-", dir=args.dir) as place:
        for trial in range(args.trials):
            summary = _ours(Path(place), args.seconds)
            storage = summary["storage"]
            ours.append(storage["read_gib_per_s"] + storage["write_gib_per_s"])
            fio.append(_fio(Path(place), args.seconds, storage))
            if not args.json:
                print(f"trial {trial + 1}: ours {ours[-1]:.3f} GiB/s, fio {fio[-1]:.3f} GiB/s", flush=True)
    met = _cv(ours) <= MAX_CV_RATIO * _cv(fio)
    if args.json:
        print(json.dumps({"ours_gib_per_s": ours, "fio_gib_per_s": fio, "ours_cv": _cv(ours), "fio_cv": _cv(fio)}))
    else:
        print(
            f"mean: ours {statistics.fmean(ours):.3f}, fio {statistics.fmean(fio):.3f} GiB/s; "
            f"coefficient of variation: ours {_cv(ours):.1%}, fio {_cv(fio):.1%}, ratio {_cv(ours) / _cv(fio):.2f} "
            f"({'met' if met else 'MISSED'}: at most {MAX_CV_RATIO:g})"
        )
    return 0 if met else 1


def _ours(place: Path, seconds: float) -> dict[str, Any]:
    command = [str(PROGRAM), "kvcache", "run", "--json", "--results-dir", str(place / "results")]
    command += ["--cache-dir", str(place / "cache"), "--model", "tiny-1b", "--num-users", "64", "--seed", "42"]
    command += ["--generation-mode", "none", "--gpu-mem-gb", "0", "--cpu-mem-gb", "0"]
    command += ["--layout", "slab", "--storage-gb", str(STORAGE_GIB), "--io-depth", str(DEPTH)]
    command += ["--duration", str(seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    summary: dict[str, Any] = json.loads(done.stdout)["summary"]
    return summary


def _fio(place: Path, seconds: float, storage: dict[str, Any]) -> float:
    """GiB a second that fio moves, of files as large as our tier, in our proportion of reads and object size."""
    object_bytes = storage["read_bytes"] // storage["read_ops"]
    reads_pct = round(100 * storage["read_ops"] / (storage["read_ops"] + storage["write_ops"]))
    files = place / "fio"
    files.mkdir(exist_ok=True)
    command = ["fio", "--output-format=json", "--name=mixed", f"--directory={files}", "--rw=randrw"]
    command += [f"--rwmixread={reads_pct}", f"--bs={object_bytes}", "--direct=1", "--ioengine=psync"]
    command += [f"--numjobs={DEPTH}", f"--size={STORAGE_GIB * GIB // DEPTH}", "--iomem_align=2M", "--group_reporting"]
    command += ["--time_based", f"--runtime={seconds:.0f}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    moved_bytes, runtime_ms = job["read"]["io_bytes"] + job["write"]["io_bytes"], job["job_runtime"] / DEPTH
    return float(moved_bytes / GIB / (runtime_ms / 1e3))


def _cv(values: Sequence[float]) -> float:
    return statistics.stdev(values) / statistics.fmean(values)


if __name__ == "__main__":
    sys.exit(main())
