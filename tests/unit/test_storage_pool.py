"""The I/O threads: batches, chains, lanes, failures, and their end."""

import ctypes
import hashlib
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlpstorage.config import IoPriority, Verify
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import (
    BlockStore,
    Capabilities,
    Capacity,
    Listing,
    Moved,
    ShortObjectError,
    aligned_memory,
    buffer_bytes,
)
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.object_store import ObjectStore
from mlpstorage.storage.ops import IoEngine, Lane, Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.storage.payload import PagedMemory, Payload, VerifyError
from mlpstorage.storage.pool import IoPool

if TYPE_CHECKING:
    from tests.swift import S3Server

KEYS = ObjectKeys("tiny-1b|0|full")
OBJECT_BYTES = 8 * 4096
WAIT_S = 60
"""Far more than any operation takes: a test that hangs fails by it, none passes by it."""

MakePool = Callable[..., IoPool]


class GatedStore:
    """A store whose operations first call a hook, which may wait or fail; otherwise the files below it."""

    def __init__(self, store: FileStore, hook: Callable[[OpKind, int], None]) -> None:
        self.object_bytes = store.object_bytes
        self.stored_bytes = store.stored_bytes
        self.capabilities: Capabilities = store.capabilities
        self._store = store
        self._hook = hook

    def open(self) -> None:
        """Open the files."""
        self._store.open()

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """Read an object."""
        self._hook(OpKind.READ, object_id)
        return self._store.read(object_id, buffer)

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """Write an object."""
        self._hook(OpKind.WRITE, object_id)
        return self._store.write(object_id, buffer)

    def delete(self, object_id: int) -> Moved:
        """Delete an object."""
        self._hook(OpKind.DELETE, object_id)
        return self._store.delete(object_id)

    def sync(self, object_id: int) -> None:
        """Sync an object."""
        self._hook(OpKind.SYNC, object_id)
        self._store.sync(object_id)

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """Look for objects."""
        return self._store.exists(object_ids)

    def listing(self) -> Listing:
        """List the objects."""
        return self._store.listing()

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:
        """Drop pages."""
        return self._store.drop_page_cache(object_ids)

    def capacity(self) -> Capacity:
        """Tell the room."""
        return self._store.capacity()

    def close(self) -> None:
        """Close the files."""
        self._store.close()


class AddressStore(GatedStore):
    """A store that remembers which memory it was given to read into, and by which thread."""

    def __init__(self, store: FileStore, hook: Callable[[OpKind, int], None]) -> None:
        super().__init__(store, hook)
        self.given: list[tuple[str, int, int]] = []

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """Read an object."""
        self.given.append((threading.current_thread().name, address(buffer), buffer.nbytes))
        return super().read(object_id, buffer)


class AddressPayload(Payload):
    """Payloads that remember which memory was checked, and by which thread."""

    def __init__(self, keys: ObjectKeys, stored_bytes: int, verify: Verify) -> None:
        super().__init__(keys, stored_bytes, verify)
        self.checked: list[tuple[str, int, int]] = []

    def check_pages(self, pages: PagedMemory, object_id: int, write: int | None = None) -> int:
        """Check memory."""
        self.checked.append((threading.current_thread().name, address(pages.memory), pages.memory.nbytes))
        return super().check_pages(pages, object_id, write)


class TellingStore(GatedStore):
    """A store that tells more of its operations than files can: page cache and retries."""

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """Read an object, a part of it from the page cache, or so it says; of odd objects it cannot tell."""
        super().read(object_id, buffer)
        return Moved(direct=False, page_cache_bytes=None if object_id % 2 else 4096)

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """Write an object at the third try."""
        super().write(object_id, buffer)
        return Moved(direct=None, retries=2)

    def delete(self, object_id: int) -> Moved:
        """Delete an object at the second try."""
        super().delete(object_id)
        return Moved(retries=1)


class Batch:
    """Receives what became of a batch."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[OpDone]]] = []
        self._done = threading.Event()

    def __call__(self, finished: list[OpDone]) -> None:
        """Be told that the batch is finished."""
        self.calls.append((threading.current_thread().name, finished))
        self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether the batch is finished."""
        return self._done.is_set()

    def result(self) -> list[OpDone]:
        """Wait for the batch."""
        assert self._done.wait(WAIT_S), "the batch never finished"
        return self.calls[0][1]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """An open store of small objects."""
    store = FileStore(tmp_path / "objects", KEYS, OBJECT_BYTES)
    store.open()
    return store


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Makes pools that are started, and closes them in the end."""
    pools: list[IoPool] = []

    def make(
        store: BlockStore,
        threads: int,
        arena: DramArena | None = None,
        priority: IoPriority = IoPriority.SPLIT,
        payload: Payload | None = None,
    ) -> IoPool:
        pool = IoPool(store, payload or Payload(KEYS, store.stored_bytes), arena, threads, priority)
        pools.append(pool)
        pool.start()
        return pool

    yield make
    for pool in pools:
        pool.close()


def each(kind: OpKind, object_ids: Sequence[int]) -> list[tuple[Op]]:
    """One chain an object."""
    return [(Op(kind, object_id),) for object_id in object_ids]


def run(pool: IoPool, chains: Sequence[Sequence[Op]], lane: Lane = Lane.LOAD) -> list[OpDone]:
    """Run a batch and wait for it."""
    batch = Batch()
    pool.submit(chains, lane, batch)
    return batch.result()


def meet(threads: int) -> Callable[[OpKind, int], None]:
    """A hook at which so many threads wait for each other, so that each does as many operations as the others."""
    together = threading.Barrier(threads)

    def hook(_kind: OpKind, _object_id: int) -> None:
        together.wait(WAIT_S)

    return hook


def first_stamp(object_id: int, keys: ObjectKeys = KEYS) -> tuple[int, int]:
    """The stamp of an object's first page: the beginning of its name, and the page's number."""
    return (int(struct.unpack("<Q", bytes.fromhex(keys.name(object_id)[:16]))[0]), 0)


def address(memory: memoryview) -> int:
    """Where some memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's, as the kernel counts it."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith("Anonymous:")]
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_round_trip(store: FileStore, make_pool: MakePool, threads: int) -> None:
    """What a batch writes the next one reads, every byte checked, reported in the order of the chains."""
    pool = make_pool(store, threads)
    before_ns = time.perf_counter_ns()
    object_ids = list(range(50))
    written = run(pool, each(OpKind.WRITE, object_ids), Lane.STORE)
    read = run(pool, each(OpKind.READ, object_ids))
    after_ns = time.perf_counter_ns()
    for finished, verified_bytes in ((written, 0), (read, OBJECT_BYTES)):
        assert [done.op.object_id for done in finished] == object_ids
        for done in finished:
            assert done.error is None
            assert done.direct is store.direct
            assert done.verified_bytes == verified_bytes
            assert before_ns <= done.queued_ns <= done.start_ns <= done.end_ns <= after_ns
    assert [done.error for done in run(pool, each(OpKind.DELETE, object_ids))] == [None] * 50
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_many_objects_share_no_page(store: FileStore, make_pool: MakePool) -> None:
    """All 4 KiB pages of 300 objects on storage, written by four threads, differ and do not compress."""
    run(make_pool(store, 4), each(OpKind.WRITE, range(300)), Lane.STORE)
    seen: set[bytes] = set()
    for object_id in range(300):
        data = store.path(object_id).read_bytes()
        assert struct.unpack("<QQ", data[:16]) == first_stamp(object_id)
        assert len(zlib.compress(data, level=1)) >= 0.99 * len(data)
        seen.update(hashlib.sha256(data[start : start + 4096]).digest() for start in range(0, len(data), 4096))
    assert len(seen) == 300 * 8


def test_batch_is_reported_once_by_an_io_thread(store: FileStore, make_pool: MakePool) -> None:
    """However many chains a batch has, its caller is called once, in a thread of the pool."""
    pool = make_pool(store, 4)
    batch = Batch()
    pool.submit(each(OpKind.WRITE, range(40)), Lane.STORE, batch)
    batch.result()
    pool.close()
    ((thread, finished),) = batch.calls
    assert thread.startswith("io-")
    assert len(finished) == 40


def test_empty_batch_is_reported(store: FileStore, make_pool: MakePool) -> None:
    """A batch without chains finishes too."""
    assert run(make_pool(store, 2), []) == []
    assert run(make_pool(store, 2), [[], []]) == []


def test_chain_is_done_in_order(store: FileStore, make_pool: MakePool) -> None:
    """The victims of a chain are deleted before its object is written; operations are reported chain after chain."""
    log: list[tuple[OpKind, int]] = []
    pool = make_pool(GatedStore(store, lambda kind, object_id: log.append((kind, object_id))), 4)
    run(pool, each(OpKind.WRITE, range(16)), Lane.STORE)
    log.clear()
    chains = [
        (Op(OpKind.DELETE, 2 * number), Op(OpKind.DELETE, 2 * number + 1), Op(OpKind.WRITE, 100 + number))
        for number in range(8)
    ]
    finished = run(pool, chains, Lane.STORE)
    assert [done.op for done in finished] == [op for chain in chains for op in chain]
    assert all(done.error is None for done in finished)
    for chain in chains:
        order = [log.index((op.kind, op.object_id)) for op in chain]
        assert order == sorted(order)
    assert sum(path.is_file() for path in store.root.rglob("*")) == 8


def test_chains_run_at_once_on_threads_of_either_lane(store: FileStore, make_pool: MakePool) -> None:
    """All threads take from a lane when the other is empty: four stores, then four loads, meet in the middle."""
    pool = make_pool(GatedStore(store, meet(4)), 4)
    for kind, lane in ((OpKind.WRITE, Lane.STORE), (OpKind.READ, Lane.LOAD)):
        assert [done.error for done in run(pool, each(kind, range(4)), lane)] == [None] * 4


@pytest.mark.parametrize(("threads", "first"), [(1, OpKind.READ), (2, None)])
def test_loads_come_first_where_threads_prefer_them(
    store: FileStore, make_pool: MakePool, threads: int, first: OpKind | None
) -> None:
    """One thread takes waiting loads before stores that waited longer; of two threads each takes its own lane's."""
    gates = {object_id: threading.Event() for object_id in (100, 101)}
    entered = threading.Semaphore(0)
    log: list[tuple[str, OpKind]] = []

    def hook(kind: OpKind, object_id: int) -> None:
        if object_id in gates:
            entered.release()
            assert gates[object_id].wait(WAIT_S)
        else:
            log.append((threading.current_thread().name, kind))

    pool = make_pool(GatedStore(store, hook), threads)
    blocked = Batch()
    pool.submit(each(OpKind.WRITE, list(gates)[:threads]), Lane.STORE, blocked)
    for _ in range(threads):
        assert entered.acquire(timeout=WAIT_S)
    stores, loads = Batch(), Batch()
    pool.submit(each(OpKind.WRITE, range(5)), Lane.STORE, stores)
    pool.submit(each(OpKind.READ, range(50, 55)), Lane.LOAD, loads)
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (5, 5)
    for gate in gates.values():
        gate.set()
    stores.result()
    loads.result()
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (0, 0)
    if first is not None:
        assert [kind for _, kind in log] == [OpKind.READ] * 5 + [OpKind.WRITE] * 5
    else:
        first_of_thread = dict(reversed(log))
        assert first_of_thread.get("io-0", OpKind.READ) is OpKind.READ
        assert first_of_thread.get("io-1", OpKind.WRITE) is OpKind.WRITE


def test_failure_skips_the_rest_of_its_chain_only(store: FileStore, make_pool: MakePool) -> None:
    """After a failed operation those behind it in the chain are not tried; other chains are not touched."""
    pool = make_pool(store, 2)
    run(pool, each(OpKind.WRITE, [1, 2]), Lane.STORE)
    chains = [
        (Op(OpKind.DELETE, 1), Op(OpKind.DELETE, 99), Op(OpKind.WRITE, 10), Op(OpKind.WRITE, 11)),
        (Op(OpKind.DELETE, 2), Op(OpKind.WRITE, 12)),
    ]
    finished = run(pool, chains, Lane.STORE)
    kinds = [type(done.error) for done in finished]
    assert kinds == [type(None), FileNotFoundError, OperationSkippedError, OperationSkippedError, *[type(None)] * 2]
    assert [object_id for object_id in (1, 2, 10, 11, 12) if store.path(object_id).exists()] == [12]


def test_damaged_objects_are_reported_and_threads_live_on(store: FileStore, make_pool: MakePool) -> None:
    """A wrong page, a foreign object, a short and a missing one: each fails its read alone, with nothing verified."""
    pool = make_pool(store, 2)
    run(pool, each(OpKind.WRITE, range(5)), Lane.STORE)
    damaged = bytearray(store.path(0).read_bytes())
    damaged[3 * 4096] ^= 0x10
    store.path(0).write_bytes(damaged)
    store.path(1).write_bytes(store.path(4).read_bytes())
    store.path(2).write_bytes(store.path(2).read_bytes()[:-4096])
    store.path(3).unlink()
    finished = run(pool, each(OpKind.READ, range(5)))
    kinds = [VerifyError, VerifyError, ShortObjectError, FileNotFoundError, type(None)]
    assert [type(done.error) for done in finished] == kinds
    assert [done.verified_bytes for done in finished] == [0, 0, 0, 0, OBJECT_BYTES]
    pages = [done.error.page for done in finished if isinstance(done.error, VerifyError)]
    assert pages == [3, 0]
    assert all(done.start_ns <= done.end_ns for done in finished)


def test_unexpected_exception_is_the_operations_error(store: FileStore, make_pool: MakePool) -> None:
    """A store that raises what it should not ends neither its thread nor the batch."""

    def hook(_kind: OpKind, object_id: int) -> None:
        if object_id == 1:
            raise ZeroDivisionError("a bug")

    pool = make_pool(GatedStore(store, hook), 1)
    finished = run(pool, each(OpKind.WRITE, range(3)), Lane.STORE)
    assert [type(done.error) for done in finished] == [type(None), ZeroDivisionError, type(None)]


def test_exception_of_the_caller_is_shown_and_the_thread_lives_on(
    store: FileStore, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a caller raises when it is told of its batch goes to `threading.excepthook`, once."""
    shown: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_value))
    pool = make_pool(store, 1)
    fault = KeyError("a bug")

    def on_done(_finished: list[OpDone]) -> None:
        raise fault

    pool.submit(each(OpKind.WRITE, [1]), Lane.STORE, on_done)
    assert run(pool, each(OpKind.WRITE, [2]), Lane.STORE)[0].error is None
    assert shown == [fault]


def test_cancel_finishes_what_has_not_begun(store: FileStore, make_pool: MakePool) -> None:
    """Cancelled chains are reported at once; a chain that runs is finished, and its batch reported after it."""
    gate, entered = threading.Event(), threading.Event()

    def hook(_kind: OpKind, object_id: int) -> None:
        if object_id == 1:
            entered.set()
            assert gate.wait(WAIT_S)

    pool = make_pool(GatedStore(store, hook), 1)
    mixed, waiting = Batch(), Batch()
    pool.submit([(Op(OpKind.WRITE, 1), Op(OpKind.WRITE, 2)), (Op(OpKind.WRITE, 3),)], Lane.STORE, mixed)
    assert entered.wait(WAIT_S)
    pool.submit(each(OpKind.WRITE, [4, 5]), Lane.LOAD, waiting)
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (2, 1)
    pool.cancel_queued()
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (0, 0)
    assert waiting.is_done
    assert not mixed.is_done
    assert [type(done.error) for done in waiting.result()] == [OperationSkippedError] * 2
    gate.set()
    assert [type(done.error) for done in mixed.result()] == [type(None), type(None), OperationSkippedError]
    assert [object_id for object_id in range(1, 6) if store.path(object_id).exists()] == [1, 2]
    assert run(pool, each(OpKind.READ, [1, 2]))[1].verified_bytes == OBJECT_BYTES


def test_close_cancels_waits_and_ends_the_threads(store: FileStore, make_pool: MakePool) -> None:
    """Closing skips what waits, lets what runs come to its end, and leaves no thread; a second time does nothing."""
    before = threading.active_count()
    gate, entered = threading.Event(), threading.Event()

    def hook(_kind: OpKind, _object_id: int) -> None:
        entered.set()
        assert gate.wait(WAIT_S)

    pool = make_pool(GatedStore(store, hook), 1)
    batch = Batch()
    pool.submit(each(OpKind.WRITE, range(10)), Lane.STORE, batch)
    assert entered.wait(WAIT_S)
    closer = threading.Thread(target=pool.close)
    closer.start()
    gate.set()
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert threading.active_count() == before
    done, skipped = batch.result()[0], batch.result()[1:]
    assert done.error is None
    assert {type(one.error) for one in skipped} <= {OperationSkippedError, type(None)}
    assert len(batch.calls) == 1
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(each(OpKind.READ, [1]), Lane.LOAD, batch)


def test_pool_may_be_closed_before_it_starts_and_by_its_own_thread(store: FileStore, make_pool: MakePool) -> None:
    """Neither a pool that never started nor a caller that closes it when told of a batch hangs."""
    batch = Batch()
    idle = IoPool(store, Payload(KEYS, OBJECT_BYTES), None, 2)
    idle.submit(each(OpKind.READ, [1]), Lane.LOAD, batch)
    idle.close()
    assert isinstance(batch.result()[0].error, OperationSkippedError)
    pool, closed = make_pool(store, 2), Batch()

    def on_done(finished: list[OpDone]) -> None:
        pool.close()
        closed(finished)

    pool.submit(each(OpKind.WRITE, [1]), Lane.STORE, on_done)
    assert closed.result()[0].error is None


@pytest.mark.parametrize("verify", list(Verify))
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_copies_to_and_from_the_arena(tmp_path: Path, make_pool: MakePool, parts: int, verify: Verify) -> None:
    """The parts of a block lie one after the other in its slot; another object in the slot is an error."""
    keys = ObjectKeys(*(f"llama3.1-8b|{rank}|full" for rank in range(parts)))
    store = FileStore(tmp_path / "objects", keys, OBJECT_BYTES)
    arena = DramArena(3, OBJECT_BYTES * parts)
    pool = make_pool(store, 2, arena, payload=Payload(keys, OBJECT_BYTES, verify))
    objects = [(block_id, object_id) for block_id in range(3) for object_id in keys.block_objects(block_id)]
    copied = run(pool, [(Op(OpKind.COPY_IN, one, slot=2 - block_id),) for block_id, one in objects], Lane.STORE)
    assert len(copied) == 3 * parts
    assert all(done.error is None and done.direct is None and done.start_ns < done.end_ns for done in copied)
    for block_id, object_id in objects:
        start = object_id % parts * OBJECT_BYTES
        part = bytes(arena.view(2 - block_id)[start : start + OBJECT_BYTES])
        assert struct.unpack("<QQ", part[:16]) == first_stamp(object_id, keys)
        assert Payload(keys, OBJECT_BYTES, Verify.FULL).check(memoryview(bytearray(part)), object_id) == OBJECT_BYTES
        assert len(zlib.compress(part, level=1)) >= 0.99 * OBJECT_BYTES
    back = run(pool, [(Op(OpKind.COPY_OUT, one, slot=2 - block_id),) for block_id, one in objects])
    # What is right in memory says nothing about storage: it counts as verified in no mode where it is reported.
    assert [(done.error, done.verified_bytes) for done in back] == [(None, 0)] * 3 * parts
    (wrong,) = run(pool, [(Op(OpKind.COPY_OUT, 0, slot=0),)])
    assert isinstance(wrong.error, VerifyError) is (verify is not Verify.OFF)


def test_copy_without_an_arena_is_an_error(store: FileStore, make_pool: MakePool) -> None:
    """Without a DRAM tier there is nothing to copy to."""
    (done,) = run(make_pool(store, 1), [(Op(OpKind.COPY_IN, 1, slot=0),)])
    assert isinstance(done.error, ValueError)


def test_every_batch_of_many_submitters_is_finished(store: FileStore, make_pool: MakePool) -> None:
    """Batches from several threads, cancelled in between, are all reported, each once and in full."""
    pool = make_pool(store, 3)
    batches = [[Batch() for _ in range(40)] for _ in range(4)]

    def submit(number: int) -> None:
        for turn, batch in enumerate(batches[number]):
            pool.submit(each(OpKind.WRITE, range(number * 10, number * 10 + 3)), Lane(turn % 2), batch)
            if turn % 10 == 9:
                pool.cancel_queued()

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [batch for of_thread in batches for batch in of_thread]
    results = [batch.result() for batch in everything]
    pool.close()
    assert all(len(result) == 3 for result in results)
    assert all(len(batch.calls) == 1 for batch in everything)
    assert {type(done.error) for result in results for done in result} <= {OperationSkippedError, type(None)}


@pytest.mark.parametrize("verify", list(Verify))
def test_reads_are_verified_as_far_as_asked(store: FileStore, make_pool: MakePool, verify: Verify) -> None:
    """A changed byte is found by a full check, a page of another object by the stamps too, and nothing without any."""
    pool = make_pool(store, 2, payload=Payload(KEYS, OBJECT_BYTES, verify))
    run(pool, each(OpKind.WRITE, range(4)), Lane.STORE)
    changed, stale = bytearray(store.path(1).read_bytes()), bytearray(store.path(2).read_bytes())
    changed[5 * 4096 + 100] ^= 1
    stale[3 * 4096 : 4 * 4096] = store.path(0).read_bytes()[3 * 4096 : 4 * 4096]
    store.path(1).write_bytes(changed)
    store.path(2).write_bytes(stale)
    finished = run(pool, each(OpKind.READ, range(4)))
    wrong = [(done.op.object_id, done.error.page) for done in finished if isinstance(done.error, VerifyError)]
    expected = {Verify.OFF: [], Verify.STAMP: [(2, 3)], Verify.FULL: [(1, 5), (2, 3)]}[verify]
    assert wrong == expected
    right_bytes = 0 if verify is Verify.OFF else OBJECT_BYTES
    assert [done.verified_bytes for done in finished if done.error is None] == [right_bytes] * (4 - len(expected))


def test_store_tells_of_page_cache_and_retries(store: FileStore, make_pool: MakePool) -> None:
    """What the store says of an operation stands in what became of it; what it cannot know stays unknown."""
    pool = make_pool(TellingStore(store, lambda _kind, _object_id: None), 2)
    written = run(pool, each(OpKind.WRITE, [1, 2]), Lane.STORE)
    assert [(done.direct, done.page_cache_bytes, done.retries) for done in written] == [(None, 0, 2)] * 2
    read = run(pool, each(OpKind.READ, [1, 2]))
    assert [(done.direct, done.page_cache_bytes, done.retries) for done in read] == [(False, None, 0), (False, 4096, 0)]
    deleted = run(pool, each(OpKind.DELETE, [1, 99]), Lane.STORE)
    assert [(done.direct, done.page_cache_bytes, done.retries) for done in deleted] == [(None, 0, 1), (None, 0, 0)]


@pytest.mark.parametrize("object_mib", [1, 12])
def test_retries_of_failed_operations_count(
    s3_server: "S3Server", s3_bucket: str, make_pool: MakePool, object_mib: int
) -> None:
    """An operation that was tried again and failed in the end tells its retries, all parts of an object together."""
    place = S3Location(s3_bucket, "kv")
    store = ObjectStore(place, KEYS, object_mib << 20, part_bytes=5 << 20, limit_s=1.0)
    store.open()
    pool = make_pool(store, 4)
    known, unknown = 1, 2
    run(pool, each(OpKind.WRITE, [known]), Lane.STORE)
    with s3_server.stopped():
        chains = [(Op(kind, known),) for kind in (OpKind.READ, OpKind.WRITE, OpKind.DELETE)]
        done = run(pool, [*chains, (Op(OpKind.DELETE, unknown),)])
    for one in done:
        assert isinstance(one.error, OSError)
        tries = int(str(one.error).partition("after ")[2].partition(" ")[0])
        parts = 3 if one.op.kind is OpKind.READ and object_mib > 5 else 1
        assert one.retries > 0
        assert one.retries == tries - 1 if parts == 1 else one.retries >= tries - 1 + parts - 1


def test_sync_is_an_operation(store: FileStore, make_pool: MakePool) -> None:
    """An object that was written is synced by its own operation, which is timed and moves nothing; it may fail."""
    log: list[tuple[OpKind, int]] = []
    pool = make_pool(GatedStore(store, lambda kind, object_id: log.append((kind, object_id))), 2)
    chains = [(Op(OpKind.WRITE, 7), Op(OpKind.SYNC, 7))]
    _, done = run(pool, chains, Lane.STORE)
    assert log == [(OpKind.WRITE, 7), (OpKind.SYNC, 7)]
    assert (done.error, done.direct, done.verified_bytes, done.payload_ns) == (None, None, 0, 0)
    assert done.start_ns < done.end_ns
    (missing,) = run(pool, [(Op(OpKind.SYNC, 8),)], Lane.STORE)
    assert isinstance(missing.error, FileNotFoundError)


def test_payload_time_is_processor_time(store: FileStore, make_pool: MakePool) -> None:
    """Stamping and checking take processor time, which is a part of the process's; deleting takes none for payload."""
    pool = make_pool(store, 2)
    before_ns = time.process_time_ns()
    written = run(pool, each(OpKind.WRITE, range(50)), Lane.STORE)
    read = run(pool, each(OpKind.READ, range(50)))
    deleted = run(pool, each(OpKind.DELETE, range(50)), Lane.STORE)
    used_ns = time.process_time_ns() - before_ns
    assert all(done.payload_ns > 0 for done in written + read)
    assert all(done.payload_ns == 0 for done in deleted)
    assert sum(done.payload_ns for done in written + read) < used_ns
    store.write(1, aligned_memory(OBJECT_BYTES))
    (wrong,) = run(pool, each(OpKind.READ, [1]))
    assert isinstance(wrong.error, VerifyError)
    assert wrong.payload_ns > 0


@pytest.mark.parametrize("verify", list(Verify))
def test_reads_land_where_they_are_checked(store: FileStore, make_pool: MakePool, verify: Verify) -> None:
    """Each thread hands the store the same memory for every read, a whole object, and checks it there: no copy."""
    addresses = AddressStore(store, meet(4))
    payload = AddressPayload(KEYS, OBJECT_BYTES, verify)
    pool = make_pool(addresses, 4, payload=payload)
    run(pool, each(OpKind.WRITE, range(40)), Lane.STORE)
    finished = run(pool, each(OpKind.READ, range(40)))
    assert [done.error for done in finished] == [None] * 40
    assert sorted(addresses.given) == sorted(payload.checked)
    assert len(addresses.given) == 40
    assert len({thread for thread, _, _ in addresses.given}) == 4
    assert len({place for _, place, _ in addresses.given}) == 4
    assert len(set(addresses.given)) == 4
    assert {size for _, _, size in addresses.given} == {OBJECT_BYTES}


@pytest.mark.parametrize("stored_mib", [2, 8])
def test_memory_is_taken_once(tmp_path: Path, make_pool: MakePool, stored_mib: int) -> None:
    """After each thread has used its memory, hundreds of operations take no more, for no moment, than a part of one."""
    stored_bytes = stored_mib << 20
    store = FileStore(tmp_path / "objects", KEYS, stored_bytes)
    store.open()
    arena = DramArena(2, stored_bytes)
    payload = Payload(KEYS, stored_bytes, Verify.FULL, buffers=8)
    pool = make_pool(GatedStore(store, meet(2)), 2, arena, payload=payload)

    def turn() -> None:
        # With each operation the threads wait for each other, so that both do the same number of them.
        for kind, lane in ((OpKind.WRITE, Lane.STORE), (OpKind.READ, Lane.LOAD)):
            assert [done.error for done in run(pool, each(kind, range(8)), lane)] == [None] * 8
        for kind in (OpKind.COPY_IN, OpKind.COPY_OUT):
            assert [done.error for done in run(pool, [(Op(kind, slot, slot),) for slot in range(2)])] == [None] * 2

    before_bytes = anonymous_bytes()
    turn()
    taken_bytes = anonymous_bytes() - before_bytes
    bound_bytes = 2 * buffer_bytes(stored_bytes, 8) + 2 * stored_bytes
    assert taken_bytes >= 2 * stored_bytes
    assert taken_bytes <= bound_bytes + (4 << 20)
    tracemalloc.start()
    try:
        traced_bytes, _ = tracemalloc.get_traced_memory()
        before_bytes = anonymous_bytes()
        for _ in range(10):
            turn()
        grown_bytes = anonymous_bytes() - before_bytes
        peak_bytes = tracemalloc.get_traced_memory()[1] - traced_bytes
    finally:
        tracemalloc.stop()
    assert grown_bytes < stored_bytes // 2
    assert peak_bytes < stored_bytes // 2


def test_cancel_gives_up_one_batch(store: FileStore, make_pool: MakePool) -> None:
    """What of a batch has not begun is reported as skipped, at once; what runs is finished, others are not touched."""
    gate, entered = threading.Event(), threading.Event()

    def hook(_kind: OpKind, object_id: int) -> None:
        if object_id == 1:
            entered.set()
            assert gate.wait(WAIT_S)

    pool = make_pool(GatedStore(store, hook), 1)
    running, waiting, other = Batch(), Batch(), Batch()
    begun = pool.submit(each(OpKind.WRITE, [1, 2]), Lane.STORE, running)
    assert entered.wait(WAIT_S)
    queued = pool.submit(each(OpKind.READ, [3, 4, 5]), Lane.LOAD, waiting)
    pool.submit(each(OpKind.WRITE, [6, 7]), Lane.LOAD, other)
    pool.cancel(queued)
    assert waiting.is_done
    assert [type(done.error) for done in waiting.result()] == [OperationSkippedError] * 3
    assert waiting.calls[0][0] == threading.current_thread().name
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (2, 1)
    pool.cancel(begun)
    assert not running.is_done
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (2, 0)
    pool.cancel(queued)
    gate.set()
    assert [type(done.error) for done in running.result()] == [type(None), OperationSkippedError]
    assert [done.error for done in other.result()] == [None, None]
    pool.cancel(begun)
    assert [len(batch.calls) for batch in (running, waiting, other)] == [1, 1, 1]
    assert [object_id for object_id in range(1, 8) if store.path(object_id).exists()] == [1, 6, 7]


@pytest.mark.parametrize(("priority", "prefers_stores"), [(IoPriority.STRICT, False), (IoPriority.SPLIT, True)])
def test_strict_priority(store: FileStore, make_pool: MakePool, priority: IoPriority, *, prefers_stores: bool) -> None:
    """Every thread takes loads, then deletes, then stores; with split priority the second prefers the store lane."""
    gates = {100: threading.Event(), 101: threading.Event()}
    entered = {100: threading.Event(), 101: threading.Event()}
    threads: dict[str, int] = {}
    log: list[tuple[OpKind, int]] = []

    def hook(kind: OpKind, object_id: int) -> None:
        if object_id in gates:
            threads[threading.current_thread().name] = object_id
            entered[object_id].set()
            assert gates[object_id].wait(WAIT_S)
        else:
            log.append((kind, object_id))

    for object_id in range(6):
        store.write(object_id, aligned_memory(OBJECT_BYTES))
    pool = make_pool(GatedStore(store, hook), 2, priority=priority, payload=Payload(KEYS, OBJECT_BYTES, Verify.OFF))
    blocked, stores, loads = Batch(), Batch(), Batch()
    pool.submit(each(OpKind.WRITE, list(gates)), Lane.STORE, blocked)
    for event in entered.values():
        assert event.wait(WAIT_S)
    replaced = (Op(OpKind.DELETE, 0), Op(OpKind.WRITE, 10))
    pool.submit([replaced, *each(OpKind.WRITE, [11]), *each(OpKind.DELETE, [1, 2])], Lane.STORE, stores)
    pool.submit(each(OpKind.READ, [3, 4]), Lane.LOAD, loads)
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (2, 5)
    gates[threads["io-1"]].set()
    stores.result()
    loads.result()
    written = [(OpKind.DELETE, 0), (OpKind.WRITE, 10), (OpKind.WRITE, 11)]
    deleted = [(OpKind.DELETE, 1), (OpKind.DELETE, 2)]
    read = [(OpKind.READ, 3), (OpKind.READ, 4)]
    assert log == ([*written, *deleted, *read] if prefers_stores else [*read, *deleted, *written])
    assert (pool.queued_ops(Lane.LOAD), pool.queued_ops(Lane.STORE)) == (0, 0)
    gates[threads["io-0"]].set()
    blocked.result()


def test_strict_priority_cancels_deletes_too(store: FileStore) -> None:
    """Deletes wait in a queue of their own, which is cancelled with the batch, and counted with its lane."""
    pool = IoPool(store, Payload(KEYS, OBJECT_BYTES), None, 1, IoPriority.STRICT)
    one, other = Batch(), Batch()
    handle = pool.submit([*each(OpKind.DELETE, [1, 2]), *each(OpKind.WRITE, [3])], Lane.STORE, one)
    pool.submit(each(OpKind.DELETE, [4]), Lane.STORE, other)
    assert pool.queued_ops(Lane.STORE) == 4
    pool.cancel(handle)
    assert [type(done.error) for done in one.result()] == [OperationSkippedError] * 3
    assert pool.queued_ops(Lane.STORE) == 1
    pool.cancel_queued()
    assert [type(done.error) for done in other.result()] == [OperationSkippedError]
    assert pool.queued_ops(Lane.STORE) == 0
    pool.close()


def test_pool_is_an_io_engine(store: FileStore, make_pool: MakePool) -> None:
    """The pool can stand wherever an I/O engine is wanted."""
    engine: IoEngine = make_pool(store, 1)
    batch = Batch()
    engine.submit(each(OpKind.WRITE, [1]), Lane.STORE, batch)
    assert batch.result()[0].error is None
