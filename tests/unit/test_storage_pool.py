"""The I/O threads: batches, chains, lanes, failures, and their end."""

import hashlib
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore, ShortObjectError
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.ops import Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload, VerifyError
from mlpstorage.storage.pool import IoPool, OperationSkippedError

NAMESPACE = "tiny-1b|0|full"
OBJECT_BYTES = 8 * 4096
WAIT_S = 60
"""Far more than any operation takes: a test that hangs fails by it, none passes by it."""

MakePool = Callable[..., IoPool]


class GatedStore:
    """A store whose reads and writes first call a hook, which may wait or fail; otherwise the files below it."""

    def __init__(self, store: FileStore, hook: Callable[[OpKind, int], None]) -> None:
        self.object_bytes = store.object_bytes
        self.stored_bytes = store.stored_bytes
        self.open = store.open
        self.close = store.close
        self._store = store
        self._hook = hook

    def read(self, block_id: int, buffer: memoryview) -> bool:
        """Read an object."""
        self._hook(OpKind.READ, block_id)
        return self._store.read(block_id, buffer)

    def write(self, block_id: int, buffer: memoryview) -> bool:
        """Write an object."""
        self._hook(OpKind.WRITE, block_id)
        return self._store.write(block_id, buffer)

    def delete(self, block_id: int) -> None:
        """Delete an object."""
        self._hook(OpKind.DELETE, block_id)
        self._store.delete(block_id)


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
    store = FileStore(tmp_path / "objects", NAMESPACE, OBJECT_BYTES)
    store.open()
    return store


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Makes pools that are started, and closes them in the end."""
    pools: list[IoPool] = []

    def make(store: BlockStore, threads: int, arena: DramArena | None = None) -> IoPool:
        pool = IoPool(store, Payload(NAMESPACE, store.stored_bytes), arena, threads)
        pools.append(pool)
        pool.start()
        return pool

    yield make
    for pool in pools:
        pool.close()


def each(kind: OpKind, block_ids: Sequence[int]) -> list[tuple[Op]]:
    """One chain an object."""
    return [(Op(kind, block_id),) for block_id in block_ids]


def run(pool: IoPool, chains: Sequence[Sequence[Op]], lane: Lane = Lane.LOAD) -> list[OpDone]:
    """Run a batch and wait for it."""
    batch = Batch()
    pool.submit(chains, lane, batch)
    return batch.result()


def first_stamp(block_id: int) -> tuple[int, int]:
    """The stamp of an object's first page, worked out from the format's description."""
    key = hashlib.blake2b(f"{NAMESPACE}|{block_id}".encode(), digest_size=16).digest()
    return (int(struct.unpack("<Q", key[:8])[0]), 0)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_round_trip(store: FileStore, make_pool: MakePool, threads: int) -> None:
    """What a batch writes the next one reads, every byte checked, reported in the order of the chains."""
    pool = make_pool(store, threads)
    before_ns = time.perf_counter_ns()
    block_ids = list(range(50))
    written = run(pool, each(OpKind.WRITE, block_ids), Lane.STORE)
    read = run(pool, each(OpKind.READ, block_ids))
    after_ns = time.perf_counter_ns()
    for finished, verified_bytes in ((written, 0), (read, OBJECT_BYTES)):
        assert [done.op.block_id for done in finished] == block_ids
        for done in finished:
            assert done.error is None
            assert done.direct is store.direct
            assert done.verified_bytes == verified_bytes
            assert before_ns <= done.queued_ns <= done.start_ns <= done.end_ns <= after_ns
    assert [done.error for done in run(pool, each(OpKind.DELETE, block_ids))] == [None] * 50
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_many_objects_share_no_page(store: FileStore, make_pool: MakePool) -> None:
    """All 4 KiB pages of 300 objects on storage, written by four threads, differ and do not compress."""
    run(make_pool(store, 4), each(OpKind.WRITE, range(300)), Lane.STORE)
    seen: set[bytes] = set()
    for block_id in range(300):
        data = store.path(block_id).read_bytes()
        assert struct.unpack("<QQ", data[:16]) == first_stamp(block_id)
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
    pool = make_pool(GatedStore(store, lambda kind, block_id: log.append((kind, block_id))), 4)
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
        order = [log.index((op.kind, op.block_id)) for op in chain]
        assert order == sorted(order)
    assert sum(path.is_file() for path in store.root.rglob("*")) == 8


def test_chains_run_at_once_on_threads_of_either_lane(store: FileStore, make_pool: MakePool) -> None:
    """All threads take from a lane when the other is empty: four stores, then four loads, meet in the middle."""
    together = threading.Barrier(4)

    def hook(_kind: OpKind, _block_id: int) -> None:
        together.wait(WAIT_S)

    pool = make_pool(GatedStore(store, hook), 4)
    for kind, lane in ((OpKind.WRITE, Lane.STORE), (OpKind.READ, Lane.LOAD)):
        assert [done.error for done in run(pool, each(kind, range(4)), lane)] == [None] * 4


@pytest.mark.parametrize(("threads", "first"), [(1, OpKind.READ), (2, None)])
def test_loads_come_first_where_threads_prefer_them(
    store: FileStore, make_pool: MakePool, threads: int, first: OpKind | None
) -> None:
    """One thread takes waiting loads before stores that waited longer; of two threads each takes its own lane's."""
    gates = {block_id: threading.Event() for block_id in (100, 101)}
    entered = threading.Semaphore(0)
    log: list[tuple[str, OpKind]] = []

    def hook(kind: OpKind, block_id: int) -> None:
        if block_id in gates:
            entered.release()
            assert gates[block_id].wait(WAIT_S)
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
    assert [block_id for block_id in (1, 2, 10, 11, 12) if store.path(block_id).exists()] == [12]


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

    def hook(_kind: OpKind, block_id: int) -> None:
        if block_id == 1:
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

    def hook(_kind: OpKind, block_id: int) -> None:
        if block_id == 1:
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
    assert [block_id for block_id in range(1, 6) if store.path(block_id).exists()] == [1, 2]
    assert run(pool, each(OpKind.READ, [1, 2]))[1].verified_bytes == OBJECT_BYTES


def test_close_cancels_waits_and_ends_the_threads(store: FileStore, make_pool: MakePool) -> None:
    """Closing skips what waits, lets what runs come to its end, and leaves no thread; a second time does nothing."""
    before = threading.active_count()
    gate, entered = threading.Event(), threading.Event()

    def hook(_kind: OpKind, _block_id: int) -> None:
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
    idle = IoPool(store, Payload(NAMESPACE, OBJECT_BYTES), None, 2)
    idle.submit(each(OpKind.READ, [1]), Lane.LOAD, batch)
    idle.close()
    assert isinstance(batch.result()[0].error, OperationSkippedError)
    pool, closed = make_pool(store, 2), Batch()

    def on_done(finished: list[OpDone]) -> None:
        pool.close()
        closed(finished)

    pool.submit(each(OpKind.WRITE, [1]), Lane.STORE, on_done)
    assert closed.result()[0].error is None


@pytest.mark.parametrize("slot_bytes", [275 * 4096, 1_124_352])
def test_copies_to_and_from_the_arena(tmp_path: Path, make_pool: MakePool, slot_bytes: int) -> None:
    """A payload goes into its slot and comes out of it, padded or not; another object in the slot is an error."""
    store = FileStore(tmp_path, NAMESPACE, 1_124_352)
    arena = DramArena(3, slot_bytes)
    pool = make_pool(store, 2, arena)
    copied = run(pool, [(Op(OpKind.COPY_IN, number, slot=number),) for number in range(3)], Lane.STORE)
    assert all(done.error is None and done.direct is None and done.start_ns < done.end_ns for done in copied)
    for number in range(3):
        assert struct.unpack("<QQ", arena.view(number)[:16]) == first_stamp(number)
        assert len(zlib.compress(bytes(arena.view(number)), level=1)) >= 0.99 * slot_bytes
    back = run(pool, [(Op(OpKind.COPY_OUT, number, slot=number),) for number in range(3)])
    assert [(done.error, done.verified_bytes) for done in back] == [(None, 0)] * 3
    (wrong,) = run(pool, [(Op(OpKind.COPY_OUT, 0, slot=2),)])
    assert isinstance(wrong.error, VerifyError)


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
