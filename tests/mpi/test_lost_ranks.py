"""Ranks that die, hang or fail while others play: the run ends soon, names them, and keeps what was told."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.conftest import Cli, Run

SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

pytestmark = pytest.mark.skipif(
    shutil.which("mpirun", path=SEARCH) is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpirun or no mpi4py: install mlpstorage[mpi]",
)


@pytest.mark.parametrize("named", ["path", "word"])
def test_without_a_launcher_nothing_starts(cli: Cli, named: str) -> None:
    """Exit code 3, what to install or which flag to give, an invocation recorded as failed, and no directory."""
    missing = str(cli.place / "nowhere" / "mpirun") if named == "path" else "no-such-mpirun"
    ended = cli.run(*cli.load("--num-processes", "2", "--mpi-bin", missing, "--cache-dir", cli.cache))
    assert ended.returncode == 3
    assert f"--mpi-bin {missing}" in ended.stderr
    assert 'pip install "mlpstorage[mpi]"' in ended.stderr
    assert not cli.runs()
    assert not cli.cache.exists()
    (shown,) = cli.history()
    assert (shown["status"], shown["exit_code"]) == ("failed", 3)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """The command, in the test's own directory."""
    it = Cli(place=tmp_path)
    yield it
    it.kill_started()


def rank_process(rank: int, run_id: str) -> psutil.Process:
    """The process of a rank of that run."""
    for process in psutil.process_iter():
        try:
            words, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        of_run = run_id in words and "mlpstorage.kvcache.rank" in words
        if of_run and variables.get("OMPI_COMM_WORLD_RANK", variables.get("PMI_RANK")) == str(rank):
            return process
    raise AssertionError(f"no process of rank {rank}")


def lost_rank(cli: Cli, rank: int, number: signal.Signals) -> tuple[Run, int, str]:
    """Send a signal to one of three ranks as soon as all have told numbers; what was left, exit code, and errors."""
    process = cli.start(
        *cli.load("--num-processes", "3", "--oversubscribe", "--allow-run-as-root", "--duration", "120"),
        *("--layout", "null", "--generation-mode", "fast", "--num-users", "2"),
    )
    cli.eventually(
        lambda: cli.runs() and {line["rank"] for line in lines_so_far(cli) if line["t_s"] >= 2} == {0, 1, 2},
        "all ranks have told their numbers",
    )
    os.kill(rank_process(rank, cli.only_run().metadata["run_id"]).pid, number)
    _, errors = process.communicate(timeout=60)
    return cli.only_run(), process.returncode, errors


def lines_so_far(cli: Cli) -> list[dict[str, Any]]:
    """The time series while it is written."""
    path = cli.only_run().directory / "timeseries.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def check_what_is_kept(run: Run) -> None:
    """Totals are the sums of the rank files, which hold what each rank told last; all is marked."""
    summary, ranks = run.summary, [run.rank(number) for number in range(3)]
    assert summary["status"] == run.metadata["status"] == "failed"
    assert [one["rank"] for one in summary["incomplete_ranks"]] == [0, 1, 2]
    assert all(one["host"] == os.uname().nodename and one["last_seen_s"] >= 2 for one in summary["incomplete_ranks"])
    for name in ("read_bytes", "written_bytes", "read_ops", "write_ops"):
        assert summary["storage_total"][name] == sum(rank["storage_total"][name] for rank in ranks)
    assert all(rank["storage_total"]["write_ops"] > 0 for rank in ranks)
    assert all(rank["status"] != "complete" and rank["error"] for rank in ranks)
    host_lines = [json.loads(line) for line in (run.directory / "timeseries_hosts.jsonl").read_text().splitlines()]
    assert {line["host"] for line in host_lines} == {os.uname().nodename}
    assert host_lines[-1]["t_s"] >= 2
    for number, rank in enumerate(ranks):
        # Counters of a rank only grow: its last numbers lie between two lines of its time series.
        window = rank["window"]
        told_s = window["warmup_s"] + window["measured_s"]
        mine = [line for line in run.series if line["rank"] == number]
        before = [line["written_bytes"] for line in mine if line["t_s"] <= told_s - 0.5]
        after = [line["written_bytes"] for line in mine if line["t_s"] >= told_s + 0.5]
        assert max(before, default=0) <= rank["storage_total"]["written_bytes"] <= min(after, default=10**15)


def test_a_killed_rank_leaves_the_numbers_of_all(cli: Cli) -> None:
    """The run fails at once; what the ranks had told is there, once, and marked incomplete."""
    run, exit_code, errors = lost_rank(cli, 1, signal.SIGKILL)
    assert exit_code == 6
    assert "kept, marked incomplete" in errors
    check_what_is_kept(run)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_stands_still_ends_the_run(cli: Cli, rank: int) -> None:
    """Within the 60 s that are waited for it: exit code 7 and its host and number, also of rank 0; no process stays."""
    run, exit_code, errors = lost_rank(cli, rank, signal.SIGSTOP)
    assert exit_code == 7
    assert f"rank {rank} on {os.uname().nodename}: not heard of for 10 s" in errors
    check_what_is_kept(run)
    with pytest.raises(AssertionError, match="no process"):
        rank_process(rank, run.metadata["run_id"])


def test_a_failing_rank_ends_the_others_soon(cli: Cli) -> None:
    """One of two ranks cannot write any more: the other ends long before its two minutes, and the cause is told."""
    process = cli.start(
        *cli.load("--num-processes", "2", "--oversubscribe", "--allow-run-as-root", "--duration", "120"),
        *("--cache-dir", str(cli.cache), "--num-users", "2"),
    )
    cli.eventually(lambda: cli.runs() and lines_so_far(cli), "the ranks play")
    cli.eventually(lambda: any("rank_1" in path.parts for path in cli.objects()), "rank 1 writes")
    (objects,) = {path.parents[2] for path in cli.objects() if "rank_1" in path.parts}
    objects.rename(cli.place / "elsewhere")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6
    assert f"rank 1 on {os.uname().nodename}: " in errors
    ranks = [cli.only_run().rank(number) for number in (0, 1)]
    assert [rank["status"] for rank in ranks] == ["interrupted", "failed"]
    assert ranks[0]["error"]["message"] == "stopped: another rank failed"
    assert cli.only_run().summary["incomplete_ranks"] == []
