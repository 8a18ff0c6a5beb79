"""Which process wrote a file, and whether it is still there."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STATE_FIELD = 0
_START_TICKS_FIELD = 19
"""Fields 3 (state) and 22 (start time) of proc(5) /proc/PID/stat, counted from the first after the command's name."""

_GONE_STATES = frozenset("ZXx")
"""A zombie, or a dead process: it does no more work, whoever may still wait for it."""


def this_process() -> dict[str, object]:
    """What tells this process from every other: `pid`, `host`, `boot_id` and `start_ticks` (clock ticks since boot).

    A process number alone would be mistaken for the next process that gets it.
    """
    pid = os.getpid()
    stat = _stat_fields(pid)
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "start_ticks": int(stat[_START_TICKS_FIELD]),
    }


def process_alive(process: Mapping[str, object]) -> bool | None:
    """Whether the process that `this_process` described still runs.

    None where it cannot be told from here: it ran on another host, belongs to a user whose processes are hidden from
    this one, or the description is incomplete.
    """
    pid, start_ticks = process.get("pid"), process.get("start_ticks")
    if process.get("host") != socket.gethostname() or not isinstance(pid, int) or not isinstance(start_ticks, int):
        return None
    if process.get("boot_id") != _boot_id():
        return False
    if pid < 1:
        return None
    try:
        stat = _stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None if _hidden(pid) else False
    return int(stat[_START_TICKS_FIELD]) == start_ticks and stat[_STATE_FIELD] not in _GONE_STATES


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; the second, the command's name, may hold blanks and brackets."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def _hidden(pid: int) -> bool:
    """Whether `pid` exists although /proc does not show it (its mount option `hidepid`)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    # It may be signalled, so it is this user's and /proc would show it: it ended between the two looks.
    return False
