"""A store in another process, told what to do line by line, so that a test can kill it in the middle of something."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.base import BlockStore, Capabilities, aligned_memory
from mlpstorage.storage.descriptor import DescriptorStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.content import difference, make_content

if TYPE_CHECKING:
    from mlpstorage.testing.suite_hooks import StoreHooks

_PROGRAM = "from mlpstorage.testing.suite_child import serve; serve()"


class StoreProcess:
    """Another process with a store of a suite's kind; a context manager, whose end kills it.

    Args:
        suite: The class whose `make_store` makes the store.
        place: The store's place.
        namespaces: Of its keys.
        object_bytes: Bytes of an object's payload.
        objects: How many objects it has room for.
    """

    __slots__ = ("_argument", "_process")

    def __init__(
        self, suite: "type[StoreHooks]", place: Path, namespaces: Sequence[str], object_bytes: int, objects: int
    ) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._argument = json.dumps(
            {
                "file": inspect.getfile(suite),
                "suite": suite.__qualname__,
                "place": str(place),
                "namespaces": list(namespaces),
                "object_bytes": object_bytes,
                "objects": objects,
            }
        )

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, self._argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def tell(self, *command: object) -> None:
        """Hand over a command (see `serve`) without waiting for its answer."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:  # noqa: ANN401 - whatever JSON holds
        """Wait for the next answer.

        Raises:
            RuntimeError: The process ended in the place of answering; what it had to say is on standard error.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process with the other store ended before it answered")
        return json.loads(line)

    def ask(self, *command: object) -> Any:  # noqa: ANN401 - likewise
        """Hand over a command and wait for its answer."""
        self.tell(*command)
        return self.answer()

    def open(self) -> Capabilities:
        """Have the store opened; returns what it can do."""
        return Capabilities(**self.ask("open"))

    def write(self, object_ids: Sequence[int], version: int = 0) -> None:
        """Have objects written; returns when all are."""
        self.tell("write", list(object_ids), version)
        assert [self.answer() for _ in object_ids] == list(object_ids)

    def delete(self, object_ids: Sequence[int]) -> None:
        """Have objects deleted; returns when all are."""
        assert self.ask("delete", list(object_ids)) == list(object_ids)

    def problems(self, object_ids: Sequence[int], version: int = 0) -> list[str | None]:
        """What of objects is not as it was written, read there; None for each that is."""
        problems: list[str | None] = self.ask("check", list(object_ids), version)
        return problems

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """What `exists` says there."""
        there: list[bool] = self.ask("exists", list(object_ids))
        return there

    def kill(self) -> list[Any]:
        """Kill the process (SIGKILL) and wait for its end; returns the answers that nobody has read yet.

        Calling it again does nothing.
        """
        process, self._process = self._process, None
        if process is None:
            return []
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        with process.stdin, process.stdout:
            lines = process.stdout.read().splitlines(keepends=True)
        process.wait()
        return [json.loads(line) for line in lines if line.endswith("\n")]


def serve() -> None:
    """Do the commands that arrive on standard input, one JSON list a line, and answer each with a JSON value.

    ["open"] opens the store and answers with its capabilities.
    ["write", ids, version] answers with each id as soon as its object is written.
    ["half", id, version] begins to write an object and writes the first half of its bytes.
    ["delete", ids] answers with the ids when all are deleted.
    ["check", ids, version] answers with what is wrong with each of the objects, null where nothing is.
    ["exists", ids] answers with what the store says.
    """
    wanted = json.loads(sys.argv[1])
    keys = ObjectKeys(*wanted["namespaces"])
    suite = _load_suite(Path(wanted["file"]), wanted["suite"])
    store = suite.make_store(Path(wanted["place"]), keys, wanted["object_bytes"], wanted["objects"])
    memory = aligned_memory(store.stored_bytes)
    for line in sys.stdin:
        match json.loads(line):
            case ["open"]:
                store.open()
                _answer(asdict(store.capabilities))
            case ["write", ids, version]:
                for object_id in ids:
                    memory[:] = make_content(keys, object_id, store.stored_bytes, version)
                    store.write(object_id, memory)
                    _answer(object_id)
            case ["half", object_id, version]:
                memory[:] = make_content(keys, object_id, store.stored_bytes, version)
                _answer(write_half(store, object_id, memory))
            case ["delete", ids]:
                for object_id in ids:
                    store.delete(object_id)
                _answer(ids)
            case ["check", ids, version]:
                _answer([_problem(store, keys, object_id, version, memory) for object_id in ids])
            case ["exists", ids]:
                _answer(store.exists(ids))
            case command:
                raise ValueError(f"{command} is no command")


def write_half(store: BlockStore, object_id: int, memory: memoryview) -> int:
    """Begin to write an object and write the first half of its pages; returns the number of bytes written."""
    assert isinstance(store, DescriptorStore)
    transfer = store.begin_write(object_id)
    half_bytes = memory.nbytes // PAGE_BYTES // 2 * PAGE_BYTES
    return os.pwritev(transfer.descriptor, (memory[:half_bytes],), transfer.offset_bytes)


def _problem(store: BlockStore, keys: ObjectKeys, object_id: int, version: int, memory: memoryview) -> str | None:
    """What is wrong with an object."""
    memory[:] = bytes(memory.nbytes)
    try:
        store.read(object_id, memory)
    except FileNotFoundError:
        return "it is not there"
    return difference(memory, make_content(keys, object_id, store.stored_bytes, version))


def _load_suite(path: Path, name: str) -> "StoreHooks":
    specification = importlib.util.spec_from_file_location("suite_of_another_process", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # As an import does it: dataclasses look their module up.
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    suite: StoreHooks = getattr(module, name)()
    return suite


def _answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
