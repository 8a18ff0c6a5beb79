"""What cannot be run is refused before any work; what breaks during the work ends orderly."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cli.conftest import Cli


def one_line(stderr: str) -> str:
    """The one line of an error message."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("mlpstorage: error: ")
    return lines[0]


def left_behind(cli: Cli) -> list[Path]:
    """Files below the test's directory that the test did not make, but for the note of a refused invocation."""
    notes = cli.results / "invocations"
    return [path for path in cli.place.rglob("*") if path not in {cli.results, notes} and path.parent != notes]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["--no-such-flag"], ["--no-such-flag"], id="unknown flag"),
        pytest.param(["--model", "gpt-9"], ["--model", "llama3.1-8b"], id="unknown model"),
        pytest.param(["--num-users", "0"], ["--num-users", "1"], id="no users"),
        pytest.param(["--num-users", "-3"], ["--num-users", "1"], id="negative users"),
        pytest.param(["--duration", "0"], ["--duration", "greater than 0"], id="no duration"),
        pytest.param(["--duration", "-1"], ["--duration", "greater than 0"], id="negative duration"),
        pytest.param(["--duration", "nan"], ["--duration"], id="duration is no number"),
        pytest.param(["--warmup", "-1"], ["--warmup", "0"], id="negative warm-up"),
        pytest.param(["--storage-gb", "0"], ["--storage-gb", "greater than 0"], id="no storage"),
        pytest.param(["--storage-gb", "-1"], ["--storage-gb", "greater than 0"], id="negative storage"),
        pytest.param(["--gpu-mem-gb", "-1"], ["--gpu-mem-gb", "0"], id="negative GPU memory"),
        pytest.param(["--cpu-mem-gb", "-1"], ["--cpu-mem-gb", "0"], id="negative memory"),
        pytest.param(["--block-tokens", "0"], ["--block-tokens", "1"], id="no block tokens"),
        pytest.param(["--max-requests", "0"], ["--max-requests", "1"], id="no requests"),
        pytest.param(["--trials", "0"], ["--trials", "1"], id="no trials"),
        pytest.param(["--warmup", "soon"], ["--warmup", "steady"], id="warm-up is neither seconds nor the word"),
        pytest.param(["--workload", "poetry"], ["--workload", "coding-agent"], id="unknown profile"),
        pytest.param(["--workload", "chat=0"], ["--workload", "greater than 0"], id="profile without weight"),
        pytest.param(["--request-rate", "0"], ["--request-rate", "greater than 0"], id="no rate"),
        pytest.param(["--arrivals", "sometimes"], ["--arrivals", "sometimes"], id="unknown arrivals"),
    ],
)
def test_usage_error_is_one_line_that_names_the_flag(cli: Cli, words: list[str], said: list[str]) -> None:
    """A flag that is unknown or out of range: exit 2, one line with the flag and the range, and nothing created."""
    ended = cli.run("kvcache", "run", "--results-dir", cli.results, *words)
    assert ended.returncode == 2, ended.stderr
    line = one_line(ended.stderr)
    assert [text for text in said if text not in line] == []
    assert ended.stdout == ""
    assert list(cli.place.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "flag", "other"),
    [
        (["--arrivals", "open"], "--arrivals open", "--request-rate"),
        (["--arrivals", "session"], "--arrivals session", "--trace"),
        (["--arrivals", "closed", "--request-rate", "5"], "--request-rate", "--arrivals closed"),
        (["--time-scale", "0.5"], "--time-scale", "--trace"),
        (["--spread-arrivals", "3"], "--spread-arrivals", "--trace"),
        (["--max-requests", "3"], "--max-requests", "--trace"),
        (["--trace-format", "azure"], "--trace-format", "--trace"),
        (["--trace", "t.jsonl", "--enable-rag"], "--enable-rag", "trace"),
        (["--trace", "t.jsonl", "--workload", "rag"], "--workload", "trace"),
        (["--trace", "t.jsonl", "--disable-multi-turn"], "--disable-multi-turn", "trace"),
        (["--trace", "t.jsonl", "--request-rate", "5", "--time-scale", "2"], "--time-scale", "--request-rate"),
        (["--enable-rag", "--workload", "chat=1,batch=1"], "--enable-rag", "--workload"),
        (["--trials", "2", "--keep-cache"], "--trials", "--keep-cache"),
        (["--decisions", "arrival", "--load-timeout", "1"], "--decisions arrival", "--load-timeout"),
        (["--accelerator", "h100", "--prefill-tokens-per-s", "100"], "--prefill-tokens-per-s", "--accelerator"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags_that_do_not_go_together(cli: Cli, words: list[str], flag: str, other: str) -> None:
    """Exit 2, one line that begins with the flag and names what it does not go with; nothing is created."""
    ended = cli.run("kvcache", "run", "--results-dir", cli.results, *words)
    assert ended.returncode == 2, ended.stderr
    line = one_line(ended.stderr)
    assert flag in line
    assert other in line
    assert list(cli.place.iterdir()) == []


def test_missing_trace(cli: Cli) -> None:
    """A trace that is not there: exit 3, its path is named, and only a note of the invocation is kept."""
    ended = cli.run(*cli.load("--trace", cli.place / "none.jsonl"))
    assert ended.returncode == 3
    assert str(cli.place / "none.jsonl") in one_line(ended.stderr)
    assert left_behind(cli) == []


def test_trace_with_a_broken_line(cli: Cli) -> None:
    """A trace whose fifth line is broken: exit 5, file and line number are named."""
    trace = cli.place / "broken.jsonl"
    good = [{"timestamp": n, "input_length": 512, "output_length": 1, "hash_ids": [n]} for n in range(9)]
    lines = [json.dumps(row) for row in good]
    lines[4] = lines[4][:-5]
    trace.write_text("\n".join(lines))
    ended = cli.run(*cli.load("--trace", trace))
    assert ended.returncode == 5
    assert f"{trace}, line 5:" in one_line(ended.stderr)
    assert left_behind(cli) == [trace]


@pytest.mark.parametrize(("flag", "name"), [("--results-dir", "results"), ("--cache-dir", "cache")])
def test_directory_without_permission(cli: Cli, unprivileged: tuple[str, ...], flag: str, name: str) -> None:
    """A result or cache directory below one that may not be written: exit 4 before any work, the directory named."""
    closed = cli.place / "closed"
    closed.mkdir(mode=0o555)
    ended = cli.run(*cli.load(flag, closed / name), prefix=unprivileged)
    assert ended.returncode == 4, ended.stderr
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("mlpstorage: error: ")]
    assert str(closed) in error
    assert flag in error
    assert list(closed.iterdir()) == []
    assert left_behind(cli) == [closed]


@pytest.mark.parametrize(("flag", "lacking"), [("--storage-gb", "space"), ("--cpu-mem-gb", "memory")])
def test_plan_that_does_not_fit_the_machine(cli: Cli, flag: str, lacking: str) -> None:
    """Too little space or memory: exit 5 with the need, what is there, and the flag to change; nothing is created."""
    ended = cli.run(*cli.load(flag, "10000000", "--cache-dir", cli.cache))
    assert ended.returncode == 5
    line = one_line(ended.stderr)
    assert f"not enough {lacking}" in line
    assert "needs 10000" in line, "the need"
    assert "are free" in line, "what is there"
    assert flag in line
    assert left_behind(cli) == []


def test_config_file_with_an_unknown_key(cli: Cli) -> None:
    """A config file with a key that no option has: exit 5, file and key are named."""
    config = cli.place / "config.yaml"
    config.write_text("num_users: 3\nnum_user: 4\n")
    ended = cli.run(*cli.load("--config-file", config))
    assert ended.returncode == 5
    line = one_line(ended.stderr)
    assert str(config) in line
    assert "unknown key num_user;" in line
    assert left_behind(cli) == [config]


def test_config_file_with_a_value_out_of_range(cli: Cli) -> None:
    """A config file's value out of range: exit 5; the file, its key and the range are named."""
    config = cli.place / "config.yaml"
    config.write_text("io_threads: 0\n")
    ended = cli.run(*cli.load("--config-file", config))
    assert ended.returncode == 5
    line = one_line(ended.stderr)
    assert str(config) in line
    assert "io_threads" in line
    assert "greater than or equal to 1" in line


def test_environment_value_out_of_range(cli: Cli) -> None:
    """An environment variable out of range: exit 5; the variable and the range are named."""
    ended = cli.run("kvcache", "run", "--results-dir", cli.results, env={"MLPSTORAGE_NUM_USERS": "0"})
    assert ended.returncode == 5
    line = one_line(ended.stderr)
    assert "MLPSTORAGE_NUM_USERS" in line
    assert "greater than or equal to 1" in line
    assert left_behind(cli) == []


def test_missing_mpi_launcher(cli: Cli) -> None:
    """Several ranks and no such launcher: exit 3 before any work, and the error says how to get one."""
    ended = cli.run(*cli.load("--num-processes", "2", "--mpi-bin", "no-such-mpirun"))
    assert ended.returncode == 3
    assert "--mpi-bin no-such-mpirun" in one_line(ended.stderr)
    assert left_behind(cli) == []


@pytest.fixture
def small_file_system(cli: Cli) -> Iterator[Path]:
    """The cache directory as a file system of its own, whose size the test can change."""
    cli.cache.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a file system takes root")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(cli.cache)],  # noqa: S607 - the system's, wherever it is
        check=False,
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(f"this root may not mount: {mount.stderr.strip()}")
    try:
        yield cli.cache
    finally:
        cli.kill_started()
        subprocess.run(["umount", str(cli.cache)], check=True)  # noqa: S607 - likewise


def test_disk_that_fills_during_the_run(cli: Cli, small_file_system: Path) -> None:
    """A file system that fills: exit 6, status `failed`, partial numbers kept and marked, the cache files removed."""
    process = cli.start(
        *cli.load("--storage-gb", "0.9", "--duration", "60", "--warmup", "0", "--cache-dir", small_file_system)
    )

    def shrunk() -> bool:
        """Leave the run a little more room than it has taken by now."""
        assert process.poll() is None, process.communicate()
        if len(cli.objects()) < 4:
            return False
        space = os.statvfs(small_file_system)
        size_bytes = (space.f_blocks - space.f_bfree) * space.f_frsize + (8 << 20)
        options = f"remount,size={size_bytes}"
        command = ["mount", "-o", options, str(small_file_system)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    cli.eventually(shrunk, "the file system's size could be lowered")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 6, stderr
    (error,) = [line for line in stderr.splitlines() if line.startswith("mlpstorage: error: ")]
    assert "No space left on device" in error
    run = cli.only_run()
    assert (run.metadata["status"], run.metadata["exit_code"]) == ("failed", 6)
    assert "No space left on device" in run.metadata["error"]
    assert run.summary["status"] == "failed"
    assert run.summary["storage_total"]["written_bytes"] > 0
    assert run.rank(0)["error"]["exit_code"] == 6
    assert list(small_file_system.rglob("*")) == []


def damage_file(path: Path, damage: str) -> None:
    """Cut a cache file short, remove it, or put something else into one of its pages."""
    if damage == "truncated":
        os.truncate(path, 4096 + 17)
    elif damage == "deleted":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.seek(3 * 4096)
            file.write(os.urandom(4096))


@pytest.mark.parametrize("damage", ["truncated", "deleted", "overwritten"])
def test_object_that_is_damaged_under_the_run(cli: Cli, damage: str) -> None:
    """A cache file that is cut, gone or changed when it is read again: exit 6, status `failed`, the rest removed."""
    # Everything fits, so that files are read again and never replaced. Wrong data alone lets a run go on to its end.
    duration_s = 8 if damage == "overwritten" else 60
    process = cli.start(
        *cli.load("--num-users", "4", "--storage-gb", "1", "--duration", duration_s, "--warmup", "0"),
        *("--cache-dir", str(cli.cache)),
    )
    cli.eventually(lambda: len(cli.objects()) >= 20 or process.poll() is not None, "files in the cache directory")
    for path in cli.objects():
        # The run may meet the first of them and end before all are damaged.
        with contextlib.suppress(FileNotFoundError):
            damage_file(path, damage)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 6, stderr
    assert "Traceback" not in stderr
    run = cli.only_run()
    assert (run.metadata["status"], run.metadata["exit_code"]) == ("failed", 6)
    assert run.summary["status"] == "failed"
    total = run.summary["storage_total"]
    counted = "verify_errors" if damage == "overwritten" else "io_errors"
    assert total[counted] > 0
    assert not cli.cache.exists(), "the run made the directory, so it removed it"
