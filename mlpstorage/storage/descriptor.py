"""Stores whose objects are parts of files: how a transfer begins and ends, and the plain way to do it between."""

import errno
import os
from abc import ABC, abstractmethod
from typing import NamedTuple

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.base import Moved, ShortObjectError


class Transfer(NamedTuple):
    """An object's bytes in an open file, between `begin_read` or `begin_write` and its end.

    Attributes:
        object_id: The object.
        descriptor: The open file.
        offset_bytes: Where in the file the object begins.
        place: What the store itself must know to end the transfer (a temporary path, a slot).
        moved: What the transfer will have been, should it succeed.
    """

    object_id: int
    descriptor: int
    offset_bytes: int
    place: object
    moved: Moved


class DescriptorStore(ABC):
    """Reads and writes over `begin_*` and `end_*`; an I/O engine may use those and move the bytes its own way.

    Every transfer that was begun must be ended, also after an error.
    """

    __slots__ = ()

    stored_bytes: int

    @property
    def prompt(self) -> bool:
        """Whether no write or delete makes, renames, removes or syncs a file, in `begin_write` and its kin.

        An I/O engine then does those between transfers. Where they take their time it lets no transfer wait for them.
        """
        return False

    @abstractmethod
    def begin_read(self, object_id: int) -> Transfer:
        """Find an object.

        Raises:
            FileNotFoundError: There is no such object.
        """

    @abstractmethod
    def end_read(self, transfer: Transfer) -> None:
        """Let go of what `begin_read` took."""

    @abstractmethod
    def begin_write(self, object_id: int) -> Transfer:
        """Make room for an object, which nobody can find before `commit_write`."""

    @abstractmethod
    def commit_write(self, transfer: Transfer) -> None:
        """Make the object, whose bytes are all written, findable; after it is synced, where writes are.

        Where it fails the transfer is ended as by `abort_write`.
        """

    @abstractmethod
    def abort_write(self, transfer: Transfer) -> None:
        """Undo `begin_write`."""

    def where(self, transfer: Transfer) -> str:
        """The object's place, for messages: a path, where an object has one of its own."""
        return f"object {transfer.object_id}"

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.read`."""
        transfer = self.begin_read(object_id)
        try:
            done_bytes = os.preadv(transfer.descriptor, (buffer,), transfer.offset_bytes)
            if done_bytes != self.stored_bytes:
                self._read_rest(transfer, buffer, done_bytes)
        except OSError as error:
            name_place(self, transfer, error)
            raise
        finally:
            self.end_read(transfer)
        return transfer.moved

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.write`."""
        transfer = self.begin_write(object_id)
        try:
            done_bytes = os.pwritev(transfer.descriptor, (buffer,), transfer.offset_bytes)
            while done_bytes != self.stored_bytes:
                part, at_bytes = buffer[done_bytes:], transfer.offset_bytes + done_bytes
                done_bytes += os.pwritev(transfer.descriptor, (part,), at_bytes)
        except BaseException as error:
            self.abort_write(transfer)
            if isinstance(error, OSError):
                name_place(self, transfer, error)
            raise
        self.commit_write(transfer)
        return transfer.moved

    def _read_rest(self, transfer: Transfer, buffer: memoryview, done_bytes: int) -> None:
        while done_bytes != self.stored_bytes:
            # After an odd number of bytes comes the file's end, and direct I/O could not go on from there anyway.
            ended = transfer.moved.direct and done_bytes % PAGE_BYTES
            at_bytes = transfer.offset_bytes + done_bytes
            part_bytes = 0 if ended else os.preadv(transfer.descriptor, (buffer[done_bytes:],), at_bytes)
            if not part_bytes:
                raise truncated(self, transfer, done_bytes)
            done_bytes += part_bytes


def truncated(store: DescriptorStore, transfer: Transfer, done_bytes: int) -> ShortObjectError:
    """The error of an object of which only the first bytes are there."""
    message = f"the object is truncated: {done_bytes} of {store.stored_bytes} bytes are there"
    return ShortObjectError(errno.EIO, message, store.where(transfer))


def failed(store: DescriptorStore, transfer: Transfer, error_number: int) -> OSError:
    """The error of a transfer that the system ended with an error number (positive)."""
    return OSError(error_number, os.strerror(error_number), store.where(transfer))


def name_place(store: DescriptorStore, transfer: Transfer, error: OSError) -> None:
    """Add to an error of a call on a descriptor, which names no file, where the object is."""
    if error.filename is None and error.errno is not None:
        error.filename = store.where(transfer)
