"""What each command of the command line does, once its arguments are parsed."""

import argparse
import json
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from mlpstorage.benchmarks.base import DATETIME_FORMAT, exit_code_of, print_json, record_failed_invocation
from mlpstorage.config import BENCHMARK_TYPES, EXIT_CODE, RunStatus
from mlpstorage.errors import MLPStorageError, UsageError
from mlpstorage.results.directory import new_run_id
from mlpstorage.results.models import SCHEMA_VERSION
from mlpstorage.spec.fields import ENVIRONMENT_PREFIX
from mlpstorage.spec.kvcache import DEFAULT_RESULTS_DIR


def run(args: Namespace) -> int:
    """Do the command; returns the exit code."""
    if args.program == "history":
        return {"list": _list, "show": _show, "rerun": _rerun}[args.command](args)
    if args.command == "trace":
        return {"inspect": _inspect, "convert": _convert}[args.trace_command](args)
    from mlpstorage.benchmarks.kvcache import KVCacheBenchmark  # noqa: PLC0415 - the whole benchmark, slow to import

    try:
        benchmark = KVCacheBenchmark(args)
    except MLPStorageError as error:
        record_refused(args.argv, error)
        raise
    return benchmark.run()


def record_refused(argv: Sequence[str], error: BaseException) -> None:
    """Keep a note of a `kvcache run` that was refused before it had metadata of its own.

    A slip of the pen in a flag creates no results directory: a usage error is noted only where there is one already.
    """
    if list(argv[:2]) != ["kvcache", "run"] or "--what-if" in argv:
        return
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--results-dir", "-rd")
    parser.add_argument("--model", "-m")
    try:
        known, _ = parser.parse_known_args(list(argv))
    except (argparse.ArgumentError, SystemExit):
        return
    results_dir = _results_dir(known.results_dir)
    if isinstance(error, UsageError) and not results_dir.is_dir():
        return
    run_datetime = datetime.now().astimezone().strftime(DATETIME_FORMAT)
    run_id = new_run_id(run_datetime)
    metadata: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "benchmark_type": BENCHMARK_TYPES.kv_cache.value,
        "model": known.model,
        "command": "run",
        "run_datetime": run_datetime,
        "result_dir": None,
        "status": RunStatus.FAILED.value,
        "exit_code": int(exit_code_of(error)),
        "error": str(error),
        "executed_command": shlex.join(["mlpstorage", *argv]),
        "args": list(argv),
        "cwd": str(Path.cwd()),
    }
    record_failed_invocation(results_dir, run_id, metadata)


def _results_dir(given: str | Path | None) -> Path:
    """The results directory of commands that only look into it."""
    return Path(given or os.environ.get(f"{ENVIRONMENT_PREFIX}RESULTS_DIR") or DEFAULT_RESULTS_DIR).absolute()


def _inspect(args: Namespace) -> int:
    from mlpstorage.kvcache.inspect import inspect_trace  # noqa: PLC0415 - only what the command needs is imported
    from mlpstorage.report.trace import trace_facts_text  # noqa: PLC0415

    facts = inspect_trace(
        Path(args.trace),
        args.capacity_blocks or [],
        args.touch,
        trace_format=args.trace_format,
        block_tokens=args.block_tokens,
    )
    if args.json:
        print_json(facts.as_dict())
    else:
        sys.stdout.write(trace_facts_text(facts))
    return EXIT_CODE.SUCCESS


def _convert(args: Namespace) -> int:
    from mlpstorage.kvcache.traces.convert import convert_trace  # noqa: PLC0415 - only what the command needs
    from mlpstorage.report.trace import converted_text  # noqa: PLC0415

    converted = convert_trace(Path(args.trace), Path(args.out), args.trace_format, force=args.force)
    if args.json:
        print_json(converted.as_dict())
    else:
        sys.stdout.write(converted_text(converted))
    return EXIT_CODE.SUCCESS


def _list(args: Namespace) -> int:
    from mlpstorage.history import list_runs  # noqa: PLC0415 - only what the command needs is imported
    from mlpstorage.report.history_table import history_json, history_table  # noqa: PLC0415
    from mlpstorage.report.terminal import console_for  # noqa: PLC0415

    results_dir = _results_dir(args.results_dir)
    entries = list_runs(
        results_dir,
        warn=_warn,
        benchmark=args.benchmark,
        model=args.model,
        status=args.status,
        limit=args.limit,
    )
    if args.json:
        print_json(history_json(entries))
    elif entries:
        console_for().print(history_table(entries))
    else:
        sys.stdout.write(f"no runs below {results_dir}\n")
    return EXIT_CODE.SUCCESS


def _show(args: Namespace) -> int:
    from mlpstorage.history import find_run  # noqa: PLC0415 - only what the command needs is imported
    from mlpstorage.report.history_table import run_details  # noqa: PLC0415
    from mlpstorage.report.terminal import console_for  # noqa: PLC0415

    entry = find_run(_results_dir(args.results_dir), args.run_id)
    summary: dict[str, object] | None = None
    summary_path = entry.metadata_path.parent / "summary.json"
    if entry.result_dir is not None and summary_path.is_file():
        try:
            summary = json.loads(summary_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _warn(f"{summary_path} cannot be read: {error}")
    if args.json:
        print_json({"metadata": dict(entry.metadata) | {"status": entry.status}, "summary": summary})
    else:
        console_for().print(run_details(entry, summary))
    return EXIT_CODE.SUCCESS


def _rerun(args: Namespace) -> int:
    from mlpstorage.history import find_run, rerun_argv, rerun_cwd  # noqa: PLC0415 - only what the command needs

    entry = find_run(_results_dir(args.results_dir), args.run_id)
    command = [sys.executable, "-m", "mlpstorage", *rerun_argv(entry)]
    cwd = rerun_cwd(entry)
    sys.stderr.write(f"mlpstorage: in {cwd or Path.cwd()}: {shlex.join(['mlpstorage', *command[3:]])}\n")
    sys.stderr.flush()
    os.chdir(cwd or Path.cwd())
    # Replaces this process, so that signals and the exit code are the run's own.
    os.execv(command[0], command)  # noqa: S606 - an argv list, no shell


def _warn(message: str) -> None:
    sys.stderr.write(f"mlpstorage: warning: {message}\n")
