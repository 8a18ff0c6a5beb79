"""The `bailian` format: one JSON object a line, as in alibaba-edu/qwen-bailian-usagetraces-anon (KVCache, ATC'25).

A line holds `chat_id`, `parent_chat_id` (-1 for none), `timestamp` (seconds), `input_length` and `output_length`
(tokens, of the full context) and `hash_ids`, one id for each 16 tokens begun: the publisher pads the last block.
Further keys are ignored.

An id is a hash of its block alone: the same text at another place has the same id. So ids are chained here: that of a
block becomes a 64-bit hash of itself and of all before it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from xxhash import xxh3_64_intdigest

from mlpstorage.kvcache.traces.fields import check_lengths, is_time, json_object, refuse, require_keys
from mlpstorage.kvcache.traces.files import lines
from mlpstorage.kvcache.traces.model import TraceRequest

BAILIAN_BLOCK_TOKENS = 16
"""Tokens of a block in traces of the `bailian` format."""

KEYS = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")
"""Keys of every line."""

ORPHAN = "parent chat is not in the trace: the request begins a session of its own"
"""A counted warning: the published traces are windows cut out of longer ones."""

_NO_PARENT = -1


def read_bailian(path: Path, warnings: Counter[str]) -> Iterator[TraceRequest]:
    """The requests of the trace, in the file's order. Keeps 100 to 200 bytes of memory for each chat.

    Raises:
        ConfigurationError: A line is broken; the message names it.
    """
    session_of: dict[int, int] = {}
    turns: list[int] = []
    for number, raw in lines(path):
        place = f"line {number}"
        row = json_object(path, place, raw)
        require_keys(path, place, row, KEYS, "bailian")
        chat, parent, timestamp = row["chat_id"], row["parent_chat_id"], row["timestamp"]
        if type(chat) is not int or type(parent) is not int:
            refuse(path, place, "chat_id and parent_chat_id must be whole numbers")
        if chat in session_of:
            refuse(path, place, f"chat_id {chat} was used above; every request has one of its own")
        if not is_time(timestamp):
            refuse(path, place, "timestamp must be a number of seconds, 0 or more")
        tokens_in, tokens_out, ids = check_lengths(path, place, row, BAILIAN_BLOCK_TOKENS)
        session = session_of.get(parent)
        if session is None:
            if parent != _NO_PARENT:
                warnings[ORPHAN] += 1
            session = len(turns)
            turns.append(0)
        session_of[chat] = session
        yield TraceRequest(
            place=place,
            timestamp_s=float(timestamp),
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            block_ids=tuple(chained(ids)),
            session=session,
            turn=turns[session],
            after=(),
        )
        turns[session] += 1


def chained(ids: Iterable[int]) -> Iterator[int]:
    """For each id of a block alone, the id of the block and all before it: a hash of the last one and it."""
    before = 0
    for block_id in ids:
        before = xxh3_64_intdigest(block_id.to_bytes(8, "little"), before)
        yield before
