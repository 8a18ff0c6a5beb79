"""Readers of request traces: a file, line by line, to checked records.

A trace is refused at its first broken line. Skipping lines would play a workload that nobody recorded, and the hit
ratios of a prefix cache hang on every request before.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeGuard

from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens of a block in traces of the `mooncake` format."""

_MAX_ID = (1 << 64) - 1
_MAX_TOKENS = (1 << 63) - 1
_MAX_TIMESTAMP_MS = 10**15
"""Far beyond any epoch in milliseconds, and small enough for sums of floats to stay exact to the microsecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord:
    """One line of a trace.

    Attributes:
        line: Its number in the file, from 1.
        timestamp_s: Its time, as the file tells it: seconds, from an origin of the file's own.
        input_tokens: Length of the prompt, 1 or more.
        output_tokens: Length of the answer.
        block_ids: Ids of the prompt's blocks in the trace's own block size; the last block may be a partial one.
    """

    line: int
    timestamp_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]


def read_mooncake(path: Path, max_requests: int | None = None) -> Iterator[TraceRecord]:
    """Read a trace of the `mooncake` format as a stream: one JSON object a line, in order of time.

    A line holds `timestamp` (ms), `input_length` and `output_length` (tokens) and `hash_ids`, one id for each 512
    tokens begun. Blank lines are skipped, further keys are ignored.

    Args:
        path: The trace.
        max_requests: Stop after so many records, and look at no line behind them; None for all.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: It is not a file, it holds no request, or a line is broken; the message names the line.
    """
    last_s = 0.0
    found = False
    for record in islice(_mooncake_records(path), max_requests):
        if record.timestamp_s < last_s:
            what = "its timestamp lies before that of the request above"
            _refuse(path, record.line, what, "sort the trace by timestamp")
        last_s = record.timestamp_s
        found = True
        yield record
    if not found:
        raise ConfigurationError(f"{path}: the trace holds no request; give a file with one JSON object a line")


def full_block_ids(record: TraceRecord, trace_block_tokens: int) -> tuple[int, ...]:
    """The ids of a record's full blocks: a partial last block is never stored, so it can never be found."""
    return record.block_ids[: record.input_tokens // trace_block_tokens]


def effective_block_tokens(trace_block_tokens: int, block_tokens: int) -> int:
    """Tokens of a block as the engine plays the trace: smaller blocks are grouped, equal and larger ones are kept.

    Raises:
        ConfigurationError: The trace's blocks are smaller, and `block_tokens` is not a multiple of them.
    """
    if trace_block_tokens >= block_tokens:
        return trace_block_tokens
    if block_tokens % trace_block_tokens:
        raise ConfigurationError(
            f"--block-tokens {block_tokens} is not a multiple of the trace's blocks of {trace_block_tokens} tokens; "
            f"give a multiple, or at most {trace_block_tokens} to keep the trace's own"
        )
    return block_tokens


def regroup(record_ids: tuple[int, ...], trace_block_tokens: int, block_tokens: int) -> tuple[int, ...]:
    """The full blocks of a prompt in blocks of `effective_block_tokens`.

    A group takes the id of its last block, which stands for the whole prefix up to there. An incomplete group is
    dropped.

    Raises:
        ConfigurationError: See `effective_block_tokens`.
    """
    size = effective_block_tokens(trace_block_tokens, block_tokens) // trace_block_tokens
    return record_ids[size - 1 :: size]


def _mooncake_records(path: Path) -> Iterator[TraceRecord]:
    for number, raw in _lines(path):
        row = _json_object(path, number, raw)
        try:
            timestamp, tokens_in, tokens_out, ids = (
                row["timestamp"],
                row["input_length"],
                row["output_length"],
                row["hash_ids"],
            )
        except KeyError as error:
            what = f"the key {error} is missing"
            _refuse(path, number, what, "a mooncake trace has timestamp, input_length, output_length, hash_ids")
        if not _is_timestamp(timestamp):
            _refuse(path, number, "timestamp must be a number of milliseconds, 0 or more")
        if not _is_token_count(tokens_in) or tokens_in == 0:
            _refuse(path, number, "input_length must be a whole number of tokens, 1 or more")
        if not _is_token_count(tokens_out):
            _refuse(path, number, "output_length must be a whole number of tokens, 0 or more")
        if not _is_id_list(ids):
            _refuse(path, number, "hash_ids must be a list of whole numbers from 0 to 2^64 - 1")
        blocks = -(-tokens_in // MOONCAKE_BLOCK_TOKENS)
        if len(ids) != blocks:
            what = f"input_length {tokens_in} makes {blocks} blocks of 512 tokens, but hash_ids has {len(ids)}"
            _refuse(path, number, what)
        yield TraceRecord(
            line=number,
            timestamp_s=timestamp / 1000,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            block_ids=tuple(ids),
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of the lines that are not blank."""
    try:
        # A pipe would be empty when the trace is read again: once for its digest, once to play it.
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"{path}: not a regular file; give the trace file itself")
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.isspace():
                    yield number, raw
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path}: there is no such trace; check the path") from error
    except PermissionError as error:
        raise AccessError(f"{path}: the trace may not be read; give yourself read permission") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: the trace cannot be read: {error.strerror}; copy it elsewhere") from error


def _json_object(path: Path, number: int, raw: bytes) -> dict[str, object]:
    try:
        row: object = json.loads(raw.decode())
    except UnicodeDecodeError:
        _refuse(path, number, "not UTF-8 text", "give an uncompressed file with one JSON object a line")
    except json.JSONDecodeError as error:
        _refuse(path, number, f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or brackets nested as deep: legal JSON, but no trace.
        _refuse(path, number, "not JSON of a trace (a number or a nesting without end)")
    if not isinstance(row, dict):
        _refuse(path, number, "not a JSON object")
    return row


def _is_timestamp(value: object) -> TypeGuard[int | float]:
    # `type`, not `isinstance`, here and below: a bool is an int to Python, but true is no number in JSON.
    # A NaN fails both comparisons.
    return (type(value) is int or type(value) is float) and 0 <= value <= _MAX_TIMESTAMP_MS


def _is_token_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_TOKENS


def _is_id_list(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    if not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= _MAX_ID)


def _refuse(path: Path, line: int, what: str, remedy: str = "correct or remove the line") -> NoReturn:
    raise ConfigurationError(f"{path}, line {line}: {what}; {remedy}")
