"""Which object lies where in files that hold many: a table on storage that a killed process leaves exact.

    page 0          what the table is, as JSON, padded with zeros
    from page 1 on  records of one size, which begin with an object's key; zeros where there is no object

A record is written by one call and never crosses a page, so that a process that is killed leaves all of it or nothing.
Nothing is synced: after a power failure records may be old, which the stamps of the objects show.

Written, not mapped: in a mapping a file that somebody truncated, or a file system without room, kills the process
(SIGBUS); and some file systems have no shared mappings.
"""

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Final

from mlpstorage.config import MIB, PAGE_BYTES
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.fallocate import reserve
from mlpstorage.storage.keys import KEY_BYTES, STAMP_BYTES, ObjectKeys

_VERSION: Final = 1
_NO_KEY: Final = bytes(KEY_BYTES)
_FLAGS: Final = {
    "slots": "--storage-gb",
    "stored_bytes": "--model, --block-tokens or --tensor-parallel",
    "tags": "--model or --tensor-parallel",
}
"""What a user changes that a value of the header follows from."""


def _digest(keys: ObjectKeys) -> str:
    """One word for the tags of all kv ranks: they may be a thousand, and the header is one page."""
    return blake2b(
        b"".join(keys.key(part)[STAMP_BYTES:] for part in range(keys.parts)), digest_size=KEY_BYTES
    ).hexdigest()


class KeyTable:
    """The table in one file, made by `open` if it is not there.

    Threads may call it at once, for different records.

    Args:
        path: The file.
        kind: What the table is of.
        keys: Names of the objects; their namespaces are part of the header.
        record_bytes: Bytes of a record; a divisor of the page size.
        sizes: Numbers that must be equal for a table to be used again, by name.
    """

    __slots__ = ("_descriptor", "_free", "_header", "path", "record_bytes")

    def __init__(self, path: Path, kind: str, keys: ObjectKeys, record_bytes: int, sizes: Mapping[str, int]) -> None:
        self.path = path
        self.record_bytes = record_bytes
        self._free = bytes(record_bytes)
        self._descriptor = -1
        self._header: dict[str, object] = {
            "tool": "mlpstorage",
            "kind": kind,
            "version": _VERSION,
            **sizes,
            "tags": _digest(keys),
        }

    def open(self) -> None:
        """Make the table, or check that the one that is there is of the same kind, sizes and namespaces.

        Raises:
            ConfigurationError: It is not.
            OSError: The file cannot be made or read.
        """
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        if os.fstat(self._descriptor).st_size:
            self._check_header()
        else:
            os.pwrite(self._descriptor, json.dumps(self._header).encode().ljust(PAGE_BYTES, b"\0"), 0)

    def is_cut_off(self) -> bool:
        """Whether the file ends within the header or within a record, as no write leaves it."""
        records_bytes = os.fstat(self._descriptor).st_size - PAGE_BYTES
        return records_bytes < 0 or records_bytes % self.record_bytes != 0

    def flush(self) -> None:
        """Make durable what was written."""
        os.fsync(self._descriptor)

    def reserve(self, records: int) -> None:
        """Reserve room for so many records, where the file system can.

        Raises:
            OSError: There is no room.
        """
        reserve(self._descriptor, PAGE_BYTES + records * self.record_bytes)

    def records(self) -> Iterator[tuple[int, bytes]]:
        """The number and the bytes of each record that there is, in order."""
        first, step_bytes = 0, MIB // self.record_bytes * self.record_bytes
        while part := os.pread(self._descriptor, step_bytes, PAGE_BYTES + first * self.record_bytes):
            count = len(part) // self.record_bytes
            for number in range(count):
                record = part[number * self.record_bytes : (number + 1) * self.record_bytes]
                if not record.startswith(_NO_KEY):
                    yield first + number, record
            if not count:
                return  # what follows the last whole record was cut off
            first += count

    def put(self, number: int, record: bytes) -> None:
        """Write a record."""
        self._write(number, record)

    def clear(self, number: int) -> None:
        """Take a record out."""
        self._write(number, self._free)

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write(self, number: int, record: bytes) -> None:
        try:
            os.pwrite(self._descriptor, record, PAGE_BYTES + number * self.record_bytes)
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _check_header(self) -> None:
        try:
            found = json.loads(os.pread(self._descriptor, PAGE_BYTES, 0).rstrip(b"\0"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("tool") != self._header["tool"]:
            raise ConfigurationError(
                f"{self.path} is not a table that mlpstorage wrote; remove it by hand, or choose another --cache-dir"
            )
        differing = [
            f"{name} is {wanted} here and was {found.get(name)} there"
            + (f" (follows from {_FLAGS[name]})" if name in _FLAGS else "")
            for name, wanted in self._header.items()
            if found.get(name) != wanted
        ]
        if differing:
            raise ConfigurationError(
                f"{self.path} is of objects that cannot be used: {'; '.join(differing)}. Give the values they were "
                "written with, or another --cache-dir; nothing was deleted"
            )
