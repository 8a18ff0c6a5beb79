"""What each layout profile does to one and the same workload, on one and the same storage.

    python bench/profiles.py [--dir DIR] [--seconds N] [--trace FILE] [--json] [profile ...]

Every profile is run once by the installed command, with its own blocks, layout, threads and policies, and otherwise
with equal sizes. The DRAM and GPU tiers are empty, so that what is found is found on storage.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlpstorage.spec.profiles import PROFILES

PROGRAM = Path(sys.executable).parent / "mlpstorage"

_COLUMNS = (
    ("profile", 16),
    ("layout", 7),
    ("object", 9),
    ("depth", 6),
    ("read GiB/s", 11),
    ("write GiB/s", 12),
    ("read p95 ms", 12),
    ("load p95 ms", 12),
    ("TTFT p95 ms", 12),
    ("hit tokens", 11),
    ("dropped", 8),
    ("deferred", 9),
    ("CPU ms/GiB", 11),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the profiles; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("profiles", nargs="*", help=f"which ones; default: {' '.join(PROFILES)}")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the cache files go")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measured window")
    parser.add_argument("--trace", type=Path, help="play this trace instead of synthetic users")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of the table")
    args = parser.parse_args(argv)
    rows = []
    if not args.json:
        print(" ".join(f"{name:>{width}}" for name, width in _COLUMNS))
    for profile in args.profiles or PROFILES:
        rows.append(_run(profile, args.dir, args.seconds, args.trace))
        if not args.json:
            cells = _cells(rows[-1])
            print(" ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0 if all(row["exit_code"] == 0 for row in rows) else 1


def _run(profile: str, directory: Path, seconds: float, trace: Path | None) -> dict[str, Any]:
    """Run one profile; its numbers as a dictionary."""
    with tempfile.TemporaryDirectory(prefix="bench-profiles-", dir=directory) as place:
        command = [str(PROGRAM), "kvcache", "run", "--json", "--results-dir", f"{place}/results"]
        command += ["--profile", profile, "--cache-dir", f"{place}/cache", "--model", "tiny-1b", "--storage-gb", "6"]
        command += ["--gpu-mem-gb", "0", "--cpu-mem-gb", "0", "--duration", str(seconds)]
        if trace is None:
            command += ["--num-users", "64", "--generation-mode", "fast"]
        else:
            command += ["--trace", str(trace), "--time-scale", "0.05", "--generation-mode", "none"]
        ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    document = json.loads(ended.stdout) if ended.stdout else {}
    return {"profile": profile, "exit_code": ended.returncode, **document}


def _cells(row: dict[str, Any]) -> list[str]:
    if "summary" not in row:
        return [row["profile"], f"exit {row['exit_code']}", *[""] * (len(_COLUMNS) - 2)]
    summary, parameters = row["summary"], row["metadata"]["parameters"]
    storage, latency = summary["storage"], summary["latency"]
    moved_ops = storage["write_ops"] + storage["read_ops"]
    object_kib = (storage["written_bytes"] + storage["read_bytes"]) / moved_ops / 1024 if moved_ops else None
    return [
        row["profile"],
        parameters["layout"],
        "-" if object_kib is None else f"{object_kib:.0f} KiB",
        str(parameters["io_depth"]),
        _number(storage["read_gib_per_s"], 2),
        _number(storage["write_gib_per_s"], 2),
        _number(latency["storage_read"]["p95_ms"], 1),
        _number(latency["request_load"]["p95_ms"], 1),
        _number(latency["ttft"]["p95_ms"], 1),
        _number(summary["hit_ratio"]["tokens"]["total"], 3),
        str(storage["writes_dropped"]),
        str(storage["writes_deferred"]),
        _number(summary["client"]["cpu_ms_per_gib"], 0),
    ]


def _number(value: float | None, decimals: int) -> str:
    return "n/a" if value is None else f"{value:.{decimals}f}"


if __name__ == "__main__":
    sys.exit(main())
