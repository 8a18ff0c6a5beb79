"""Where a run's files lie below the results directory, and how they are written whole or not at all."""

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel

from mlpstorage.errors import AccessError, ConfigurationError, MLPStorageError, RunError

RANKS_DIR = "ranks"
LOGS_DIR = "logs"
TRIALS_DIR = "trials"
CACHE_DIR = "cache"
"""Default cache directory below a result directory. It can hold millions of files that are no results."""
INVOCATIONS_DIR = "invocations"
METADATA_SUFFIX = "_metadata.json"

_COMPONENT_MAX_CHARS = 128
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_ACCESS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})


def planned_location(results_dir: Path, benchmark: str, model: str, command: str, run_datetime: str) -> Path:
    """The result directory that a run would get now. Creates nothing.

    Args:
        results_dir: The results directory.
        benchmark: Value of a `BENCHMARK_TYPES` member.
        model: Name of the model; characters that a path component should not have become `_`.
        command: The benchmark's command.
        run_datetime: `YYYYMMDD_HHMMSS`.

    Returns:
        `<results_dir>/<benchmark>/<model>/<command>/<run_datetime>`, or the first of `-2`, `-3` ... that is free.
    """
    parent = results_dir.joinpath(*(_component(part) for part in (benchmark, model, command)))
    location = parent / _component(run_datetime)
    while os.path.lexists(location):
        location = _next_location(location)
    return location


def create_location(planned: Path) -> Path:
    """Create the result directory `planned`, or its next free name where another process took it first.

    Returns:
        The new directory, which no other process was given; it has `ranks/` and `logs/`.

    Raises:
        AccessError: It may not be created there.
        ConfigurationError: There is no space for it.
    """
    location = planned
    try:
        planned.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                location.mkdir()
                break
            except FileExistsError:
                location = _next_location(location)
        (location / RANKS_DIR).mkdir()
        (location / LOGS_DIR).mkdir()
    except OSError as error:
        message = f"cannot create the result directory {location}: {_reason(error)}; choose another with --results-dir"
        raise (ConfigurationError if error.errno in _NO_SPACE else AccessError)(message) from error
    return location


def check_results_dir(results_dir: Path) -> None:
    """Make sure that a result directory can be created below `results_dir`, which need not exist. Leaves nothing.

    Raises:
        AccessError: It cannot; the message names the directory that is in the way.
    """
    # absolute(), not resolve(): a link that leads nowhere must be found here, and not by the mkdir after the checks.
    nearest = results_dir.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    advice = "choose another with --results-dir"
    if not os.path.isdir(nearest):  # noqa: PTH112 - Path.is_dir raises where a link leads into a forbidden directory
        raise AccessError(f"cannot use the results directory {results_dir}: {nearest} is not a directory; {advice}")
    denied = f"cannot write to the results directory {results_dir}: {nearest}: "
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise AccessError(f"{denied}permission denied or read-only; {advice}")
    try:
        # The permission bits do not tell all (a root user, an export that maps users, a quota), so really create one.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise AccessError(f"{denied}{_reason(error)}; {advice}") from error


def metadata_path(result_dir: Path, benchmark: str, run_datetime: str) -> Path:
    """Metadata file of the run in `result_dir`."""
    return result_dir / f"{_component(benchmark)}_{_component(run_datetime)}{METADATA_SUFFIX}"


def invocation_path(results_dir: Path, run_id: str) -> Path:
    """Metadata file of an invocation that failed before it had a result directory."""
    return results_dir / INVOCATIONS_DIR / f"{_component(run_id)}{METADATA_SUFFIX}"


def new_run_id(run_datetime: str) -> str:
    """A name for one run, `YYYYMMDD_HHMMSS-` and six random hex digits: equal seconds give different names."""
    return f"{run_datetime}-{os.urandom(3).hex()}"


def write_json_atomic(path: Path, document: BaseModel | Mapping[str, object]) -> None:
    """Write `document` as JSON; a reader finds the old file or the new one, never a part.

    A number that is not finite is written as null: it could not be had, and JSON has no word for it.

    Raises:
        AccessError: The directory or file may not be written.
        RunError: The file system failed or is full.
    """
    if isinstance(document, BaseModel):
        # The same text, ten times as fast: results of many ranks are many buckets.
        write_text_atomic(path, document.model_dump_json(indent=2) + "\n")
        return
    write_text_atomic(path, json.dumps(_jsonable(document), indent=2, allow_nan=False) + "\n")


def write_jsonl_atomic(path: Path, records: Iterable[BaseModel | Mapping[str, object]]) -> None:
    """Write one JSON line a record, otherwise as `write_json_atomic` does."""
    lines = [_line(record) + "\n" for record in records]
    write_text_atomic(path, "".join(lines))


def _line(record: BaseModel | Mapping[str, object]) -> str:
    if isinstance(record, BaseModel):
        return record.model_dump_json()
    return json.dumps(_jsonable(record), separators=(",", ":"), allow_nan=False)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8; a reader finds the old file or the new one, never a part, a power cut included.

    Raises:
        AccessError: The directory or file may not be written.
        RunError: The file system failed or is full.
    """
    data = text.encode()
    # The name is short, so that it fits wherever the real one does, and no pattern of ours matches it.
    temporary = path.parent / f".tmp-{os.urandom(8).hex()}"
    try:
        try:
            # Not mkstemp: its mode 0600 would keep a team from reading each other's results.
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_directory(path.parent)
    except OSError as error:
        message = f"cannot write {path}: {_reason(error)}"
        raise _write_error(error)(message) from error


def _write_error(error: OSError) -> type[MLPStorageError]:
    return AccessError if error.errno in _NO_ACCESS else RunError


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable, where its file system can."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def _next_location(location: Path) -> Path:
    """The name after `location`: `X`, `X-2`, `X-3` ..."""
    base, dash, number = location.name.rpartition("-")
    if dash and number.isdecimal():
        return location.with_name(f"{base}-{int(number) + 1}")
    return location.with_name(f"{location.name}-2")


def _component(name: str) -> str:
    """`name` as one path component: no separator, nothing that a shell or `..` would read, of bounded length."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", str(name))[:_COMPONENT_MAX_CHARS]
    return re.sub(r"^\.+", lambda dots: "_" * len(dots.group()), safe) or "_"


def _jsonable(value: object) -> object:
    """`value` as json.dumps takes it."""
    if isinstance(value, BaseModel):
        return {name: _jsonable(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
