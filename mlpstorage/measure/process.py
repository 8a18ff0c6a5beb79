"""Processor time of this process, and how long it had to wait for processors."""

import contextlib
import resource
from collections.abc import Collection
from pathlib import Path

from mlpstorage.measure.clock import NS


def cpu_s() -> float:
    """Seconds of processor time, user and system, that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def thread_waits_ns(tasks: Path = Path("/proc/self/task")) -> dict[int, int] | None:
    """How long each thread of this process has been ready to run and waited for a processor, by thread id.

    That is the second field of the kernel's `schedstat`, in nanoseconds. None where the kernel keeps none: the file is
    missing, or all its fields are 0, also for a thread that has run.
    """
    waits_ns: dict[int, int] = {}
    ran_ns = 0
    try:
        for task in tasks.iterdir():
            fields = _schedstat(task)
            if fields is not None:
                ran_ns += fields[0]
                waits_ns[int(task.name)] = fields[1]
    except OSError:
        return None
    return waits_ns if ran_ns else None


def thread_activity(leave_out: Collection[int] = (), tasks: Path = Path("/proc/self/task")) -> object:
    """What the kernel has counted of each thread of this process, but for some; it changes whenever one of them runs.

    None where the kernel keeps no `schedstat`. A thread that waits in a system call, for a device or a server, does not
    run; one that is ready to run and waits for a processor counts as if it did.
    """
    counted: dict[str, bytes] = {}
    try:
        for task in tasks.iterdir():
            if int(task.name) not in leave_out:
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    counted[task.name] = (task / "schedstat").read_bytes()
    except OSError:
        return None
    return counted if any(text.strip() not in {b"", b"0 0 0"} for text in counted.values()) else None


def waited_s(before: dict[int, int] | None, after: dict[int, int] | None) -> float | None:
    """Seconds that threads waited between two calls of `thread_waits_ns`; None where either is.

    Threads that ended between them are left out.
    """
    if before is None or after is None:
        return None
    return sum(wait_ns - before.get(thread, 0) for thread, wait_ns in after.items()) / NS


class ProcessorMeter:
    """Processor time of this process since the measured window began, and how long its threads waited for processors.

    Attributes:
        cpu_s: Seconds used, 0 before the window, as of the last reading.
        wait_s: Seconds waited likewise, summed over threads; None where the kernel does not tell.
    """

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.wait_s: float | None = 0.0
        self._start: tuple[float, dict[int, int] | None] | None = None

    def start(self) -> None:
        """The window begins."""
        self._start = cpu_s(), thread_waits_ns()

    def read(self) -> None:
        """Take a reading."""
        if self._start is not None:
            used_s, waits_ns = self._start
            self.cpu_s, self.wait_s = cpu_s() - used_s, waited_s(waits_ns, thread_waits_ns())


def _schedstat(task: Path) -> tuple[int, int] | None:
    """Nanoseconds that a thread has run, and waited; None where it has ended meanwhile."""
    try:
        fields = (task / "schedstat").read_text(encoding="ascii").split()
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        if task.exists():
            raise
        return None
    return int(fields[0]), int(fields[1])
