"""Files of /proc and /sys, of which any may be missing."""

import contextlib
import os
from pathlib import Path

ROOT = Path("/")


def read(path: Path) -> str | None:
    """Text of a kernel's file; None where it is not there or refuses (a link that is down, another user's cgroup)."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None


def printable(text: str) -> str:
    """`text` without the surrogates that stand for bytes outside UTF-8: no JSON file can hold them."""
    return os.fsencode(text).decode("utf-8", errors="replace")


def text(path: Path) -> str | None:
    """What a file says without blanks around it; None where it says nothing."""
    return printable((read(path) or "").strip()) or None


def number(path: Path) -> int | None:
    """The whole number that a file holds; None where it holds none."""
    try:
        return int(read(path) or "")
    except ValueError:
        return None


def entries(directory: Path) -> list[Path]:
    """What is in a directory, by name; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(directory.iterdir())
    return []
