"""A job of ranks while it runs, and what became of it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mlpstorage.config import RunStatus
from mlpstorage.errors import (
    AccessError,
    ConfigurationError,
    InterruptedRunError,
    MissingFileError,
    MLPStorageError,
    RunError,
    RunTimeoutError,
    UsageError,
)
from mlpstorage.kvcache.events import Event, Finished, Progress, Refused, Warned, parse_event
from mlpstorage.launch.process import JobOutcome
from mlpstorage.report.progress import ProgressView
from mlpstorage.results.directory import LOGS_DIR
from mlpstorage.results.summary import (
    Summary,
)

if TYPE_CHECKING:
    from mlpstorage.results.models import RankResult, Sample

_ERROR_OF_CODE: dict[int, type[MLPStorageError]] = {
    int(kind.exit_code): kind
    for kind in (
        MLPStorageError,
        UsageError,
        MissingFileError,
        AccessError,
        ConfigurationError,
        RunError,
        RunTimeoutError,
        InterruptedRunError,
    )
}


class Job:
    """Listens to the ranks while they run."""

    def __init__(self, view: ProgressView, result_dir: Path, logger: logging.Logger) -> None:
        self._view = view
        self._logger = logger
        self._series = (result_dir / "timeseries.jsonl").open("a", encoding="utf-8")
        self._other = (result_dir / LOGS_DIR / "ranks.stdout.log").open("ab")
        self.ranks: tuple[RankResult, ...] = ()
        self.refusal: Refused | None = None
        self.last_sample: Sample | None = None

    def line(self, line: bytes) -> None:
        """Take one line of the ranks' standard output."""
        try:
            event = parse_event(line)
        except ValidationError:
            self._other.write(line)
            return
        self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Progress(sample=sample):
                self.last_sample = sample
                self._series.write(sample.model_dump_json() + "\n")
                self._series.flush()
                self._view.show(sample)
            case Warned(message=message):
                self._logger.warning("%s", message)
            case Refused():
                self.refusal = event
            case Finished(ranks=ranks):
                self.ranks = ranks

    def close(self) -> None:
        """End the view and the files."""
        self._view.close()
        self._series.close()
        self._other.close()


def judge(outcome: JobOutcome, job: Job, summary: Summary | None) -> None:
    """Raise where the run is not complete."""
    if outcome.interrupted:
        kept = "partial results are kept" if summary is not None else "there are no results yet"
        raise InterruptedRunError(f"interrupted; {kept}")
    if job.refusal is not None:
        raise _error_of(job.refusal.exit_code, job.refusal.message)
    if summary is not None and summary.status is not RunStatus.COMPLETE:
        code = next(rank.error.exit_code for rank in job.ranks if rank.error is not None)
        raise _error_of(code, summary.error or "a rank failed")
    if summary is None:
        how = (
            f"was killed by signal {-outcome.returncode}"
            if outcome.returncode < 0
            else f"ended with {outcome.returncode} and without a result"
        )
        told = f"; it said: {outcome.stderr_tail.splitlines()[-1]}" if outcome.stderr_tail else ""
        raise RunError(f"the rank or its launcher {how}{told}; see {LOGS_DIR}/ranks.stderr.log in the result directory")


def _error_of(exit_code: int, message: str) -> MLPStorageError:
    return _ERROR_OF_CODE.get(exit_code, MLPStorageError)(message)
