"""Which CPUs I/O threads run on.

A device often completes several operations at once. Threads of CPython that it wakes on different CPUs then spend more
on handing the interpreter lock to each other than on their operations; on one CPU each goes on until it waits again,
and finds the lock free. Eight threads that read 128 KiB directly took 107 us of processor time an operation on two
CPUs, and 24 us on one, where they did 1.7 times as many. What that CPU limits is the part of a rank's I/O that needs a
processor: 40,000 such reads a second.
"""

import contextlib
import os


class SharedCpu:
    """A CPU for the I/O threads of a rank: the highest that the process may use, the next lower for the next rank.

    Interrupts, and the threads that do not share it, mostly run on low ones.

    Args:
        number: Of the rank on its host; ranks begin again at the highest CPU where there are more of them than CPUs.
    """

    __slots__ = ("_all", "_one")

    def __init__(self, number: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        self._all = frozenset(cpus)
        self._one = frozenset({cpus[-1 - number % len(cpus)]})

    def enter(self) -> None:
        """Have the calling thread run there, if it still may."""
        _run_on(self._one)

    def leave(self) -> None:
        """Have the calling thread run anywhere again."""
        _run_on(self._all)


def _run_on(cpus: frozenset[int]) -> None:
    with contextlib.suppress(OSError):  # the process was meanwhile confined to others
        os.sched_setaffinity(0, cpus)
