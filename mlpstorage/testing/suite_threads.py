"""The conformance suite of block stores, second part: many threads at once."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import pytest

from mlpstorage.config import PAGE_BYTES, Verify
from mlpstorage.storage.base import BlockStore, aligned_memory
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.ops import Chain, IoEngine, Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import IoPool
from mlpstorage.testing.content import difference, make_content, page_problem
from mlpstorage.testing.suite_hooks import (
    OBJECTS,
    WAIT_S,
    OpenStore,
    StoreHooks,
    assert_gone,
    assert_holds,
    has_fixed_room,
    requires,
    write,
)

T = TypeVar("T")

THREADS = 4


class ThreadTests(StoreHooks):
    """Concurrent readers, writers and deleters, and batches through an I/O engine."""

    def test_threads_with_objects_of_their_own(self, store: BlockStore, keys: ObjectKeys) -> None:
        """Threads that write, read and delete different objects do not get in each other's way."""
        rounds = max(self.rounds // 5, 2)

        def work(thread: int) -> None:
            own = range(thread, OBJECTS - THREADS, THREADS)
            for version in range(rounds):
                write(store, keys, own, version)
                assert_holds(store, keys, own, version)
                store.delete(own[0])
                assert store.exists(own) == [False] + [True] * (len(own) - 1)

        _together(work, range(THREADS))
        left = [object_id for object_id in range(OBJECTS - THREADS) if object_id >= THREADS]
        assert sorted(store.listing().object_ids) == left
        assert_holds(store, keys, left, rounds - 1)

    def test_overlapping_reads(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """Threads that read one object at the same time all get all of it."""
        store = open_store(64 * PAGE_BYTES)
        write(store, keys, [1])
        start = threading.Barrier(THREADS)

        def work(_thread: int) -> None:
            start.wait(WAIT_S)
            for _ in range(self.rounds):
                assert_holds(store, keys, [1])

        _together(work, range(THREADS))

    def test_readers_beside_writers(self, store: BlockStore, keys: ObjectKeys) -> None:
        """Objects that nobody changes stay readable while others are written, replaced and deleted."""
        kept, stop = range(4), threading.Event()
        write(store, keys, kept)

        def work(thread: int) -> None:
            if thread:
                while not stop.is_set():
                    assert_holds(store, keys, kept)
                return
            try:
                for version in range(self.rounds):
                    write(store, keys, range(4, 10), version)
                    for object_id in range(4, 10):
                        store.delete(object_id)
            finally:
                stop.set()

        _together(work, range(THREADS))
        assert_holds(store, keys, kept)

    def test_reader_during_delete(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """A reader of an object that is deleted gets all of it or `FileNotFoundError`, never bytes of another."""
        store = open_store(16 * PAGE_BYTES, objects=3 + THREADS)

        def change(version: int) -> None:
            store.delete(1)
            write(store, keys, [2 + version], version)

        for version in range(self.rounds):
            write(store, keys, [1], version)
            contents = [make_content(keys, 1, store.stored_bytes, version)]
            _read_while(store, 1, contents, change, version)
            assert_gone(store, [1])
            store.delete(2 + version)

    def test_reader_during_overwrite(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """A reader of an object that is replaced gets all of one version, or `FileNotFoundError` in between."""
        store = open_store(16 * PAGE_BYTES, objects=3 + THREADS)
        write(store, keys, [1])

        def change(version: int) -> None:
            write(store, keys, [1], version)

        for version in range(1, self.rounds):
            contents = [make_content(keys, 1, store.stored_bytes, one) for one in (version - 1, version)]
            _read_while(store, 1, contents, change, version)
        assert_holds(store, keys, [1], self.rounds - 1)

    def test_writers_of_one_object(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """Two stores on one place that write the same object at once leave one whole version of it."""
        stores = [open_store()]
        requires(stores[0].capabilities, "shared", "holds_data")
        stores.append(open_store())
        start = threading.Barrier(len(stores))

        def work(number: int) -> None:
            start.wait(WAIT_S)
            for version in range(self.rounds):
                write(stores[number], keys, [1], 2 * version + number)

        _together(work, range(len(stores)))
        memory = aligned_memory(stores[0].stored_bytes)
        stores[0].read(1, memory)
        last = [make_content(keys, 1, stores[0].stored_bytes, 2 * self.rounds - 1 - number) for number in range(2)]
        assert bytes(memory) in last
        write(stores[1], keys, [1], 2 * self.rounds)
        assert_holds(stores[0], keys, [1], 2 * self.rounds)
        assert stores[1].listing().object_ids == (1,)

    def test_full_store_beside_threads(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """Threads that fill a store with a fixed number of places get as many as there are, and no place twice."""
        places = 8
        store = open_store(objects=places)
        if not has_fixed_room(store, places):
            pytest.skip("the store has no fixed number of places")

        def work(object_id: int) -> int | None:
            try:
                write(store, keys, [object_id])
            except OSError:
                return None
            return object_id

        written = [one for one in _together(work, range(places + THREADS)) if one is not None]
        assert len(written) == places
        assert sorted(store.listing().object_ids) == sorted(written)
        assert_holds(store, keys, written)

    def test_batches_through_an_engine(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """A batch of an I/O engine writes whole, stamped objects, reads what the suite wrote, and deletes."""
        store, ids = open_store(1_124_352), range(8)
        holds_data = store.capabilities.holds_data
        payload = Payload(keys, store.stored_bytes, Verify.FULL if holds_data else Verify.OFF, buffers=THREADS)
        engine = IoPool(store, payload, None, THREADS)
        engine.start()
        try:
            written = _batch(engine, [(Op(OpKind.WRITE, one), Op(OpKind.SYNC, one)) for one in ids], Lane.STORE)
            assert [done.error for done in written] == [None] * 16
            memory = aligned_memory(store.stored_bytes)
            for one in ids if holds_data else ():
                store.read(one, memory)
                assert page_problem(memory, keys.stamp(one)) is None
            write(store, keys, ids)
            read = _batch(engine, [(Op(OpKind.READ, one),) for one in (*ids, 99)], Lane.LOAD)
            assert [type(done.error) for done in read] == [type(None)] * 8 + [FileNotFoundError]
            assert [done.verified_bytes for done in read] == [store.stored_bytes * holds_data] * 8 + [0]
            deleted = _batch(engine, [(Op(OpKind.DELETE, one),) for one in ids], Lane.STORE)
            assert [done.error for done in deleted] == [None] * 8
        finally:
            engine.close()
        assert_gone(store, ids)


def _batch(engine: IoEngine, chains: Sequence[Chain], lane: Lane) -> list[OpDone]:
    """Hand over a batch and wait for it."""
    finished: SimpleQueue[list[OpDone]] = SimpleQueue()
    engine.submit(chains, lane, finished.put)
    return finished.get(timeout=WAIT_S)


def _read_while(
    store: BlockStore, object_id: int, contents: Sequence[bytes], change: Callable[[int], None], version: int
) -> None:
    """Read an object in several threads while `change` is at work; what they get must be one of `contents`."""
    changed, reading = threading.Event(), threading.Barrier(THREADS)

    def work(thread: int) -> None:
        memory = aligned_memory(store.stored_bytes)
        reading.wait(WAIT_S)
        if not thread:
            try:
                change(version)
            finally:
                changed.set()
            return
        last = False
        while not last:
            last = changed.is_set()
            try:
                store.read(object_id, memory)
            except FileNotFoundError:
                continue
            if store.capabilities.holds_data:
                assert bytes(memory) in contents, difference(memory, contents[0])

    _together(work, range(THREADS))


def _together(work: Callable[[int], T], arguments: Sequence[int]) -> list[T]:
    """Call `work` with each argument, all at once; the first failure is raised when all have ended."""
    with ThreadPoolExecutor(len(arguments)) as threads:
        return [one.result() for one in [threads.submit(work, argument) for argument in arguments]]
