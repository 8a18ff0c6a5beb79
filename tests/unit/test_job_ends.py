"""A job of ranks as its launcher sees it: what it is told, and when it must be ended."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mlpstorage import __version__
from mlpstorage.benchmarks.job import Job, judge
from mlpstorage.errors import ConfigurationError, RunError
from mlpstorage.kvcache.events import Started, StartedRank
from mlpstorage.launch.process import JobOutcome
from mlpstorage.report.progress import NoProgress

RANKS = tuple(StartedRank(rank=number, host=host, pid=40 + number) for number, host in enumerate(("nodea", "nodeb")))
FAILED = JobOutcome(returncode=1, interrupted=False, stderr_tail="")


@pytest.fixture
def new_job(tmp_path: Path) -> Callable[[str], Job]:
    """Makes a job of an MPI launcher that has said something on standard error."""
    (tmp_path / "logs").mkdir()

    def make(said: str) -> Job:
        (tmp_path / "logs" / "ranks.stderr.log").write_text(said)
        log = logging.getLogger("test")
        return Job(
            NoProgress(), tmp_path, log, on_hosts=lambda hosts: log.debug("%d hosts", len(hosts)), ranks_on_host=2
        )

    return make


def started(version: str) -> bytes:
    """The line by which rank 0 introduces the ranks."""
    return Started(version=version, ranks=RANKS).model_dump_json().encode()


def test_ranks_of_this_version_go_on(new_job: Callable[[str], Job]) -> None:
    """Nothing is to be ended, and no failure is known."""
    job = new_job("")
    assert not job.must_end()
    job.line(started(__version__))
    assert not job.must_end()
    job.close()
    assert job.failure(1) is None


def test_ranks_of_another_version_than_the_launchers_are_ended(new_job: Callable[[str], Job]) -> None:
    """They agree with each other, but not with the host that launches them: both versions and the hosts are named."""
    job = new_job("")
    job.line(started("0.0.1"))
    assert job.must_end()
    job.close()
    with pytest.raises(ConfigurationError, match=rf"nodea, nodeb: mlpstorage 0\.0\.1 .*, {__version__} here"):
        judge(FAILED, job, None)


def test_a_start_that_has_failed_is_not_waited_for(new_job: Callable[[str], Job]) -> None:
    """Hydra goes on waiting for a rank that could not be executed; its words are enough."""
    job = new_job(
        "[proxy:1@nodeb] HYDU_create_process (launch.c:73): execvp error on file /opt/python (No such file)\n"
    )
    assert job.must_end()
    job.close()
    assert "host nodeb has no /opt/python" in str(job.failure(1))


def test_a_dead_rank_is_told_by_its_host(new_job: Callable[[str], Job]) -> None:
    """Hydra knows a process and an address; the ranks have told whose they are."""
    job = new_job("")
    job.line(started(__version__))
    job.line(b"=   PID 41 RUNNING AT 10.77.31.3\n")
    job.line(b"=   EXIT CODE: 9\n")
    job.close()
    with pytest.raises(RunError, match="rank 1 on nodeb was killed by signal 9"):
        judge(FAILED, job, None)


def test_a_lost_connection_names_the_hosts(new_job: Callable[[str], Job]) -> None:
    """Where a rank of Open MPI 5 notices before its launcher, nobody says which other one has died."""
    job = new_job("")
    job.line(started(__version__))
    job.close()
    assert "a rank on one of nodea, nodeb has died" in str(job.failure(14))


def test_a_lost_connection_names_the_peer(new_job: Callable[[str], Job]) -> None:
    """Where Open MPI says whose connection was lost, its host is named, and the ranks that it runs."""
    job = new_job("  Local host: nodea\n  Local PID:  27\n  Peer host:  nodeb\n----\n")
    job.line(started(__version__))
    job.close()
    assert "rank 1 on nodeb has died" in str(job.failure(14))
