"""A job of ranks while it runs, and what became of it."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from mlpstorage import __version__
from mlpstorage.config import EXIT_CODE, HOST_SERIES, RunStatus
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
from mlpstorage.kvcache.events import (
    Event,
    Finished,
    HostProgress,
    Known,
    Progress,
    Refused,
    Silent,
    Snapshot,
    Started,
    Warned,
    parse_event,
)
from mlpstorage.kvcache.pulse import SILENCE_S
from mlpstorage.launch.failures import MissingPackageError, Rank, death, lost_peer, start_failure
from mlpstorage.launch.process import JobOutcome
from mlpstorage.report.progress import ProgressView
from mlpstorage.results.directory import LOGS_DIR
from mlpstorage.results.models import HostSample, IncompleteRank, RankError, RankResult, Sample
from mlpstorage.results.summary import Summary

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


_OWN = ("rank", "t_s", "phase")
"""What of a sample is no sum."""


START_LIMIT_S = 20.0
"""Longest start of the ranks of other hosts, and so much more for each rank of a host: all load Python at once."""

START_LIMIT_A_RANK_S = 1.0

QUIET_LIMIT_S = SILENCE_S + 5.0
"""Rank 0 lets hear of itself every second. Where it hangs, the others say so before this."""

_SILENT_END_S = 2.0
"""Ranks that told that one hangs have so long to end by themselves."""

_REFUSED_END_S = 15.0
"""Ranks that told that they cannot begin likewise: they first remove what they have made."""

OPEN_MPI_CONNECTION_CLOSED = 14
"""Exit code of a rank of Open MPI 5 that finds a connection closed. It may end the job before the launcher has noticed
which rank has died, and its word of that is then lost."""

_SAID_BYTES = 1 << 16


class Job:
    """Listens to the ranks while they run.

    Args:
        view: Shows how far they are.
        result_dir: Where the results go.
        logger: Told of their warnings.
        on_hosts: Called with the facts of their hosts before they begin.
        ranks_on_host: Where an MPI launcher starts them, the most on one host: the job is then ended where it takes
            too long. None for a process of this host, which ends with its pipe.
        hosts: The hosts as the launcher was given them.
        hosts_without: Finds the hosts that lack a Python package, where one is missing somewhere.
    """

    def __init__(
        self,
        view: ProgressView,
        result_dir: Path,
        logger: logging.Logger,
        *,
        on_hosts: Callable[[Sequence[dict[str, object]]], None],
        ranks_on_host: int | None = None,
        hosts: Sequence[str] = (),
        hosts_without: Callable[[str], Sequence[str]] = lambda _: (),
    ) -> None:
        self._ranks_on_host = ranks_on_host
        self._hosts = hosts
        self._hosts_without = hosts_without
        self._heard_s = time.monotonic()
        self._end_s: float | None = None
        self._started: dict[int, Rank] = {}
        self._lost: MLPStorageError | None = None
        self._stderr_path = result_dir / LOGS_DIR / "ranks.stderr.log"
        self._stdout_path = result_dir / LOGS_DIR / "ranks.stdout.log"
        self._view = view
        self._logger = logger
        self._on_hosts = on_hosts
        self._series_path = result_dir / "timeseries.jsonl"
        self._series = self._series_path.open("a", encoding="utf-8")
        self._host_series_path = result_dir / HOST_SERIES
        self._host_series = self._host_series_path.open("a", encoding="utf-8")
        self._other = self._stdout_path.open("ab")
        self.ranks: tuple[RankResult, ...] = ()
        self.refusal: Refused | None = None
        self.silent: Silent | None = None
        self._snapshots: dict[int, RankResult] = {}
        self._samples: dict[int, Sample] = {}

    def line(self, line: bytes) -> None:
        """Take one line of the ranks' standard output."""
        try:
            event = parse_event(line)
        except ValidationError:
            self._other.write(line)
            return
        self._take(event)

    def must_end(self) -> bool:
        """Whether the ranks should be ended, because they cannot begin or nothing is heard of them."""
        now_s = time.monotonic()
        quiet_s = now_s - self._heard_s
        if self._ranks_on_host is None:
            return False
        if self._end_s is not None:
            return now_s > self._end_s
        if not self._started:
            limit_s = START_LIMIT_S + START_LIMIT_A_RANK_S * self._ranks_on_host
            self._lost = start_failure(self._said())
            if self._lost is None and quiet_s > limit_s:
                self._lost = RunTimeoutError(
                    f"not all ranks have started within {limit_s:.0f} s; a host cannot be reached, or has another MPI. "
                    "Check that `mpirun` starts `hostname` on all of --hosts"
                )
        elif quiet_s > QUIET_LIMIT_S:
            root = self._started[0]
            self._lost = RunTimeoutError(
                f"rank 0 on {root.host}: not heard of for {quiet_s:.0f} s, it hangs or its host cannot be reached; all "
                "ranks were ended. Look at that host and its storage"
            )
        return self._lost is not None

    def failure(self, returncode: int) -> MLPStorageError | None:
        """Why the job has no result, where it is known better than by its exit code. Call `close` before."""
        failure = self._lost if self._lost is not None or self._started else start_failure(self._said())
        if isinstance(failure, MissingPackageError):
            return MissingPackageError(failure.package, self._hosts_without(failure.package))
        if failure is not None or not self._started:
            return failure
        died = death(self._said(), self._started, self._hosts)
        if died is None and returncode == OPEN_MPI_CONNECTION_CLOSED and len(self._started) > 1:
            died = lost_peer(self._said(), self._started)
        return None if died is None else RunError(f"{died}; all other ranks were ended")

    def _said(self) -> str:
        """What launcher and ranks have said beside events; Hydra tells of a dead rank on standard output."""
        said = b""
        for path in (self._stderr_path, self._stdout_path):
            if path.exists():
                with path.open("rb") as file:
                    file.seek(max(path.stat().st_size - _SAID_BYTES, 0))
                    said += file.read()
        return said.decode(errors="replace")

    def _take(self, event: Event) -> None:
        self._heard_s = time.monotonic()
        match event:
            case Started(version=version, ranks=ranks):
                self._started = {one.rank: Rank(rank=one.rank, host=one.host, pid=one.pid) for one in ranks}
                if version != __version__:
                    self.refusal = _other_version(version, [one.host for one in ranks])
                    self._end_s = self._heard_s
            case Known(hosts=hosts):
                self._on_hosts(hosts)
            case Warned(message=message):
                self._logger.warning("%s", message)
            case Refused():
                self.refusal = event
                self._end_s = self._heard_s + _REFUSED_END_S
            case Silent():
                self.silent = self.silent or event
                self._end_s = self._end_s or self._heard_s + _SILENT_END_S
            case Finished(ranks=results):
                self.ranks = results
            case _:
                self._take_running(event)

    def _take_running(self, event: Event) -> None:
        """Keep what ranks tell while they play."""
        match event:
            case Progress(sample=sample):
                self._samples[sample.rank] = sample
                self._series.write(sample.model_dump_json() + "\n")
                self._series.flush()
                if sample.rank == 0:
                    self._view.show(_together(sample, self._samples.values()))
            case HostProgress(sample=host_sample):
                self._host_series.write(host_sample.model_dump_json() + "\n")
                self._host_series.flush()
            case Snapshot(result=result):
                self._snapshots[result.rank] = result

    def kept(self, outcome: JobOutcome) -> tuple[RankResult, ...]:
        """What the ranks told last, where the job ended without its result. Call `close` before."""
        silent = {} if self.silent is None else {one.rank: one.silent_s for one in self.silent.ranks}
        # Where it is known who failed, the others were only ended.
        was_ended = outcome.interrupted or bool(silent.keys() & self._snapshots.keys())
        series: dict[int, list[Sample]] = {rank: [] for rank in self._snapshots}
        for line in self._series_path.read_text(encoding="utf-8").splitlines():
            sample = Sample.model_validate_json(line)
            series.setdefault(sample.rank, []).append(sample)
        of_hosts: dict[str, list[HostSample]] = {}
        for line in self._host_series_path.read_text(encoding="utf-8").splitlines():
            of_host = HostSample.model_validate_json(line)
            of_hosts.setdefault(of_host.host, []).append(of_host)
        results = []
        for number, result in sorted(self._snapshots.items()):
            update: dict[str, object] = {
                "samples": tuple(series[number]),
                # As in a whole run, the lowest rank of a host has its lines.
                "host_samples": tuple(of_hosts.pop(result.host, ())),
            }
            # One that had finished by itself keeps its verdict.
            if result.status is RunStatus.RUNNING:
                status = RunStatus.INTERRUPTED if was_ended and number not in silent else RunStatus.FAILED
                update |= {"status": status, "error": _unfinished(result, status, silent.get(number))}
            results.append(result.model_copy(update=update))
        return tuple(results)

    def incomplete(self, planned_ranks: int) -> tuple[IncompleteRank, ...]:
        """The ranks without a final result, and when each was last heard of."""
        missing = []
        for number in () if self.ranks else range(planned_ranks):
            result, sample = self._snapshots.get(number), self._samples.get(number)
            if result is not None and result.status is not RunStatus.RUNNING:
                continue
            seen_s = [] if result is None else [_told_s(result)]
            seen_s += [] if sample is None else [sample.t_s]
            missing.append(
                IncompleteRank(
                    rank=number,
                    host=self._host(number) if result is None else result.host,
                    last_seen_s=max(seen_s, default=None),
                )
            )
        return tuple(missing)

    def _host(self, rank: int) -> str | None:
        return self._started[rank].host if rank in self._started else None

    def close(self) -> None:
        """End the view and the files."""
        self._view.close()
        self._series.close()
        self._host_series.close()
        self._other.close()


def judge(outcome: JobOutcome, job: Job, summary: Summary | None) -> None:
    """Raise where the run is not complete."""
    if outcome.interrupted:
        kept = "partial results are kept" if summary is not None else "there are no results yet"
        raise InterruptedRunError(f"interrupted; {kept}")
    if job.refusal is not None:
        raise _error_of(job.refusal.exit_code, job.refusal.message)
    if job.ranks:
        if summary is not None and summary.status is not RunStatus.COMPLETE:
            raise _error_of(_exit_code(job.ranks, summary.status), summary.error or "a rank failed")
        if job.silent is not None:
            raise _hung(
                job.silent, "; that was after the measurement, whose results are whole, and cache files may stay"
            )
        return
    kept = "" if summary is None else "; what was measured until then is kept, marked incomplete"
    if job.silent is not None:
        raise _hung(job.silent, kept)
    failure = job.failure(outcome.returncode)
    if failure is not None:
        raise _error_of(failure.exit_code, f"{failure}{kept}; see {LOGS_DIR}/ranks.stderr.log in the result directory")
    how = (
        f"was killed by signal {-outcome.returncode}"
        if outcome.returncode < 0
        else f"ended with {outcome.returncode} and without a result"
    )
    told = f"; it said: {outcome.stderr_tail.splitlines()[-1]}" if outcome.stderr_tail else ""
    raise RunError(
        f"the rank or its launcher {how}{told}{kept}; see {LOGS_DIR}/ranks.stderr.log in the result directory"
    )


def _hung(silent: Silent, kept: str) -> RunTimeoutError:
    who = ", ".join(f"rank {one.rank} on {one.host}" for one in silent.ranks)
    longest_s = max(one.silent_s for one in silent.ranks)
    how = (
        f"nothing has gone on there for {longest_s:.0f} s, its storage hangs"
        if any(one.still for one in silent.ranks)
        else f"not heard of for {longest_s:.0f} s, it hangs or its host cannot be reached"
    )
    return RunTimeoutError(f"{who}: {how}; all ranks were ended{kept}. Look at that host and its storage")


def _other_version(version: str, hosts: Sequence[str]) -> Refused:
    return Refused(
        exit_code=int(EXIT_CODE.CONFIGURATION),
        message=f"{', '.join(dict.fromkeys(hosts))}: mlpstorage {version} is installed there, {__version__} here; "
        "nothing was begun. Install the same version on every host",
    )


def _exit_code(ranks: Sequence[RankResult], status: RunStatus) -> int:
    """That of the first rank that gave the run its status: where one fails, the others are only interrupted."""
    return next(rank.error.exit_code for rank in ranks if rank.error is not None and rank.status is status)


def _unfinished(result: RankResult, status: RunStatus, silent_s: float | None) -> RankError:
    """The error of a rank that left no final result."""
    ends = f"its numbers end {_told_s(result):.1f} s after the start"
    if silent_s is not None:
        return RankError(exit_code=EXIT_CODE.TIMEOUT, message=f"not heard of for {silent_s:.0f} s, it hangs; {ends}")
    code = EXIT_CODE.INTERRUPTED if status is RunStatus.INTERRUPTED else EXIT_CODE.RUN
    return RankError(exit_code=code, message=f"it left no final result; {ends}")


def _told_s(result: RankResult) -> float:
    """Seconds after the start at which the numbers of a snapshot end."""
    return result.window.warmup_s + result.window.measured_s + result.window.drain_s


def _together(sample: Sample, samples: Iterable[Sample]) -> Sample:
    """A rank's sample with the counts and rates of all ranks' last ones, for a view of the whole run."""
    every = list(samples)
    return sample.model_copy(
        update={name: sum(getattr(one, name) for one in every) for name in Sample.model_fields if name not in _OWN}
    )


def _error_of(exit_code: int, message: str) -> MLPStorageError:
    return _ERROR_OF_CODE.get(exit_code, MLPStorageError)(message)
