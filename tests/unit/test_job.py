"""What the launcher keeps of ranks that left no final result: each rank once, by what it told last."""

import json
import logging
from pathlib import Path

import pytest

from mlpstorage.benchmarks.job import Job, judge
from mlpstorage.config import RunStatus
from mlpstorage.errors import RunError, RunTimeoutError
from mlpstorage.kvcache.events import Event, Finished, HostProgress, Known, Progress, Silent, SilentRank, Snapshot
from mlpstorage.launch.process import JobOutcome
from mlpstorage.report.progress import NoProgress
from mlpstorage.results.models import HostSample, IncompleteRank, RankResult, Sample
from tests.records import NO_STORAGE, merge, rank, window

KILLED = JobOutcome(returncode=137, interrupted=False, stderr_tail="a rank was killed")


def sample(number: int, t_s: float) -> Sample:
    """A line of the time series."""
    counts = {name: 1 for name in Sample.model_fields if name not in {"rank", "t_s", "phase"}}
    return Sample(rank=number, t_s=t_s, phase="window", **counts)


def told(number: int, measured_s: float, read_bytes: int, host: str = "h1") -> Snapshot:
    """What a rank says after a warm-up of 2 s and so much of the window."""
    return Snapshot(
        result=rank(
            number,
            host=host,
            status=RunStatus.RUNNING,
            window=window(measured_s, warmup_s=2.0),
            storage=NO_STORAGE.model_copy(update={"read_bytes": read_bytes}),
        )
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A result directory."""
    (tmp_path / "logs").mkdir()
    return tmp_path


def heard(place: Path, *events: Event) -> Job:
    """A job that told these events, and is over."""
    job = Job(NoProgress(), place, logging.getLogger("test"), on_hosts=lambda _: None)
    for event in events:
        job.line(event.model_dump_json().encode() + b"\n")
    job.close()
    return job


def test_the_last_numbers_of_each_rank_are_kept_once(place: Path) -> None:
    """Snapshots are counts since the start: the last replaces those before, 500 + 70 bytes in all."""
    job = heard(
        place, told(0, 1.0, 100), told(1, 1.0, 70, host="h2"), sampled(0, 7.0), told(0, 4.0, 500), sampled(0, 8.0)
    )
    ranks, incomplete = job.kept(KILLED), job.incomplete(3)
    summary = merge(*ranks, incomplete=incomplete)
    assert summary.storage.read_bytes == 570
    assert summary.window.measured_s == 4.0
    assert summary.status is RunStatus.FAILED
    assert summary.incomplete_ranks == (
        IncompleteRank(rank=0, host="h1", last_seen_s=8.0),
        IncompleteRank(rank=1, host="h2", last_seen_s=3.0),
        IncompleteRank(rank=2, host=None, last_seen_s=None),
    )
    assert [one.t_s for one in ranks[0].samples] == [7.0, 8.0]
    with pytest.raises(RunError, match="kept, marked incomplete"):
        judge(KILLED, job, summary)


def of_host(host: str, t_s: float) -> HostProgress:
    """The event of a line of a host's time series, without its parts."""
    parts = dict.fromkeys(("cpu", "memory", "vm", "disks", "networks"))
    return HostProgress(sample=HostSample(host=host, t_s=t_s, interval_s=1.0, phase="window", **parts))


def test_lines_of_all_hosts_are_kept_once(place: Path) -> None:
    """Ranks 0 and 1 are on h1, 2 on h2: the lines of a host are there as they came, and are its lowest rank's."""
    hosts = ("h1", "h1", "h2")
    snapshots = [told(number, 1.0, 10, host=host) for number, host in enumerate(hosts)]
    lines = [of_host("h1", 1.0), of_host("h2", 1.1), of_host("h1", 2.0), of_host("h2", 2.1), of_host("h2", 3.1)]
    job = heard(place, *lines[:2], *snapshots, *lines[2:])
    assert [[line.t_s for line in one.host_samples] for one in job.kept(KILLED)] == [[1.0, 2.0], [], [1.1, 2.1, 3.1]]
    live = (place / "timeseries_hosts.jsonl").read_text().splitlines()
    assert [HostSample.model_validate_json(line) for line in live] == [line.sample for line in lines]


def test_what_is_known_of_hosts_is_handed_on_at_once(place: Path) -> None:
    """The facts of all hosts, before any rank plays."""
    seen: list[dict[str, object]] = []
    job = Job(NoProgress(), place, logging.getLogger("test"), on_hosts=seen.extend)
    job.line(Known(hosts=({"host": "h1"}, {"host": "h2"})).model_dump_json().encode())
    job.close()
    assert seen == [{"host": "h1"}, {"host": "h2"}]


def test_final_results_replace_all_snapshots(place: Path) -> None:
    """Where the job ended with its result, nothing of the snapshots is counted, and no rank is incomplete."""
    final = rank(0, storage=NO_STORAGE.model_copy(update={"read_bytes": 900}))
    job = heard(place, told(0, 1.0, 100), Finished(ranks=(final,)))
    assert [one.storage.read_bytes for one in job.ranks] == [900]
    assert job.incomplete(1) == ()


def test_the_rank_that_hangs_is_named_and_the_others_were_only_ended(place: Path) -> None:
    """Exit code 7 with host and rank; its numbers and those of the other are there. One that had finished is whole."""
    final = Snapshot(result=rank(2))
    silent = Silent(ranks=(SilentRank(rank=1, host="h2", silent_s=15.2),))
    job = heard(place, told(0, 1.0, 100), told(1, 1.0, 70, host="h2"), final, silent)
    ranks = job.kept(KILLED)
    assert [one.status for one in ranks] == [RunStatus.INTERRUPTED, RunStatus.FAILED, RunStatus.COMPLETE]
    summary = merge(*ranks, incomplete=job.incomplete(3))
    assert [one.rank for one in summary.incomplete_ranks] == [0, 1]
    assert summary.status is RunStatus.FAILED
    assert (summary.error or "").startswith("rank 1 on h2: not heard of for 15 s")
    with pytest.raises(RunTimeoutError, match="rank 1 on h2: not heard of for 15 s") as caught:
        judge(KILLED, job, summary)
    assert caught.value.exit_code == 7


def test_a_job_that_told_nothing_has_nothing_to_keep(place: Path) -> None:
    """No result, and all planned ranks are missing."""
    job = heard(place)
    assert job.kept(KILLED) == ()
    assert [one.rank for one in job.incomplete(2)] == [0, 1]


def test_the_progress_that_is_shown_is_of_all_ranks(place: Path) -> None:
    """Rates and counts of the ranks' last lines are added when rank 0 tells its own; all lines are kept."""

    class Seen(NoProgress):
        def __init__(self) -> None:
            self.samples: list[Sample] = []

        def show(self, sample: Sample) -> None:
            self.samples.append(sample)

    view = Seen()
    job = Job(view, place, logging.getLogger("test"), on_hosts=lambda _: None)
    for number, t_s in ((0, 1.0), (1, 1.0), (2, 1.0), (0, 2.0)):
        job.line(Progress(sample=sample(number, t_s)).model_dump_json().encode())
    job.close()
    assert [(one.rank, one.t_s, one.read_bytes) for one in view.samples] == [(0, 1.0, 1), (0, 2.0, 3)]
    lines = (place / "timeseries.jsonl").read_text().splitlines()
    assert [json.loads(line)["rank"] for line in lines] == [0, 1, 2, 0]


def sampled(number: int, t_s: float) -> Progress:
    """The event of a line of the time series."""
    return Progress(sample=sample(number, t_s))


def test_a_rank_whose_result_is_unfinished_is_told_apart(place: Path) -> None:
    """Its error says where its numbers end: 2 s of warm-up and 4 s of the window."""
    (result,) = heard(place, told(0, 4.0, 1)).kept(KILLED)
    assert isinstance(result, RankResult)
    assert result.error is not None
    assert "6.0 s after the start" in result.error.message
