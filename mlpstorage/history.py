"""What ran: a view over the metadata files below a results directory. It keeps no file of its own.

Runs of every benchmark are read alike, those of other programs included: six keys make a run (`benchmark_type, model,
command, run_datetime, result_dir, status`), and what else our own runs write is used where it is there.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.cluster.process import process_alive
from mlpstorage.config import RunStatus
from mlpstorage.errors import ConfigurationError, MissingFileError, UsageError
from mlpstorage.results.directory import CACHE_DIR, LOGS_DIR, METADATA_SUFFIX, RANKS_DIR

_PRUNED_DIRS = frozenset({CACHE_DIR, RANKS_DIR, LOGS_DIR})
"""Directories of a run that hold no metadata, and in the case of the cache perhaps millions of files."""

_METADATA_MAX_BYTES = 64 << 20
"""More than any run writes by far; reading such a file whole would only cost memory."""

_CANDIDATES_SHOWN = 10

UNKNOWN_STATUS = "unknown"
"""Status of a run whose program did not record one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """One run, or one invocation that failed before it had a result directory.

    Attributes:
        run_id: Its name; where the metadata has none, one made from what the metadata says, the same every time.
        run_datetime: `YYYYMMDD_HHMMSS`, as the metadata has it.
        benchmark_type: `kv_cache`, `training`, `checkpointing`, or what another program wrote.
        model: The model that was played.
        command: The benchmark's command.
        ranks: Number of processes; 1 where the metadata does not say.
        hosts: Where it ran; empty where the metadata does not say (this machine).
        status: `running`, `complete`, `failed`, `interrupted`, or `unknown`. A run that says it is running while its
            process is gone is `interrupted`.
        exit_code: What its process ended with; None while it runs, or where its process was killed.
        runtime_s: How long it took, in seconds.
        headline: Its main numbers in a few words.
        result_dir: Where its results lie; None where it failed before it had a directory.
        labels: What the user attached to it.
        metadata_path: The file that all this was read from.
        metadata: That file's content.
    """

    run_id: str
    run_datetime: str
    benchmark_type: str
    model: str | None
    command: str
    ranks: int
    hosts: tuple[str, ...]
    status: str
    exit_code: int | None
    runtime_s: float | None
    headline: str | None
    result_dir: str | None
    labels: Mapping[str, str]
    metadata_path: Path
    metadata: Mapping[str, object]


class _DamagedError(Exception):
    """A metadata file tells of no run; the message says why."""


def list_runs(
    results_dir: Path,
    *,
    warn: Callable[[str], None],
    benchmark: str | None = None,
    model: str | None = None,
    status: str | None = None,
    limit: int | None = None,
) -> list[RunEntry]:
    """Runs below `results_dir`, the newest first.

    Args:
        results_dir: The results directory. One that is not there has no runs, which costs a warning.
        warn: Takes one line for each file or directory that could not be read; the list goes on without it.
        benchmark: Only runs of this benchmark type.
        model: Only runs of this model.
        status: Only runs that are shown with this status.
        limit: At most so many, the newest.
    """
    if not results_dir.is_dir():
        warn(f"{results_dir}: no such directory, so it has no runs; another can be named with --results-dir")
        return []
    entries = []
    for path in _metadata_files(results_dir, warn):
        try:
            entries.append(_read_entry(path))
        except (OSError, _DamagedError) as error:
            warn(f"{path}: skipped: {_why(error)}")
    wanted = [
        entry
        for entry in entries
        if benchmark in (None, entry.benchmark_type) and model in (None, entry.model) and status in (None, entry.status)
    ]
    wanted.sort(key=_age_key, reverse=True)
    return wanted[:limit]


def find_run(results_dir: Path, id_or_prefix: str) -> RunEntry:
    """The run with this id, or the only one whose id begins so. A run's result directory names it as well.

    Raises:
        MissingFileError: There is none.
        UsageError: There are several; the message lists them.
    """
    skipped: list[str] = []
    entries = list_runs(results_dir, warn=skipped.append)
    place = str(Path(id_or_prefix).absolute())
    found = [entry for entry in entries if id_or_prefix == entry.run_id or place == entry.result_dir] or [
        entry for entry in entries if entry.run_id.startswith(id_or_prefix)
    ]
    if not found:
        unread = f"; {len(skipped)} could not be read, the first: {skipped[0]}" if skipped else ""
        raise MissingFileError(
            f"no run {id_or_prefix!r} below {results_dir}{unread}; `mlpstorage history list` shows what is there"
        )
    # An empty id is a script's unset variable: it would be the prefix of whatever single run there is.
    if len(found) > 1 or not id_or_prefix:
        shown = [f"{entry.run_id} ({entry.result_dir or entry.metadata_path})" for entry in found[:_CANDIDATES_SHOWN]]
        more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        raise UsageError(f"ID {id_or_prefix!r} fits {len(found)} runs: {', '.join(shown)}{more}; give one of them")
    return found[0]


def rerun_argv(entry: RunEntry) -> list[str]:
    """The arguments of the run, each exactly as it was, without the program's name.

    Raises:
        ConfigurationError: Its metadata does not hold them.
    """
    args = entry.metadata.get("args")
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise ConfigurationError(
            f"{entry.metadata_path}: the arguments of run {entry.run_id} are not recorded, so it cannot be run again"
        )
    return list(args)


def rerun_cwd(entry: RunEntry) -> Path | None:
    """The directory in which the run's arguments have their meaning; None where its metadata does not say.

    Raises:
        MissingFileError: That directory is no longer there.
    """
    cwd = _text(entry.metadata, "cwd")
    if cwd is None:
        return None
    if not Path(cwd).is_dir():
        raise MissingFileError(f"run {entry.run_id} was started in {cwd}, which is no longer there; create it first")
    return Path(cwd)


def _metadata_files(results_dir: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        warn(f"{error.filename}: skipped: {_why(error)}")

    for directory, names, files in os.walk(results_dir, onerror=unreadable):
        names[:] = sorted(set(names) - _PRUNED_DIRS)
        for name in sorted(files):
            path = Path(directory, name)
            # A link to a metadata file ("latest") would show its run twice.
            if name.endswith(METADATA_SUFFIX) and not path.is_symlink():
                yield path


def _read_entry(path: Path) -> RunEntry:
    metadata = _load(path)
    benchmark_type = _required(metadata, "benchmark_type")
    command = _required(metadata, "command")
    run_datetime = _required(metadata, "run_datetime")
    model = _text(metadata, "model")
    has_result_dir = "result_dir" in metadata
    return RunEntry(
        run_id=_text(metadata, "run_id") or _derived_id(path, (benchmark_type, model or "", command, run_datetime)),
        run_datetime=run_datetime,
        benchmark_type=benchmark_type,
        model=model,
        command=command,
        ranks=_whole(metadata, "ranks") or _whole(metadata, "num_processes") or 1,
        hosts=_hosts(metadata),
        status=_status(metadata),
        exit_code=_whole(metadata, "exit_code"),
        runtime_s=_number(metadata, "runtime_s"),
        headline=_text(metadata, "headline"),
        result_dir=_text(metadata, "result_dir") if has_result_dir else str(path.parent),
        labels=_labels(metadata),
        metadata_path=path,
        metadata=metadata,
    )


def _load(path: Path) -> dict[str, object]:
    """The JSON object in `path`; its NaN and Infinity, which other programs write, become None.

    Raises:
        OSError: It cannot be read.
        _DamagedError: It holds no JSON object.
    """
    facts = path.lstat()
    # Opening a named pipe would wait for a writer.
    if not stat.S_ISREG(facts.st_mode):
        raise _DamagedError("not a regular file")
    if facts.st_size > _METADATA_MAX_BYTES:
        raise _DamagedError(f"{facts.st_size} bytes are too many for the metadata of a run")
    try:
        document: object = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"not JSON, or only a part of it: {error}") from error
    if not isinstance(document, dict):
        raise _DamagedError("not a JSON object")
    return document


def _why(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


def _required(metadata: Mapping[str, object], key: str) -> str:
    text = _text(metadata, key)
    if text is None:
        raise _DamagedError(f"not the metadata of a run: {key} is missing or no text")
    return text


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None


def _whole(metadata: Mapping[str, object], key: str) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(metadata: Mapping[str, object], key: str) -> float | None:
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    # 1e999 is valid JSON, and infinite in Python.
    return number if math.isfinite(number) else None


def _hosts(metadata: Mapping[str, object]) -> tuple[str, ...]:
    hosts = metadata.get("hosts")
    if isinstance(hosts, str):
        return tuple(hosts.replace(",", " ").split())
    return tuple(str(host) for host in hosts) if isinstance(hosts, list) else ()


def _labels(metadata: Mapping[str, object]) -> dict[str, str]:
    labels = metadata.get("labels")
    return {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}


def _status(metadata: Mapping[str, object]) -> str:
    status = _text(metadata, "status") or UNKNOWN_STATUS
    process = metadata.get("process")
    if status == RunStatus.RUNNING and isinstance(process, dict) and process_alive(process) is False:
        return RunStatus.INTERRUPTED.value
    return status


def _derived_id(path: Path, identity: tuple[str, ...]) -> str:
    """An id for a run that has none, in the form of ours: its directory's name and a digest of what it was.

    Not the place of the file: the id stays the same where the results are moved or listed from a parent directory.
    """
    directory = path.parent.name
    digest = hashlib.sha256("\n".join((directory, path.name, *identity)).encode(errors="surrogatepass")).hexdigest()
    return f"{directory}-{digest[:6]}"


def _age_key(entry: RunEntry) -> tuple[str, str]:
    """Sorts by time, whatever punctuation a program put into it; then by place, so that the order never changes."""
    digits = "".join(char for char in entry.run_datetime if char.isdecimal())
    return digits[:14].ljust(14, "0"), str(entry.metadata_path)
