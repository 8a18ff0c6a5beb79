"""The `agentic` format: conversations of coding agents, one JSON document each, as kv-cache-tester publishes them.

A trace is one file or a directory of them. All conversations begin together.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mlpstorage.errors import AccessError, ConfigurationError
from mlpstorage.kvcache.traces.conversation import Conversation, read_conversation
from mlpstorage.kvcache.traces.files import is_directory
from mlpstorage.kvcache.traces.model import TraceRequest

_PACKINGS = ("", ".gz", ".zst")


def conversation_files(path: Path) -> list[Path]:
    """The files of a trace: `path` itself, or the files *.json, *.json.gz and *.json.zst in it, by name.

    Raises:
        AccessError: The directory may not be read.
        ConfigurationError: It holds no such file, or one both packed and unpacked.
    """
    if not is_directory(path):
        return [path]
    try:
        files = sorted(file for file in path.iterdir() if file.name.endswith(tuple(f".json{end}" for end in _PACKINGS)))
    except PermissionError as error:
        raise AccessError(f"{path}: the directory may not be read; give yourself read permission") from error
    if not files:
        raise ConfigurationError(f"{path}: no file *.json, *.json.gz or *.json.zst; give a directory of conversations")
    by_name: dict[str, Path] = {}
    for file in files:
        other = by_name.setdefault(file.name.removesuffix(".gz").removesuffix(".zst"), file)
        if other is not file:
            raise ConfigurationError(f"{path}: {other.name} and {file.name} are one conversation; remove one of them")
    return files


def read_agentic(path: Path, block_tokens: int, warnings: Counter[str]) -> Iterator[TraceRequest]:
    """The requests of all conversations, merged by time; those of one moment in the order of the files' names.

    Holds all conversations in memory, each block that is new to its chain once.

    Raises:
        ConfigurationError: A file is broken, or its blocks are not of `block_tokens` tokens; the message names it.
    """
    sessions = [
        conversation.requests(session)
        for session, conversation in enumerate(_conversations(path, block_tokens, warnings))
    ]
    yield from heapq.merge(*sessions, key=lambda request: request.timestamp_s)


def read_sessions(path: Path, block_tokens: int, warnings: Counter[str]) -> Iterator[tuple[TraceRequest, ...]]:
    """Each conversation whole, in the order of the files' names; one is in memory at a time.

    Raises:
        ConfigurationError: See `read_agentic`.
    """
    for session, conversation in enumerate(_conversations(path, block_tokens, warnings)):
        yield tuple(conversation.requests(session))


def _conversations(path: Path, block_tokens: int, warnings: Counter[str]) -> Iterator[Conversation]:
    for file in conversation_files(path):
        place = "" if file == path else f"{file.name}, "
        conversation = read_conversation(file, place, warnings)
        if conversation.block_tokens != block_tokens:
            raise ConfigurationError(
                f"{file}: block_size is {conversation.block_tokens}, that of the first conversation {block_tokens}; "
                "keep conversations of different block sizes in different directories"
            )
        yield conversation
