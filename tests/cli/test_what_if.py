"""`--what-if` shows the whole plan and the exact command, creates nothing and contacts nobody."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.trace_files import mooncake

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Cli

LOCAL = ("kvcache", "run", "--model", "llama3.1-8b", "--num-users", "50", "--duration", "30")
DISTRIBUTED = (*LOCAL, "--hosts", "host1", "host2", "--exec-type", "mpi", "--num-processes", "2")


def command_line(shown: str) -> list[str]:
    """Words of the command that the plan shows."""
    lines = shown.splitlines()
    return lines[lines.index("Command:") + 1].split()


def test_local_plan_has_no_launcher(cli: Cli) -> None:
    """One rank on this machine is started without MPI; the directory for results is not created."""
    ended = cli.run(*LOCAL, "--results-dir", cli.results, "--what-if")
    assert ended.returncode == 0, ended.stderr
    command = command_line(ended.stdout)
    assert "mpirun" not in ended.stdout.split("Command:")[1]
    assert command[1:3] == ["-m", "mlpstorage.kvcache.rank"]
    assert command[command.index("--num-users") + 1] == "50"
    assert command[command.index("--duration") + 1] == "30"
    assert list(cli.place.iterdir()) == []


def test_distributed_plan_names_the_hosts(cli: Cli) -> None:
    """Two hosts that do not exist: the command starts with mpirun and names them."""
    ended = cli.run(*DISTRIBUTED, "--results-dir", cli.results, "--what-if")
    assert ended.returncode == 0, ended.stderr
    command = command_line(ended.stdout)
    assert command[:5] == ["mpirun", "-n", "2", "-host", "host1:1,host2:1"]
    assert list(cli.place.iterdir()) == []


@pytest.mark.parametrize("words", [LOCAL, DISTRIBUTED], ids=["local", "distributed"])
def test_nobody_is_contacted(cli: Cli, tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]) -> None:
    """No process of the command ever calls connect: no name is looked up, no host reached."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    calls: Path = tmp_path_factory.mktemp("strace") / "calls"
    prefix = (strace, "-f", "-e", "trace=connect,execve", "-o", str(calls))
    ended = cli.run(*words, "--results-dir", cli.results, "--what-if", prefix=prefix)
    assert ended.returncode == 0, ended.stderr
    seen = calls.read_text()
    assert "execve(" in seen
    assert "connect(" not in seen
    assert list(cli.place.iterdir()) == []


def test_plan_of_a_trace_is_settled(cli: Cli) -> None:
    """What follows from the trace stands in the plan and in the command; nothing is created."""
    trace = mooncake(cli.place / "trace.jsonl", [(0, 600, [1, 2])])
    ended = cli.run(*LOCAL, "--results-dir", cli.results, "--trace", trace, "--max-requests", "1", "--what-if")
    assert ended.returncode == 0, ended.stderr
    assert f"trace {trace} (mooncake), open loop, times x 1, first 1 requests" in ended.stdout
    for name, value in (
        ("arrivals", "open"),
        ("block_tokens", "512"),
        ("trace_format", "mooncake"),
        ("decisions", "arrival"),
    ):
        assert [name, value, "(auto)"] in [line.split() for line in ended.stdout.splitlines()]
        words = command_line(ended.stdout)
        assert words[words.index(f"--{name.replace('_', '-')}") + 1] == value
    assert list(cli.place.iterdir()) == [trace]


def test_plan_as_json(cli: Cli) -> None:
    """With --json the plan is one document that holds the argv and why it would be refused."""
    ended = cli.run(*LOCAL, "--results-dir", cli.results, "--cpu-mem-gb", "1000000", "--what-if", "--json")
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert plan["ranks"] == 1
    assert plan["command"][1:3] == ["-m", "mlpstorage.kvcache.rank"]
    assert "--cpu-mem-gb" in plan["refusal"]
