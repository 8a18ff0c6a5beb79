"""Which format a trace has, by its content; names of files say nothing."""

import json
import re
from pathlib import Path
from typing import NoReturn

from mlpstorage.config import TraceFormat
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.traces import bailian, conversation, mooncake, tables
from mlpstorage.kvcache.traces.files import head

_HEAD_BYTES = 1 << 20
"""Looked at: more than the longest line of a published trace."""

_KEYS = (
    # bailian before mooncake, whose keys it has too.
    (TraceFormat.AGENTIC, conversation.KEYS),
    (TraceFormat.BAILIAN, bailian.KEYS),
    (TraceFormat.MOONCAKE, mooncake.KEYS),
)
_COLUMNS = ((TraceFormat.BURSTGPT, tables.BURSTGPT.names), (TraceFormat.AZURE, tables.AZURE.names))
_KEY = re.compile(rb'"(\w+)"\s*:')


def detect_format(path: Path) -> TraceFormat:
    """The format of the file at `path`, from the keys or columns of its first line.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: It has no known format; the message says what was looked for.
    """
    start = head(path, _HEAD_BYTES)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        refuse_empty(path)
    first = text.split(b"\n", 1)[0]
    if text.startswith(b"{"):
        keys = _keys(first, text)
        for trace_format, wanted in _KEYS:
            if keys.issuperset(wanted):
                return trace_format
        if "requests" in keys:  # block_size may stand behind them
            return TraceFormat.AGENTIC
    else:
        columns = set(tables.header(first.strip()))
        for trace_format, names in _COLUMNS:
            if columns.issuperset(names):
                return trace_format
    return _refuse_unknown(path, start.count(b"\n", 0, len(start) - len(text)) + 1)


def refuse_empty(path: Path) -> NoReturn:
    """Refuse a trace without a request: it would make an empty, and so a perfect, run.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(f"{path}: the trace holds no request; give a file that has some")


def _keys(first: bytes, text: bytes) -> set[str]:
    """Keys of the first line's object; of all that is there where the object goes on behind the line or the head."""
    try:
        row: object = json.loads(first)
    except (ValueError, RecursionError):
        return {key.decode() for key in _KEY.findall(text if first.strip() == b"{" else first)}
    return set(row) if isinstance(row, dict) else set()


def _refuse_unknown(path: Path, number: int) -> NoReturn:
    looked_for = [f"{trace_format} (JSON with {', '.join(keys)})" for trace_format, keys in _KEYS]
    looked_for += [f"{trace_format} (a table with {', '.join(names)})" for trace_format, names in _COLUMNS]
    raise ConfigurationError(
        f"{path}, line {number}: not the beginning of a known trace; looked for {'; '.join(looked_for)}; "
        "give a trace of one of these formats"
    )
