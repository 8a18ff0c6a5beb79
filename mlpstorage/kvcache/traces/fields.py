"""Checks of a trace's fields, and the refusal that names file, place and remedy."""

import json
from pathlib import Path
from typing import NoReturn, TypeGuard

from mlpstorage.errors import ConfigurationError

MAX_TIME_S = 10.0**12
"""Far beyond any epoch in seconds, and small enough for sums of floats to stay exact to the millisecond."""

_MAX_ID = (1 << 64) - 1
_MAX_TOKENS = (1 << 63) - 1


def refuse(path: Path, place: str, what: str, remedy: str | None = None) -> NoReturn:
    """Refuse the trace for what stands at `place`: "line 3", "request 7"."""
    remedy = remedy or f"correct or remove the {place.split(maxsplit=1)[0]}"
    raise ConfigurationError(f"{path}, {place}: {what}; {remedy}")


def json_object(path: Path, place: str, raw: bytes) -> dict[str, object]:
    """The JSON object of one line.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        row: object = json.loads(raw.decode("utf-8-sig" if place == "line 1" else "utf-8"))
    except UnicodeDecodeError:
        refuse(path, place, "not UTF-8 text", "give a file with one JSON object a line")
    except json.JSONDecodeError as error:
        refuse(path, place, f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or brackets nested as deep: legal JSON, but no trace.
        refuse(path, place, "not JSON of a trace (a number or a nesting without end)")
    if not isinstance(row, dict):
        refuse(path, place, "not a JSON object")
    return row


def is_time(value: object, most: float = MAX_TIME_S) -> TypeGuard[int | float]:
    """Whether it is a number from 0 to `most`."""
    # `type`, not `isinstance`, here and below: a bool is an int to Python, but true is no number in JSON.
    # A NaN fails both comparisons.
    return (type(value) is int or type(value) is float) and 0 <= value <= most


def is_token_count(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, 0 or more."""
    return type(value) is int and 0 <= value <= _MAX_TOKENS


def is_id_list(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of unsigned 64-bit numbers."""
    if not isinstance(value, list):
        return False
    if not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= _MAX_ID)


def check_lengths(path: Path, place: str, row: dict[str, object], blocks_of: int) -> tuple[int, int, list[int]]:
    """`input_length`, `output_length` and `hash_ids` of a row, one id for each `blocks_of` tokens begun.

    Raises:
        ConfigurationError: One is missing, of a wrong type or out of range, or the ids do not match the length.
    """
    tokens_in, tokens_out, ids = row["input_length"], row["output_length"], row["hash_ids"]
    if not is_token_count(tokens_in) or tokens_in == 0:
        refuse(path, place, "input_length must be a whole number of tokens, 1 or more")
    if not is_token_count(tokens_out):
        refuse(path, place, "output_length must be a whole number of tokens, 0 or more")
    if not is_id_list(ids):
        refuse(path, place, "hash_ids must be a list of whole numbers from 0 to 2^64 - 1")
    blocks = -(-tokens_in // blocks_of)
    if len(ids) != blocks:
        what = f"input_length {tokens_in} makes {blocks} blocks of {blocks_of} tokens, but hash_ids has {len(ids)}"
        refuse(path, place, what)
    return tokens_in, tokens_out, ids


def require_keys(path: Path, place: str, row: dict[str, object], keys: tuple[str, ...], trace_format: str) -> None:
    """Refuse a row that lacks one of `keys`.

    Raises:
        ConfigurationError: It does.
    """
    for key in keys:
        if key not in row:
            refuse(path, place, f"the key {key!r} is missing", f"the {trace_format} format has {', '.join(keys)}")
