"""The `mooncake` format: one JSON object a line, as in Mooncake's trace release (FAST'25).

A line holds `timestamp` (ms), `input_length` and `output_length` (tokens) and `hash_ids`, one id for each 512 tokens
begun: the last block may be partial. An id stands for its block and all before it, within the whole file. Further keys
are ignored.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mlpstorage.kvcache.traces.fields import MAX_TIME_S, check_lengths, is_time, json_object, refuse, require_keys
from mlpstorage.kvcache.traces.files import lines
from mlpstorage.kvcache.traces.model import TraceRequest

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens of a block in traces of the `mooncake` format."""

KEYS = ("timestamp", "input_length", "output_length", "hash_ids")
"""Keys of every line."""

_MAX_TIMESTAMP_MS = MAX_TIME_S * 1000


def read_mooncake(path: Path, _warnings: Counter[str]) -> Iterator[TraceRequest]:
    """The requests of the trace, in the file's order.

    Raises:
        ConfigurationError: A line is broken; the message names it.
    """
    for session, (number, raw) in enumerate(lines(path)):
        place = f"line {number}"
        row = json_object(path, place, raw)
        require_keys(path, place, row, KEYS, "mooncake")
        timestamp = row["timestamp"]
        if not is_time(timestamp, _MAX_TIMESTAMP_MS):
            refuse(path, place, "timestamp must be a number of milliseconds, 0 or more")
        tokens_in, tokens_out, ids = check_lengths(path, place, row, MOONCAKE_BLOCK_TOKENS)
        yield TraceRequest(
            place=place,
            timestamp_s=timestamp / 1000,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            block_ids=tuple(ids),
            session=session,
            turn=0,
            after=(),
        )
