"""The logical operations of a rank, as one digest: what was looked up and found, loaded, stored and deleted."""

import enum
import hashlib
import sys
from array import array
from collections.abc import Collection


class Operation(enum.Enum):
    """What was done with blocks; the value enters the digest."""

    LOOK_UP = b"look-up"
    LOAD = b"load"
    STORE = b"store"
    DELETE = b"delete"


class OperationsDigest:
    """SHA-256 over all operations, in the order in which they were decided."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, operation: Operation, values: Collection[int]) -> None:
        """Take in an operation: ids of blocks, or, of a look-up, how many were asked for, and found in each tier."""
        words = array("Q", (len(values), *values))
        if sys.byteorder == "big":
            words.byteswap()  # the digest is of little-endian words
        self._hash.update(operation.value)
        self._hash.update(words)

    def hexdigest(self) -> str:
        """The digest so far, as hex digits."""
        return self._hash.hexdigest()
