"""Arguments of `mlpstorage history`."""

import argparse
from pathlib import Path

from mlpstorage.config import BENCHMARK_TYPES, RunStatus


def add_history_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands list, show and rerun; the chosen one is `command`, a run's id `run_id`.

    `results_dir` stays None where it is not given: the environment and the default are looked up with the others'.
    """
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_list(commands.add_parser("list", help="show what ran", description="Show what ran, the newest first."))
    show = commands.add_parser("show", help="show one run whole", description="Show one run whole.")
    _add_run_id(show)
    _add_results_dir(show)
    _add_json(show)
    rerun = commands.add_parser(
        "rerun",
        help="run a run's arguments again",
        description="Run the arguments of a run again, exactly as they were, in the directory where it was started.",
    )
    _add_run_id(rerun)
    _add_results_dir(rerun)


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_at_least_one, metavar="N", help="show only the N newest")
    parser.add_argument(
        "--benchmark",
        type=_benchmark_type,
        choices=[benchmark.value for benchmark in BENCHMARK_TYPES],
        help="show only runs of this benchmark",
    )
    parser.add_argument("--model", help="show only runs of this model")
    parser.add_argument("--status", choices=[status.value for status in RunStatus], help="show only runs in this state")
    _add_results_dir(parser)
    _add_json(parser)


def _add_run_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_id", metavar="ID", help="id of the run, the beginning of it that no other has, or its result directory"
    )


def _add_results_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results-dir",
        "-rd",
        type=Path,
        metavar="DIR",
        help="the results directory (default: MLPSTORAGE_RESULTS_DIR, else ./mlpstorage-results)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write one JSON document and nothing else")


def _at_least_one(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value


def _benchmark_type(text: str) -> str:
    """The benchmark's type; its command, `kvcache`, is what one types elsewhere."""
    return BENCHMARK_TYPES.kv_cache.value if text == "kvcache" else text
