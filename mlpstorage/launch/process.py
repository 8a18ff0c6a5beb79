"""Running a command as a job: its lines are read, its standard error is kept, a signal ends all of it."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mlpstorage.errors import AccessError, MissingFileError

INTERRUPT_GRACE_S = 4.0
"""Time between passing on Ctrl-C or SIGTERM and killing what is left of the job."""

_STDERR_SHOWN_BYTES = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        returncode: As of `subprocess`: the exit code, or minus the signal's number.
        interrupted: Whether a signal to this process ended it.
        stderr_tail: Last lines of its standard error.
    """

    returncode: int
    interrupted: bool
    stderr_tail: str


def run_job(
    command: Sequence[str], *, environment: Mapping[str, str], stderr_path: Path, on_line: Callable[[bytes], None]
) -> JobOutcome:
    """Run a command to its end.

    It gets a process group of its own, so that Ctrl-C reaches it through this process only, once. Its standard error
    goes to a file and only its standard output is read, so that neither can fill up and block it.

    Args:
        command: Argv.
        environment: The command's environment; its PATH is where the program is looked up.
        stderr_path: File for its standard error.
        on_line: Called with every line of its standard output.

    Raises:
        MissingFileError: The program is not there.
        AccessError: It may not be executed.
    """
    with stderr_path.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise MissingFileError(f"cannot start {command[0]}: it is not there") from error
        except OSError as error:
            raise AccessError(f"cannot start {command[0]}: {error.strerror}") from error
    assert process.stdout is not None, "it is a pipe"
    with process, _passed_on(process) as interruption:
        try:
            for line in process.stdout:
                on_line(line)
        except BaseException:  # whatever it is, the job must not run on without a listener
            _signal_group(process, signal.SIGTERM)
            raise
        returncode = process.wait()
    return JobOutcome(returncode=returncode, interrupted=interruption.is_set(), stderr_tail=_tail(stderr_path))


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Pass SIGINT and SIGTERM on to the job as SIGTERM; kill it where it does not end in time, or at the second one."""
    interruption = threading.Event()
    killer = threading.Timer(INTERRUPT_GRACE_S, _signal_group, (process, signal.SIGKILL))
    killer.daemon = True

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        if interruption.is_set():
            _signal_group(process, signal.SIGKILL)
            return
        interruption.set()
        _signal_group(process, signal.SIGTERM)
        killer.start()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        killer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # Whether or not the launcher itself has ended: a rank of its group may hold the pipe still.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _STDERR_SHOWN_BYTES, 0))
        return file.read().decode(errors="replace").strip()
