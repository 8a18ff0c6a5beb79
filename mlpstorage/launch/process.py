"""Running a command as a job: its lines are read, its standard error is kept, a signal ends all of it."""

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mlpstorage.errors import AccessError, MissingFileError

INTERRUPT_GRACE_S = 3.5
"""Time between passing on Ctrl-C or SIGTERM and killing what is left of the job."""

_LOOK_EVERY_S = 0.25
"""How often it is asked whether the job must end."""

_ABANDON_S = 0.5
"""A job that was killed is listened to so long: a process on another host may hold the pipe still."""

_CHUNK_BYTES = 1 << 16
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
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    stderr_path: Path,
    on_line: Callable[[bytes], None],
    must_end: Callable[[], bool] = lambda: False,
) -> JobOutcome:
    """Run a command to its end.

    It gets a session of its own, so that Ctrl-C reaches it through this process only, once. Its standard error goes to
    a file and only its standard output is read, so that neither can fill up and block it.

    Args:
        command: Argv.
        environment: The command's environment; its PATH is where the program is looked up.
        stderr_path: File for its standard error.
        on_line: Called with every line of its standard output.
        must_end: Asked several times a second; once it says so, the job is ended as by a signal.

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
    ending = _Ending(process)
    with process, _passed_on(ending) as interruption:
        try:
            for line in _lines(process, ending, must_end):
                on_line(line)
        except BaseException:  # whatever it is, the job must not run on without a listener
            _signal_group(process, signal.SIGTERM)
            raise
        returncode = process.wait()
    return JobOutcome(returncode=returncode, interrupted=interruption.is_set(), stderr_tail=_tail(stderr_path))


def _lines(process: subprocess.Popen[bytes], ending: "_Ending", must_end: Callable[[], bool]) -> Iterator[bytes]:
    """The lines of the job's standard output, until nobody can write to it any more or the job was killed."""
    assert process.stdout is not None, "it is a pipe"
    pipe = process.stdout.fileno()
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    rest = b""
    while not ending.is_over():
        if ready.poll(_LOOK_EVERY_S * 1000):
            chunk = os.read(pipe, _CHUNK_BYTES)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line + b"\n"
        if not ending.begun and must_end():
            ending.begin()
    if rest:
        yield rest


class _Ending:
    """The end of a job from outside: SIGTERM, and SIGKILL where it does not end in time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._killer = threading.Timer(INTERRUPT_GRACE_S, self.kill)
        self._killer.daemon = True
        self._killed_s: float | None = None
        self.begun = False

    def begin(self) -> None:
        """Ask it to end."""
        self.begun = True
        _signal_group(self._process, signal.SIGTERM)
        self._killer.start()

    def kill(self) -> None:
        """End it, with all that it has started on this host."""
        _signal_group(self._process, signal.SIGKILL)
        # The ssh clients of Open MPI are process groups of their own.
        for pid in _session(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._killed_s = time.monotonic()

    def is_over(self) -> bool:
        """Whether it was killed, and its last lines had time to come."""
        return self._killed_s is not None and time.monotonic() > self._killed_s + _ABANDON_S

    def cancel(self) -> None:
        """The job has ended."""
        self._killer.cancel()


@contextmanager
def _passed_on(ending: _Ending) -> Iterator[threading.Event]:
    """Pass SIGINT and SIGTERM on to the job as SIGTERM; kill it where it does not end in time, or at the second one."""
    interruption = threading.Event()

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        interruption.set()
        if ending.begun:
            ending.kill()
        else:
            ending.begin()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        ending.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _session(leader: int) -> Iterator[int]:
    """Processes of the session that `leader` began."""
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, OSError):
            pid = int(entry.name)
            if os.getsid(pid) == leader:
                yield pid


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # Whether or not the launcher itself has ended: a rank of its group may hold the pipe still.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _STDERR_SHOWN_BYTES, 0))
        return file.read().decode(errors="replace").strip()
