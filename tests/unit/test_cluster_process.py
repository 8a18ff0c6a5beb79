"""Whether the process that wrote a file is still there, with real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlpstorage.cluster.process import process_alive, this_process

ROOT = Path(__file__).resolve().parents[2]
DESCRIBE = "import json, sys; from mlpstorage.cluster.process import this_process; "


@contextmanager
def waiting_process(before: str = "") -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """A process that has described itself and then waits for its standard input to end."""
    code = f"{before}{DESCRIBE}print(json.dumps(this_process()), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    """Let `process` end, and leave it a zombie."""
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_this_process_is_alive_and_described_as_proc_does() -> None:
    """The description holds this process's number and the start time that /proc/self/stat shows as its field 22."""
    described = this_process()
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    assert described["pid"] == os.getpid()
    assert described["start_ticks"] == int(fields[22 - 3])
    assert json.loads(json.dumps(described)) == described
    assert process_alive(described) is True


def test_process_is_gone_once_it_is_a_zombie() -> None:
    """A child that runs is alive; ended but not yet waited for, it is not; nor after that."""
    with waiting_process() as (process, described):
        assert described["pid"] == process.pid
        assert process_alive(described) is True
        end(process)
        assert "State:\tZ" in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        assert process_alive(described) is False
        process.wait()
        assert process_alive(described) is False


def test_killed_process_is_gone() -> None:
    """SIGKILL leaves a process no chance to say that it ends."""
    with waiting_process() as (process, described):
        process.kill()
        process.wait()
        assert process_alive(described) is False


def test_next_process_with_the_same_number_is_another() -> None:
    """A living process with the recorded number that started at another time is not the recorded one."""
    described = this_process()
    assert process_alive(described | {"start_ticks": int(str(described["start_ticks"])) - 1}) is False


def test_command_name_may_look_like_fields_of_stat() -> None:
    """A process that calls itself `) Z 1 2` is read rightly."""
    rename = "open('/proc/self/comm', 'w').write(') Z 1 2'); "
    with waiting_process(rename) as (process, described):
        assert ") Z 1 2" in Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
        assert process_alive(described) is True
        end(process)
        assert process_alive(described) is False


def test_process_of_another_boot_is_gone() -> None:
    """After a reboot no recorded process is left, whatever has its number now."""
    assert process_alive(this_process() | {"boot_id": "00000000-0000-0000-0000-000000000000"}) is False


@pytest.mark.parametrize(
    "change",
    [
        {"host": "another-host.invalid"},
        {"pid": None},
        {"pid": "12"},
        {"pid": 0},
        {"pid": -1},
        {"start_ticks": None},
        {"host": None},
    ],
)
def test_what_cannot_be_told_is_none(change: dict[str, object]) -> None:
    """Another host's processes, and broken descriptions, are neither alive nor gone."""
    assert process_alive(this_process() | change) is None


def test_number_that_no_process_can_have() -> None:
    """A number beyond what the kernel gives belongs to no process, and is no crash."""
    assert process_alive(this_process() | {"pid": 1 << 70}) is False
