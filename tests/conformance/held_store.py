"""A store whose transfers wait in the kernel for as long as a test likes: for engines that take descriptors.

A held transfer is one on a pipe: nothing comes out of an empty one, nothing goes into a full one. So an operation is
under way, for the engine and for the kernel, until the test lets the bytes through. That needs an engine that does not
care what kind of file it reads, as io_uring does not; `preadv` refuses a pipe. What an engine has the store itself
write, in a thread, waits there.
"""

import errno
import os
import threading
from collections.abc import Callable, Sequence

from mlpstorage.storage.base import Capabilities, Capacity, Listing, Moved, aligned_memory
from mlpstorage.storage.descriptor import DescriptorStore, Transfer
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.ops import IoEngine, OpKind
from mlpstorage.storage.packed_store import PackedStore
from mlpstorage.testing.io_rig import WAIT_S, EngineRig

_DIRECTORY = "/"
_FULL_DEVICE = "/dev/full"


class _Held:
    """A transfer on a pipe, and the one of the store below that it stands for."""

    def __init__(self, kind: OpKind, below: Transfer) -> None:
        self.kind = kind
        self.below = below
        self.out, self.into = os.pipe2(os.O_CLOEXEC)
        self.filler_bytes = 0
        if kind is OpKind.WRITE:
            os.set_blocking(self.into, False)
            while self._fill():
                pass
            os.set_blocking(self.into, True)

    @property
    def transfer(self) -> Transfer:
        """What the engine gets."""
        return self.below._replace(descriptor=self.out if self.kind is OpKind.READ else self.into, place=self)

    def _fill(self) -> bool:
        try:
            self.filler_bytes += os.write(self.into, bytes(4096))
        except BlockingIOError:
            return False
        return True

    def let_through(self, stored_bytes: int) -> None:
        """Let the transfer come to its end."""
        if self.kind is OpKind.READ:
            memory = aligned_memory(stored_bytes)
            os.preadv(self.below.descriptor, (memory,), self.below.offset_bytes)
            os.write(self.into, memory)
        else:
            read_exactly(self.out, self.filler_bytes)

    def arrived(self, stored_bytes: int) -> None:
        """Hand on to the store below what was written."""
        memory = aligned_memory(stored_bytes)
        memory[:] = read_exactly(self.out, stored_bytes)
        os.pwritev(self.below.descriptor, (memory,), self.below.offset_bytes)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self.out)
        os.close(self.into)


class _WaitingWrite:
    """A write that the store does itself and that has not begun."""

    def __init__(self) -> None:
        self._may_go_on = threading.Event()

    def wait(self) -> None:
        """Return when the write is let through."""
        assert self._may_go_on.wait(WAIT_S), "the write was never let through"

    def let_through(self, stored_bytes: int) -> None:
        """Let the write begin."""
        del stored_bytes
        self._may_go_on.set()


class _Broken:
    """A transfer on a descriptor with which it fails."""

    def __init__(self, kind: OpKind, below: Transfer) -> None:
        self.below = below
        read = kind is OpKind.READ
        self.descriptor = os.open(_DIRECTORY if read else _FULL_DEVICE, os.O_RDONLY if read else os.O_WRONLY)


class HeldStore(DescriptorStore):
    """A store around another, some of whose transfers are held, and some of which fail.

    Args:
        store: The store below.
    """

    def __init__(self, store: FileStore | PackedStore) -> None:
        self.stored_bytes = store.stored_bytes
        self.object_bytes = store.object_bytes
        self._store = store
        self._condition = threading.Condition()
        self._held_kinds: set[OpKind] = set()
        self._held: list[_Held | _WaitingWrite] = []
        self._came = 0
        self._bad: set[tuple[OpKind, int]] = set()
        self.open = store.open
        self.close = store.close

    @property
    def capabilities(self) -> Capabilities:
        """See `BlockStore.capabilities`."""
        return self._store.capabilities

    @property
    def prompt(self) -> bool:
        """See `DescriptorStore.prompt`."""
        return self._store.prompt

    def hold(self, *kinds: OpKind) -> None:
        """Hold transfers of some kinds that begin from now on, beside those that are held."""
        with self._condition:
            self._held_kinds.update(kinds)

    def wait_held(self, transfers: int) -> None:
        """Return when so many transfers came to be held since the last `release`."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._came >= transfers, WAIT_S), f"{self._came} came"

    def release(self, *held_from_now_on: OpKind) -> None:
        """Let everything through that is held, and hold other kinds, or none."""
        with self._condition:
            held, self._held, self._came = self._held, [], 0
            self._held_kinds = set(held_from_now_on)
        for one in held:
            one.let_through(self.stored_bytes)

    def fail(self, kind: OpKind, object_id: int) -> None:
        """Let operations of a kind on an object fail."""
        self._bad.add((kind, object_id))

    def heal(self) -> None:
        """Let nothing fail."""
        self._bad.clear()

    def begin_read(self, object_id: int) -> Transfer:
        """See `DescriptorStore.begin_read`."""
        return self._begin(OpKind.READ, object_id, self._store.begin_read)

    def end_read(self, transfer: Transfer) -> None:
        """See `DescriptorStore.end_read`."""
        self._store.end_read(self._ended(transfer))

    def begin_write(self, object_id: int) -> Transfer:
        """See `DescriptorStore.begin_write`."""
        return self._begin(OpKind.WRITE, object_id, self._store.begin_write)

    def commit_write(self, transfer: Transfer) -> None:
        """See `DescriptorStore.commit_write`."""
        if isinstance(transfer.place, _Held):
            transfer.place.arrived(self.stored_bytes)
        self._store.commit_write(self._ended(transfer))

    def abort_write(self, transfer: Transfer) -> None:
        """See `DescriptorStore.abort_write`."""
        self._store.abort_write(self._ended(transfer))

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.write`."""
        self._raise_if_bad(OpKind.WRITE, object_id)
        waiting = _WaitingWrite()
        with self._condition:
            if OpKind.WRITE in self._held_kinds:
                self._hold(waiting)
            else:
                waiting.let_through(self.stored_bytes)
        waiting.wait()
        return self._store.write(object_id, buffer)

    def delete(self, object_id: int) -> Moved:
        """See `BlockStore.delete`."""
        self._raise_if_bad(OpKind.DELETE, object_id)
        return self._store.delete(object_id)

    def sync(self, object_id: int) -> None:
        """See `BlockStore.sync`."""
        self._raise_if_bad(OpKind.SYNC, object_id)
        self._store.sync(object_id)

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """See `BlockStore.exists`."""
        return self._store.exists(object_ids)

    def listing(self) -> Listing:
        """See `BlockStore.listing`."""
        return self._store.listing()

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:
        """See `BlockStore.drop_page_cache`."""
        return self._store.drop_page_cache(object_ids)

    def capacity(self) -> Capacity:
        """See `BlockStore.capacity`."""
        return self._store.capacity()

    def _begin(self, kind: OpKind, object_id: int, begin: Callable[[int], Transfer]) -> Transfer:
        below = begin(object_id)
        if (kind, object_id) in self._bad:
            broken = _Broken(kind, below)
            return below._replace(descriptor=broken.descriptor, place=broken)
        with self._condition:
            if kind not in self._held_kinds:
                return below
            held = _Held(kind, below)
            self._hold(held)
            return held.transfer

    def _hold(self, one: _Held | _WaitingWrite) -> None:
        self._held.append(one)
        self._came += 1
        self._condition.notify_all()

    def _ended(self, transfer: Transfer) -> Transfer:
        match transfer.place:
            case _Held() as held:
                held.close()
                return held.below
            case _Broken() as broken:
                os.close(broken.descriptor)
                return broken.below
        return transfer

    def _raise_if_bad(self, kind: OpKind, object_id: int) -> None:
        if (kind, object_id) in self._bad:
            raise OSError(errno.EIO, "injected", f"object {object_id}")


class HeldRig(EngineRig):
    """A rig for an engine that takes descriptors and does not care of what.

    Args:
        store: The store, not yet open.
        make_engine: Makes the engine over it.
        verified_bytes: See `EngineRig`.
        slots: Likewise.
    """

    def __init__(
        self, store: HeldStore, make_engine: Callable[[], IoEngine], *, verified_bytes: int, slots: int
    ) -> None:
        store.open()
        self.store = store
        self.engine = make_engine()
        self.verified_bytes = verified_bytes
        self.moves_directly = store.capabilities.direct
        self.slots = slots
        self.engine.start()

    def hold(self, kind: OpKind) -> None:
        """See `EngineRig.hold`."""
        self.store.hold(kind)

    def wait_held(self, operations: int) -> None:
        """See `EngineRig.wait_held`."""
        self.store.wait_held(operations)

    def release(self) -> None:
        """See `EngineRig.release`."""
        self.store.heal()
        self.store.release()

    def step(self, *kinds: OpKind) -> None:
        """See `EngineRig.step`."""
        self.store.release(*kinds)

    def fail(self, kind: OpKind, object_id: int) -> None:
        """See `EngineRig.fail`."""
        self.store.fail(kind, object_id)

    def is_failure(self, error: Exception | None) -> bool:
        """See `EngineRig.is_failure`: what a directory says to a read, and a full device to a write."""
        return isinstance(error, OSError) and error.errno in {errno.EISDIR, errno.ENOSPC, errno.EIO}

    def is_missing(self, error: Exception | None) -> bool:
        """See `EngineRig.is_missing`."""
        return isinstance(error, FileNotFoundError)

    def close(self) -> None:
        """See `EngineRig.close`."""
        super().close()
        self.store.close()


def read_exactly(descriptor: int, size_bytes: int) -> bytes:
    """So many bytes of a pipe."""
    parts: list[bytes] = []
    while size_bytes:
        parts.append(os.read(descriptor, size_bytes))
        size_bytes -= len(parts[-1])
    return b"".join(parts)
