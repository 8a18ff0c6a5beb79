"""One conversation of the `agentic` format: read, its waits worked out, and kept small.

A document holds `block_size`, `requests` and, where ids are not "local", a `hash_id_scope`. A request holds `t`
(seconds since the conversation's start), `in` and `out` (tokens), `hash_ids` (one id for each full block) and, not
always, `api_time` and `think_time` (seconds). An entry of type "subagent" holds `requests` of its own, whose `t` counts
from the marker's. Further keys are ignored.

Consecutive requests share long prefixes, so that only what follows the shared part is kept.
"""

import hashlib
import json
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from xxhash import xxh3_64_intdigest

from mlpstorage.kvcache.traces.fields import is_id_list, is_time, is_token_count, refuse
from mlpstorage.kvcache.traces.files import content
from mlpstorage.kvcache.traces.model import After, TraceRequest

KEYS = ("block_size", "requests")
"""Keys of every document."""

THINK_TIME_MISSING = "think time is not recorded, nor how long the answer before took: distance of timestamps taken"
"""A counted warning: the pause then contains the time of the recorded answer."""

THINK_TIME_TOO_LONG = "think time is longer than the distance of timestamps: distance taken"
"""A counted warning: the recorder measured from an earlier answer."""

EARLY_SUBAGENT = "sub-agent begins before the request that started it: begun together with it"
"""A counted warning."""

_REQUEST_KEYS = ("t", "type", "in", "out", "hash_ids")
_SUBAGENT_KEYS = ("t", "type", "requests")
_SUBAGENT = "subagent"
_ROUNDING_S = 0.001


@dataclass(frozen=True, slots=True)
class _Kept:
    """A request without the ids that it shares with the one before it in its chain.

    A chain is a list of requests: the conversation's own, or that of a sub-agent.
    """

    place: str
    timestamp_s: float
    input_tokens: int
    output_tokens: int
    chain: int
    shared: int
    suffix: "array[int]"
    after: tuple[After, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A session of a parent and its sub-agents.

    Attributes:
        block_tokens: Tokens of a block.
    """

    block_tokens: int
    _kept: tuple[_Kept, ...]

    def requests(self, session: int) -> Iterator[TraceRequest]:
        """The requests in order of time, as those of session number `session`."""
        chains: dict[int, list[int]] = {}
        for turn, kept in enumerate(self._kept):
            ids = chains.setdefault(kept.chain, [])
            ids[kept.shared :] = kept.suffix
            yield TraceRequest(
                place=kept.place,
                timestamp_s=kept.timestamp_s,
                input_tokens=kept.input_tokens,
                output_tokens=kept.output_tokens,
                block_ids=tuple(ids),
                session=session,
                turn=turn,
                after=kept.after,
            )


def block_size_of(path: Path) -> int:
    """Tokens of a block in the conversation at `path`.

    Raises:
        ConfigurationError: The file holds no conversation.
    """
    return _block_size(path, _document(path))


def read_conversation(path: Path, place: str, warnings: Counter[str]) -> Conversation:
    """Read the conversation at `path`.

    Args:
        path: The file.
        place: What stands before "request 7" in the requests' places.
        warnings: Counts what was amended.

    Raises:
        ConfigurationError: The file holds no conversation, or a request is broken; the message names it.
    """
    document = _document(path)
    walk = _Walk(path, place, _block_size(path, document), _id_key(path, document), warnings)
    walk.chain(_entries(path, "line 1", document), 0.0, "", None)
    if not walk.drafts:
        refuse(path, "line 1", "the conversation holds no request", "remove the file")
    return Conversation(walk.block_tokens, walk.kept())


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that others may wait for: its number in the walk, its time, and how long its answer took if known."""

    number: int
    time_s: float
    api_s: float | None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A request as the walk meets it; `waits` names others by their number in the walk."""

    kept: _Kept
    waits: tuple[tuple[int, float], ...]


class _Walk:
    """Goes through a conversation in the document's order and collects its requests."""

    def __init__(self, path: Path, place: str, block_tokens: int, id_key: int, warnings: Counter[str]) -> None:
        self.block_tokens = block_tokens
        self.drafts: list[_Draft] = []
        self._path = path
        self._place = place
        self._id_key = id_key
        self._warnings = warnings
        self._chains = 0

    def chain(self, entries: list[object], start_s: float, prefix: str, starter: _Asked | None) -> list[int]:
        """Collect a list of requests; returns the numbers of those with whose answers it is over.

        Args:
            entries: The list.
            start_s: What its times count from.
            prefix: What stands before a request's own number: "7." in the list of entry 7.
            starter: The request that started it; None for the conversation itself.
        """
        chain = self._chains
        self._chains += 1
        ids: list[int] = []
        last: _Asked | None = None
        running: list[int] = []  # last requests of sub-agents that no later request of this list waits for yet
        for number, entry in enumerate(entries, start=1):
            place = f"request {prefix}{number}"
            row = self._row(place, entry)
            time_s = start_s + self._time_s(place, row)
            if row["type"] == _SUBAGENT:
                begun_s = self._begun_s(time_s, last)
                running += self.chain(_entries(self._path, place, row), begun_s, f"{prefix}{number}.", last or starter)
                continue
            if last is not None and time_s < last.time_s:
                refuse(self._path, place, "its t lies before that of the request above", "sort the requests by t")
            # A sub-agent that the recording shows still at work was not waited for: it ran in the background.
            ended = [one for one in running if self.drafts[one].kept.timestamp_s <= time_s]
            running = [one for one in running if one not in ended]
            waits = [*self._pause(row, place, time_s, last, starter), *((one, 0.0) for one in ended)]
            before, ids = ids, self._ids(place, row)
            self._add(place, row, time_s, chain, before, ids, waits)
            last = _Asked(len(self.drafts) - 1, time_s, self._seconds(place, row, "api_time"))
        return running if last is None else [last.number, *running]

    def kept(self) -> tuple[_Kept, ...]:
        """The collected requests in order of time; those of one moment in the document's order."""
        order = sorted(range(len(self.drafts)), key=lambda number: self.drafts[number].kept.timestamp_s)
        turn_of = {number: turn for turn, number in enumerate(order)}
        return tuple(
            replace(draft.kept, after=tuple(After(turn=turn_of[one], pause_s=pause_s) for one, pause_s in draft.waits))
            for draft in (self.drafts[number] for number in order)
        )

    def _row(self, place: str, entry: object) -> dict[str, object]:
        if not isinstance(entry, dict):
            refuse(self._path, place, "not a JSON object")
        keys = _SUBAGENT_KEYS if entry.get("type") == _SUBAGENT else _REQUEST_KEYS
        for key in keys:
            if key not in entry:
                refuse(self._path, place, f"the key {key!r} is missing", f"it has {', '.join(keys)}")
        if not isinstance(entry["type"], str):
            refuse(self._path, place, "type must be a text")
        return entry

    def _time_s(self, place: str, row: dict[str, object]) -> float:
        time = row["t"]
        if not is_time(time):
            refuse(self._path, place, "t must be a number of seconds, 0 or more")
        return time

    def _seconds(self, place: str, row: dict[str, object], key: str) -> float | None:
        value = row.get(key)
        if value is not None and not is_time(value):
            refuse(self._path, place, f"{key} must be a number of seconds, 0 or more")
        return value

    def _ids(self, place: str, row: dict[str, object]) -> list[int]:
        tokens, ids = row["in"], row["hash_ids"]
        if not is_token_count(tokens) or tokens == 0:
            refuse(self._path, place, "in must be a whole number of tokens, 1 or more")
        if not is_id_list(ids):
            refuse(self._path, place, "hash_ids must be a list of whole numbers from 0 to 2^64 - 1")
        blocks = tokens // self.block_tokens
        if len(ids) != blocks:
            what = f"in {tokens} makes {blocks} full blocks of {self.block_tokens} tokens, but hash_ids has {len(ids)}"
            refuse(self._path, place, what)
        return ids

    def _begun_s(self, time_s: float, last: _Asked | None) -> float:
        if last is None or time_s >= last.time_s:
            return time_s
        self._warnings[EARLY_SUBAGENT] += 1
        return last.time_s

    def _pause(
        self, row: dict[str, object], place: str, time_s: float, last: _Asked | None, starter: _Asked | None
    ) -> list[tuple[int, float]]:
        """The request that this one follows, and the pause after its answer; nothing for the very first."""
        think_s = self._seconds(place, row, "think_time")
        if last is None:
            if starter is None:
                return []
            # What a sub-agent's first request tells is no pause after the request that started it.
            last, think_s = starter, None
        distance_s = time_s - last.time_s
        if think_s is None:
            if last.api_s is None:
                self._warnings[THINK_TIME_MISSING] += 1
                return [(last.number, distance_s)]
            return [(last.number, max(0.0, distance_s - last.api_s))]
        if think_s > distance_s + _ROUNDING_S:
            self._warnings[THINK_TIME_TOO_LONG] += 1
        return [(last.number, min(think_s, distance_s))]

    def _add(
        self,
        place: str,
        row: dict[str, object],
        time_s: float,
        chain: int,
        before: list[int],
        ids: list[int],
        waits: list[tuple[int, float]],
    ) -> None:
        tokens_in, tokens_out = row["in"], row["out"]
        if not is_token_count(tokens_out):
            refuse(self._path, place, "out must be a whole number of tokens, 0 or more")
        assert is_token_count(tokens_in), "checked with the ids"
        shared = _common_prefix(before, ids)
        suffix = array("Q", (self._global_id(block_id) for block_id in ids[shared:]))
        kept = _Kept(self._place + place, time_s, tokens_in, tokens_out, chain, shared, suffix, ())
        self.drafts.append(_Draft(kept, tuple(waits)))

    def _global_id(self, block_id: int) -> int:
        """An id that no other conversation has: a 64-bit hash of the conversation and the id."""
        return xxh3_64_intdigest(block_id.to_bytes(8, "little"), self._id_key)


def _document(path: Path) -> dict[str, object]:
    try:
        document: object = json.loads(content(path).decode("utf-8-sig"))
    except UnicodeDecodeError:
        refuse(path, "line 1", "not UTF-8 text", "give a file that is one JSON document")
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at column {error.colno})"
        refuse(path, f"line {error.lineno}", what, "an agentic trace is one JSON document a file")
    except (ValueError, RecursionError):
        refuse(path, "line 1", "not JSON of a trace (a number or a nesting without end)", "remove the file")
    if not isinstance(document, dict):
        refuse(path, "line 1", "not a JSON object", "an agentic trace is one JSON object a file")
    for key in KEYS:
        if key not in document:
            refuse(path, "line 1", f"the key {key!r} is missing", f"the agentic format has {', '.join(KEYS)}")
    return document


def _block_size(path: Path, document: dict[str, object]) -> int:
    size = document["block_size"]
    if not is_token_count(size) or size == 0:
        refuse(path, "line 1", "block_size must be a whole number of tokens, 1 or more", "correct it")
    return size


def _entries(path: Path, place: str, row: dict[str, object]) -> list[object]:
    entries = row["requests"]
    if not isinstance(entries, list):
        refuse(path, place, "requests must be a list")
    return entries


def _id_key(path: Path, document: dict[str, object]) -> int:
    """What tells a conversation's ids from those of others; the same for a copy in another directory, packed or not."""
    scope = document.get("hash_id_scope", "local")
    if scope == "global":
        name = ""
    elif scope == "local":
        name = f"{path.name.removesuffix('.gz').removesuffix('.zst')}\0{document.get('id')}"
    else:
        refuse(path, "line 1", "hash_id_scope must be local or global", "correct it")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _common_prefix(one: list[int], two: list[int]) -> int:
    """Length of what both begin with. Slices are compared at once, which is far faster than id by id."""
    most = min(len(one), len(two))
    if one[:most] == two[:most]:
        return most
    return bisect_left(range(1, most + 1), x=True, key=lambda length: one[:length] != two[:length])
