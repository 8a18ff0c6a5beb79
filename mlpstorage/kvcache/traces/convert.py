"""Traces rewritten in the `mooncake` format, in blocks of 512 tokens."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mlpstorage.config import TraceFormat
from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, RunError
from mlpstorage.kvcache.traces.blocks import full_block_ids, regroup
from mlpstorage.kvcache.traces.files import zstd
from mlpstorage.kvcache.traces.model import TraceRequest
from mlpstorage.kvcache.traces.mooncake import MOONCAKE_BLOCK_TOKENS
from mlpstorage.kvcache.traces.trace import Trace, open_trace

if TYPE_CHECKING:
    from gzip import GzipFile

_GZIP_LEVEL = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written.

    Attributes:
        out: The file.
        source_format: How the trace was written before.
        requests: Number of requests.
        blocks: Ids of all requests.
        unique_blocks: Different ids among them.
        lost: What the trace had and the `mooncake` format has no room for.
        warnings: What was amended or left out on reading, and how often.
    """

    out: Path
    source_format: TraceFormat
    requests: int
    blocks: int
    unique_blocks: int
    lost: tuple[str, ...]
    warnings: Mapping[str, int]

    def as_dict(self) -> dict[str, object]:
        """The facts as plain JSON values, under their attribute names."""
        return asdict(self) | {"out": str(self.out), "source_format": self.source_format.value}


def convert_trace(path: Path, out: Path, trace_format: TraceFormat | None = None, *, force: bool = False) -> Converted:
    """Write the trace at `path` as a `mooncake` trace to `out`, packed if it ends in .gz or .zst.

    Read again, it has the same prefixes in full blocks of 512 tokens as the trace regrouped to 512. Sessions and think
    times are lost. The file appears under its name when it is complete.

    Args:
        path: The trace.
        out: The new file.
        trace_format: How the trace is written; None to find out.
        force: Replace an `out` that exists.

    Raises:
        MissingFileError: There is no such trace, or no directory for `out`.
        AccessError: The trace may not be read, or `out` not be written.
        ConfigurationError: The trace is broken or has no blocks that make up 512 tokens, or `out` exists.
        RunError: The file system failed or is full.
    """
    trace = open_trace(path, trace_format)
    ids = _Ids(trace)
    warnings: Counter[str] = Counter()
    requests = blocks = 0
    with _written(out, force=force) as file:
        for request in trace.requests(warnings=warnings):
            row_ids = ids.of(request)
            requests += 1
            blocks += len(row_ids)
            row = {
                "timestamp": _milliseconds(request.timestamp_s),
                "input_length": request.input_tokens,
                "output_length": request.output_tokens,
                "hash_ids": row_ids,
            }
            file.write(json.dumps(row).encode() + b"\n")
    lost = [name for name, had in (("sessions", trace.has_sessions), ("think times", trace.has_think_times)) if had]
    return Converted(
        out=out,
        source_format=trace.format,
        requests=requests,
        blocks=blocks,
        unique_blocks=ids.count,
        lost=tuple(lost),
        warnings=dict(warnings),
    )


class _Ids:
    """Gives every block of 512 tokens a number, counting up in order of appearance.

    A full block is known by the id of its last part, which stands for all before it. The partial one at a prompt's end
    is another block than the full one that would continue it. It is the same in two prompts only where both are known
    to be equal to their ends: where the trace's ids reach the end, and both have the same last id and length. Else some
    tokens have no id, and the block is nobody else's.
    """

    def __init__(self, trace: Trace) -> None:
        if trace.block_tokens is None:
            raise ConfigurationError(
                f"{trace.path}: the {trace.format} format has no block ids, which are what mooncake is about; "
                "play or inspect the trace as it is"
            )
        if MOONCAKE_BLOCK_TOKENS % trace.block_tokens:
            raise ConfigurationError(
                f"{trace.path}: its blocks of {trace.block_tokens} tokens do not make up mooncake's of "
                f"{MOONCAKE_BLOCK_TOKENS}; play or inspect the trace as it is"
            )
        self.count = 0
        self._trace = trace
        self._block_tokens = trace.block_tokens
        self._numbers: dict[int | tuple[int, int], int] = {}  # full blocks by id, partial ones by last id and length

    def of(self, request: TraceRequest) -> list[int]:
        """The numbers of a request's blocks."""
        full = regroup(full_block_ids(request, self._trace), self._block_tokens, MOONCAKE_BLOCK_TOKENS)
        numbers = [self._number(block_id) for block_id in full]
        if request.input_tokens % MOONCAKE_BLOCK_TOKENS:
            numbers.append(self._partial_number(request))
        return numbers

    def _partial_number(self, request: TraceRequest) -> int:
        ids = request.block_ids or ()
        if len(ids) * self._block_tokens < request.input_tokens:
            self.count += 1
            return self.count - 1
        return self._number((ids[-1], request.input_tokens))

    def _number(self, key: int | tuple[int, int]) -> int:
        number = self._numbers.setdefault(key, self.count)
        if number == self.count:
            self.count += 1
        return number


@contextmanager
def _written(out: Path, *, force: bool) -> "Iterator[IO[bytes] | GzipFile]":
    """A stream whose content appears as `out` at the end, or never: an error leaves nothing behind."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.exists() and not force:
            raise ConfigurationError(f"{out} exists; name another file, or replace it with --force")
        with temporary.open("xb") as raw:
            with _packed(raw, out) as file:
                yield file
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(out)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{out}: there is no such directory; make it first") from error
    except PermissionError as error:
        raise AccessError(f"{out}: may not be written; give yourself write permission") from error
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror}; make room, or name another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _packed(raw: IO[bytes], out: Path) -> "Iterator[IO[bytes] | GzipFile]":
    if out.suffix == ".gz":
        import gzip  # noqa: PLC0415 - only for files that need it

        # Neither name nor time goes into it: equal traces make equal files.
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as file:
            yield file
    elif out.suffix == ".zst":
        with zstd(out).ZstdCompressor().stream_writer(raw, closefd=False) as file:
            yield file
    else:
        yield raw


def _milliseconds(seconds: float) -> int | float:
    """To the microsecond, and without a point where it is whole."""
    value = round(seconds * 1000, 3)
    return int(value) if value.is_integer() else value
