"""What every benchmark shares: its place among the results, its metadata, its course from start to end."""

import json
import logging
import os
import platform
import shlex
import sys
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from mlpstorage import __version__
from mlpstorage.cluster.process import this_process
from mlpstorage.config import BENCHMARK_TYPES, EXIT_CODE, RunStatus
from mlpstorage.errors import InterruptedRunError, MLPStorageError
from mlpstorage.results.directory import (
    check_results_dir,
    create_location,
    invocation_path,
    metadata_path,
    new_run_id,
    planned_location,
    write_json_atomic,
)
from mlpstorage.results.models import SCHEMA_VERSION

DATETIME_FORMAT = "%Y%m%d_%H%M%S"


def generate_output_location(
    results_dir: Path | str, benchmark: str, model: str, command: str, run_datetime: str
) -> Path | str:
    """The result directory of a run that would start now; creates nothing."""
    return planned_location(Path(results_dir), benchmark, model, command, run_datetime)


class Benchmark(ABC):
    """One invocation of a benchmark, from its arguments to its exit code.

    The constructor settles what will be run and creates nothing; `run` does the work.

    Args:
        args: Parsed arguments; read once, here.
        logger: Where it says what it does; a `logging.Logger` or alike.
        run_datetime: `YYYYMMDD_HHMMSS`; None for now.
        run_number: Number of the run within a series of equal ones.
        cluster_collector: Called for the facts of the cluster, in the place of the built-in collection.
        validator: Called with the metadata before the run starts; what it raises refuses the run.
    """

    benchmark_type: BENCHMARK_TYPES

    def __init__(
        self,
        args: Namespace,
        logger: logging.Logger | None = None,
        run_datetime: str | None = None,
        run_number: int = 0,
        cluster_collector: Callable[[], dict[str, object]] | None = None,
        validator: Callable[[Mapping[str, object]], object] | None = None,
    ) -> None:
        self.args = args
        self.logger = logger or logging.getLogger("mlpstorage")
        self.run_datetime = run_datetime or datetime.now().astimezone().strftime(DATETIME_FORMAT)
        self.run_number = run_number
        self.run_id = new_run_id(self.run_datetime)
        self.command: str = args.command
        self.what_if = bool(getattr(args, "what_if", False))
        self.cluster_information: dict[str, object] | None = None
        self._cluster_collector = cluster_collector
        self._validator = validator
        self._status: RunStatus | None = None
        self._error: str | None = None
        self._exit_code: EXIT_CODE | None = None
        self._runtime_s: float | None = None
        self._settle(args)
        self._result_dir: Path | None = Path(
            generate_output_location(
                self.results_dir, self.benchmark_type.value, self.model, self.command, self.run_datetime
            )
        )
        if self.command == "run":
            self.cluster_information = self._collect_cluster_information()

    @property
    @abstractmethod
    def model(self) -> str:
        """Name of the model."""

    @property
    @abstractmethod
    def results_dir(self) -> Path:
        """Where results are kept."""

    @property
    def result_dir(self) -> Path:
        """Where this run's results go."""
        if self._result_dir is None:
            raise ValueError("the run failed before it had a result directory")
        return self._result_dir

    @property
    def metadata(self) -> dict[str, object]:
        """What is known of the run by now; the content of its metadata file once it has one."""
        document: dict[str, object] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "benchmark_type": self.benchmark_type.value,
            "model": self.model,
            "command": self.command,
            "run_datetime": self.run_datetime,
            "run_number": self.run_number,
            "result_dir": None if self._result_dir is None else str(self._result_dir.absolute()),
            "exit_code": None if self._exit_code is None else int(self._exit_code),
            "error": self._error,
            "runtime_s": self._runtime_s,
            "executed_command": shlex.join(["mlpstorage", *self._arguments()]),
            "args": self._arguments(),
            "cwd": os.getcwd(),  # noqa: PTH109 - a string for JSON
            "process": this_process(),
            "cluster_information": self.cluster_information,
            "software": {
                "mlpstorage": __version__,
                "python": platform.python_version(),
                "mpi": self._mpi_version(),
            },
        }
        if self._status is not None:
            document["status"] = self._status.value
        return document | self._own_metadata()

    def run(self) -> int:
        """Do the work; returns the exit code.

        Raises:
            MLPStorageError: It could not begin. What had begun and then failed returns its exit code.
        """
        if self.command != "run":
            return self._estimate()
        if self.what_if:
            return self._show_plan()
        start_s = time.monotonic()
        check_results_dir(self.results_dir)
        try:
            self._check()
            if self._validator is not None:
                self._validator(self.metadata)
        except MLPStorageError as error:
            self._result_dir = None
            self._end(RunStatus.FAILED, error, start_s)
            record_failed_invocation(self.results_dir, self.run_id, self.metadata)
            raise
        self._result_dir = create_location(self.result_dir)
        self._status = RunStatus.RUNNING
        self._write_metadata()
        try:
            self._perform()
        except BaseException as error:  # whatever ends the run, its metadata must say so
            interrupted = isinstance(error, (InterruptedRunError, KeyboardInterrupt))
            self._end(RunStatus.INTERRUPTED if interrupted else RunStatus.FAILED, error, start_s)
            self._write_metadata()
            self._show_result()
            raise
        self._end(RunStatus.COMPLETE, None, start_s)
        self._exit_code = self._verdict()
        self._write_metadata()
        self._show_result()
        return self._exit_code

    @abstractmethod
    def _settle(self, args: Namespace) -> None:
        """Turn the arguments into a spec and a plan."""

    @abstractmethod
    def _own_metadata(self) -> dict[str, object]:
        """The metadata that only this benchmark has."""

    @abstractmethod
    def _arguments(self) -> list[str]:
        """The invocation's words after the program's name."""

    @abstractmethod
    def _collect_cluster_information(self) -> dict[str, object] | None:
        """Facts of the hosts. Contacts none."""

    def _mpi_version(self) -> str | None:
        """Version of the MPI that starts the ranks; None where none does."""
        return None

    @abstractmethod
    def _check(self) -> None:
        """Refuse, before any work, what cannot be run."""

    @abstractmethod
    def _perform(self) -> None:
        """Run, and write the results; raises where the run is not complete."""

    @abstractmethod
    def _show_result(self) -> None:
        """Print what there is of results, complete or partial."""

    @abstractmethod
    def _verdict(self) -> EXIT_CODE:
        """The exit code of a complete run."""

    @abstractmethod
    def _show_plan(self) -> int:
        """Show what would run."""

    @abstractmethod
    def _estimate(self) -> int:
        """Do a command that is no run."""

    def _end(self, status: RunStatus, error: BaseException | None, start_s: float) -> None:
        self._status = status
        self._runtime_s = round(time.monotonic() - start_s, 3)
        if error is None:
            self._exit_code = EXIT_CODE.SUCCESS
            return
        self._error = str(error) or type(error).__name__
        self._exit_code = exit_code_of(error)

    def _write_metadata(self) -> None:
        write_json_atomic(metadata_path(self.result_dir, self.benchmark_type.value, self.run_datetime), self.metadata)


def exit_code_of(error: BaseException) -> EXIT_CODE:
    """The exit code that an error ends the process with."""
    if isinstance(error, MLPStorageError):
        return error.exit_code
    return EXIT_CODE.INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_CODE.FAILURE


def record_failed_invocation(results_dir: Path, run_id: str, metadata: Mapping[str, object]) -> None:
    """Keep the metadata of an invocation that failed before it had a result directory, where that is possible."""
    path = invocation_path(results_dir, run_id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, metadata)
    except (OSError, MLPStorageError) as error:
        print(f"mlpstorage: the failed invocation could not be recorded: {error}", file=sys.stderr)  # noqa: T201


def print_json(document: object) -> None:
    """Write one JSON document to standard output."""
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def words_of(args: Namespace) -> Sequence[str] | None:
    """The words from which `args` was parsed, where our `main` did it."""
    words: Sequence[str] | None = getattr(args, "argv", None)
    return words
