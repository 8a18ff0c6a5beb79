"""The formats `burstgpt` and `azure`: tables of arrivals and lengths (CSV), without block ids and sessions.

Columns are found by the names in the first line; further ones are ignored.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from mlpstorage.kvcache.traces.fields import MAX_TIME_S, is_token_count, refuse
from mlpstorage.kvcache.traces.files import lines
from mlpstorage.kvcache.traces.model import TraceRequest

FAILED = "failed request (0 response tokens): left out"
"""A counted warning. The publisher's files without failures leave out the same rows; most have no prompt tokens."""

NO_PROMPT = "request without prompt tokens: left out"
"""A counted warning."""

_NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of the columns that count, in the first line of the file."""

    time: str
    tokens_in: str
    tokens_out: str

    @property
    def names(self) -> tuple[str, str, str]:
        """All of them."""
        return self.time, self.tokens_in, self.tokens_out


BURSTGPT: Final = Columns(time="Timestamp", tokens_in="Request tokens", tokens_out="Response tokens")
AZURE: Final = Columns(time="TIMESTAMP", tokens_in="ContextTokens", tokens_out="GeneratedTokens")


def read_burstgpt(path: Path, warnings: Counter[str]) -> Iterator[TraceRequest]:
    """The requests of a BurstGPT table (HPMLL/BurstGPT), in the file's order; failed ones are left out and counted.

    Raises:
        ConfigurationError: A line is broken; the message names it.
    """

    def seconds(place: str, text: str) -> float:
        if not _NUMBER.fullmatch(text) or float(text) > MAX_TIME_S:
            refuse(path, place, f"{BURSTGPT.time} must be a number of seconds, 0 or more")
        return float(text)

    return _requests(path, BURSTGPT, "burstgpt", seconds, warnings, leave_failed_out=True)


def read_azure(path: Path, warnings: Counter[str]) -> Iterator[TraceRequest]:
    """The requests of an Azure LLM inference table (Azure/AzurePublicDataset), in the file's order.

    Times without an offset are taken for UTC, and are exact to the microsecond.

    Raises:
        ConfigurationError: A line is broken; the message names it.
    """
    origin: datetime | None = None

    def seconds(place: str, text: str) -> float:
        nonlocal origin
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            refuse(path, place, f"{AZURE.time} must be a time such as 2023-11-16 18:17:03.9799600")
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        origin = origin or time
        return (time - origin).total_seconds()

    return _requests(path, AZURE, "azure", seconds, warnings, leave_failed_out=False)


def header(raw: bytes) -> list[str]:
    """Names of the columns in the first line of a table; empty where it is no text."""
    try:
        text = raw.decode("utf-8-sig")
        return [name.strip() for name in next(csv.reader((text,), strict=True), [])]
    except (UnicodeDecodeError, csv.Error):
        return []


def _requests(
    path: Path,
    columns: Columns,
    trace_format: str,
    seconds: Callable[[str, str], float],
    warnings: Counter[str],
    *,
    leave_failed_out: bool,
) -> Iterator[TraceRequest]:
    rows = lines(path)
    first = next(rows, None)
    if first is None:
        return
    names = header(first[1])
    missing = [name for name in columns.names if name not in names]
    if missing:
        what = f"the column {missing[0]!r} is missing"
        refuse(path, f"line {first[0]}", what, f"the {trace_format} format has {', '.join(columns.names)}")
    where = [names.index(name) for name in columns.names]
    session = 0
    for number, raw in rows:
        place = f"line {number}"
        time, text_in, text_out = _cells(path, place, raw, len(names), where)
        timestamp_s = seconds(place, time)
        tokens_in = _tokens(path, place, columns.tokens_in, text_in)
        tokens_out = _tokens(path, place, columns.tokens_out, text_out)
        if leave_failed_out and tokens_out == 0:
            warnings[FAILED] += 1
            continue
        if tokens_in == 0:
            warnings[NO_PROMPT] += 1
            continue
        yield TraceRequest(
            place=place,
            timestamp_s=timestamp_s,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            block_ids=None,
            session=session,
            turn=0,
            after=(),
        )
        session += 1


def _cells(path: Path, place: str, raw: bytes, width: int, where: list[int]) -> list[str]:
    """The cells at the places `where` of a row that must have `width` of them."""
    try:
        row = next(csv.reader((raw.decode(),), strict=True), [])
    except UnicodeDecodeError:
        refuse(path, place, "not UTF-8 text")
    except csv.Error as error:
        refuse(path, place, f"not CSV ({error})")
    if len(row) != width:
        refuse(path, place, f"{len(row)} cells, but the first line names {width} columns")
    return [row[column].strip() for column in where]


def _tokens(path: Path, place: str, name: str, text: str) -> int:
    tokens = int(text) if text.isascii() and text.isdigit() and len(text) <= 19 else None  # noqa: PLR2004 - 2^63
    if not is_token_count(tokens):
        refuse(path, place, f"{name} must be a whole number of tokens, 0 or more")
    return tokens
