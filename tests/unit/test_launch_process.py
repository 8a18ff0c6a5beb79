"""Jobs as real processes: their lines, their standard error, their ends, and signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlpstorage.errors import AccessError, MissingFileError
from mlpstorage.launch.process import JobOutcome, run_job

PYTHON = sys.executable


def job(tmp_path: Path, *command: str) -> tuple[JobOutcome, list[bytes]]:
    """Run a command; returns how it ended and its lines."""
    lines: list[bytes] = []
    outcome = run_job(command, environment=dict(os.environ), stderr_path=tmp_path / "stderr.log", on_line=lines.append)
    return outcome, lines


def python(tmp_path: Path, code: str, *words: str) -> tuple[JobOutcome, list[bytes]]:
    """Run a Python program as a job."""
    return job(tmp_path, PYTHON, "-c", code, *words)


def test_lines_come_in_their_order_and_standard_error_is_kept(tmp_path: Path) -> None:
    """A last line without an end is a line too."""
    outcome, lines = python(tmp_path, "import sys; print(1); print('oh', file=sys.stderr); sys.stdout.write('2')")
    assert lines == [b"1\n", b"2"]
    assert outcome == JobOutcome(returncode=0, interrupted=False, stderr_tail="oh")
    assert (tmp_path / "stderr.log").read_text() == "oh\n"


def test_much_output_on_both_streams_blocks_nothing(tmp_path: Path) -> None:
    """4 MiB of lines and 4 MiB of one unfinished line on standard error, far beyond what a pipe holds."""
    code = """
import sys
for number in range(4096):
    sys.stderr.write("e" * 1024)
    sys.stdout.write("o" * 1023 + "\\n")
"""
    outcome, lines = python(tmp_path, code)
    assert outcome.returncode == 0
    assert sum(map(len, lines)) == 4 << 20
    assert (tmp_path / "stderr.log").stat().st_size == 4 << 20
    assert 1000 <= len(outcome.stderr_tail) <= 10_000
    assert set(outcome.stderr_tail) == {"e"}


@pytest.mark.parametrize("code", [1, 5, 130])
def test_the_exit_code_is_reported(tmp_path: Path, code: int) -> None:
    """As the job gave it."""
    outcome, lines = python(tmp_path, f"raise SystemExit({code})")
    assert (outcome.returncode, outcome.interrupted, lines) == (code, False, [])


def test_death_by_a_signal_is_reported(tmp_path: Path) -> None:
    """As minus its number; it came from elsewhere, so the job was not interrupted by us."""
    outcome, _ = python(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (outcome.returncode, outcome.interrupted) == (-signal.SIGKILL, False)


def test_words_reach_the_program_as_they_are(tmp_path: Path) -> None:
    """Blanks, quotes, dollars and newlines: no shell reads them; the program's own path has a blank, too."""
    place = tmp_path / "a b"
    place.mkdir()
    program = place / "say it"
    program.write_text(f"#!{PYTHON}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    words = ["a b", "'", '"', "$HOME", "`id`", "x\ny", "*", "; false", ""]
    outcome, lines = job(tmp_path, str(program), *words)
    assert outcome.returncode == 0
    assert json.loads(b"".join(lines)) == words


def test_the_environment_is_the_given_one(tmp_path: Path) -> None:
    """Its PATH is where the program is looked up."""
    program = tmp_path / "only-here"
    program.write_text("#!/bin/sh\necho $COLOUR\n")
    program.chmod(0o755)
    lines: list[bytes] = []
    outcome = run_job(
        ["only-here"],
        environment={"PATH": f"{tmp_path}:{os.environ['PATH']}", "COLOUR": "blue"},
        stderr_path=tmp_path / "stderr.log",
        on_line=lines.append,
    )
    assert (outcome.returncode, lines) == (0, [b"blue\n"])


def test_standard_input_is_empty(tmp_path: Path) -> None:
    """A program that asks gets no answer, in the place of waiting for one."""
    _, lines = python(tmp_path, "import sys; print(repr(sys.stdin.read()))")
    assert lines == [b"''\n"]


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """By path or by name."""
    for name in (str(tmp_path / "gone"), "no-such-program-anywhere"):
        with pytest.raises(MissingFileError, match=name):
            job(tmp_path, name)


def test_a_program_that_may_not_run_is_named(tmp_path: Path) -> None:
    """A file that is not executable."""
    program = tmp_path / "data"
    program.write_text("no program")
    with pytest.raises(AccessError, match="data"):
        job(tmp_path, str(program))


# Signals: the launcher is a process of its own, so that the tests' process gets none.

LAUNCHER = """
import json, os, signal, sys
from pathlib import Path
from mlpstorage.launch import process
from mlpstorage.launch.process import run_job

process.INTERRUPT_GRACE_S = 0.3
place, code = Path(sys.argv[1]), sys.argv[2]

def on_line(line):
    print(line.decode().strip(), flush=True)

before = signal.getsignal(signal.SIGTERM)
outcome = run_job([sys.executable, "-c", code], environment=dict(os.environ), stderr_path=place / "e", on_line=on_line)
assert signal.getsignal(signal.SIGTERM) == before, "the handler of before is back"
print(json.dumps([outcome.returncode, outcome.interrupted]), flush=True)
"""

TELLS = """
import signal, sys

def end(number, frame):
    print("job got", signal.Signals(number).name, flush=True)
    sys.exit(9)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
print("ready", flush=True)
signal.pause()
"""

IGNORES = """
import signal
signal.alarm(60)  # whatever the test does, this does not outlive it for long
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True:
    signal.pause()
"""

LEAVES_A_CHILD = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {IGNORES!r}])
child.wait()
"""


def signalled(tmp_path: Path, code: str, *numbers: signal.Signals) -> list[str]:
    """Lines of a launcher whose job is ready and that then gets the signals, one after the other."""
    command = [PYTHON, "-c", LAUNCHER, str(tmp_path), code]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with launcher:
        try:
            assert launcher.stdout is not None
            assert launcher.stdout.readline() == "ready\n"
            for number in numbers:
                launcher.send_signal(number)
            shown, _ = launcher.communicate(timeout=20)
        finally:
            launcher.kill()
    assert launcher.returncode == 0
    return str(shown).splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_as_sigterm(tmp_path: Path, number: signal.Signals) -> None:
    """The job ends in its own way and its last lines are read; the launcher's own handlers are back afterwards."""
    assert signalled(tmp_path, TELLS, number) == ["job got SIGTERM", "[9, true]"]


def test_a_job_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """After the grace time."""
    assert signalled(tmp_path, IGNORES, signal.SIGTERM) == ["[-9, true]"]


def test_what_a_job_leaves_behind_is_killed_too(tmp_path: Path) -> None:
    """A launcher of ranks that ends at SIGTERM while its rank does not: the rank holds the pipe, and must go."""
    assert signalled(tmp_path, LEAVES_A_CHILD, signal.SIGTERM) == ["[-15, true]"]
