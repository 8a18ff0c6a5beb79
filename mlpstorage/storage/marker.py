"""The file that says which run's objects lie in a directory."""

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlpstorage.config import Layout
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.claim import CacheFormat, format_document, parsed_format

MARKER_NAME: Final = ".mlpstorage.json"
RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a run may be called: it names a directory, and nothing but one."""

_TEMPORARY_MARKER_NAME: Final = ".mlpstorage.json.tmp"
_TOOL: Final = "mlpstorage"
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """Who claimed a directory, and what lies there.

    Attributes:
        run_id: The run.
        objects: Name of the directory of objects: the run's own id, or that of the run whose objects it uses.
        keep: Whether the objects are to outlive the run; until it begins, whether they are to outlive its claim.
        format: What the objects are; None where version 0.1 wrote the marker.
        pid: Process that holds the lock.
        host: Host of that process.
        created: When, in seconds since the epoch.
        created_directories: Directories that the claim, or the claims before it whose objects it uses, created,
            outermost first: the directory or its parents.
    """

    run_id: str
    objects: str
    keep: bool
    format: CacheFormat | None
    pid: int
    host: str
    created: float
    created_directories: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        """How the objects lie; version 0.1 knew one layout."""
        return Layout.FILE if self.format is None else self.format.layout

    @property
    def levels(self) -> tuple[int, ...]:
        """Digits of each level of hash directories; version 0.1 had two levels of one."""
        return (1, 1) if self.format is None else self.format.levels


def new_marker(
    run_id: str, objects: str, *, keep: bool, cache_format: CacheFormat, created_directories: tuple[str, ...]
) -> Marker:
    """The marker of a claim by this process."""
    return Marker(
        run_id=run_id,
        objects=objects,
        keep=keep,
        format=cache_format,
        pid=os.getpid(),
        host=socket.gethostname(),
        created=time.time(),
        created_directories=created_directories,
    )


def write_marker(directory: Path, marker: Marker) -> None:
    """Put a marker into a locked directory, in the place of one that is there."""
    assert marker.format is not None, "only markers of version 0.1, which are never written again, have none"
    document = {
        "tool": _TOOL,
        "run_id": marker.run_id,
        "objects": marker.objects,
        "keep": marker.keep,
        "format": format_document(marker.format),
        "pid": marker.pid,
        "host": marker.host,
        "created": marker.created,
        "created_directories": list(marker.created_directories),
    }
    temporary = directory / _TEMPORARY_MARKER_NAME
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor that follows no link
        json.dump(document, file)
    temporary.rename(directory / MARKER_NAME)


def read_marker(directory: Path) -> Marker | None:
    """The marker of a directory; None if there is none.

    Raises:
        ConfigurationError: There is a file of that name that no run of this tool wrote.
    """
    path = directory / MARKER_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor that follows no link
        content = file.read(_LIMIT_BYTES)
    try:
        return _parsed(json.loads(content))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"{path} is not a marker that mlpstorage wrote, so nothing here is safe to delete; "
            "remove it by hand, or choose another directory with --cache-dir"
        ) from error


def _parsed(document: dict[str, Any]) -> Marker:
    """A marker from its JSON; raises ValueError, TypeError or KeyError where it is none."""
    if document["tool"] != _TOOL:
        raise ValueError("the marker of another tool")
    return Marker(
        run_id=_name(document["run_id"]),
        objects=_name(document.get("objects", document["run_id"])),
        keep=document.get("keep", False) is True,
        format=parsed_format(document["format"]) if "format" in document else None,
        pid=int(document["pid"]),
        host=str(document["host"]),
        created=float(document["created"]),
        created_directories=tuple(map(str, document["created_directories"])),
    )


def _name(text: object) -> str:
    if not isinstance(text, str) or not RUN_ID.fullmatch(text):
        raise ValueError("not the name of a run")
    return text
