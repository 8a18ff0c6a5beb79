"""Where the kernel lets I/O threads run; asked of the kernel itself, inside their operations."""

import os
import threading
from pathlib import Path

import pytest

from mlpstorage.config import MIB, PAGE_BYTES
from mlpstorage.storage.affinity import SharedCpu
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import Moved
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.ops import Lane, Op, OpDone, OpKind
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import IoPool

KEYS = ObjectKeys("tiny-1b|0|full")
CPUS = sorted(os.sched_getaffinity(0))
WAIT_S = 60


class WatchedStore(FileStore):
    """A store of files that notes where its writes may run."""

    seen: set[frozenset[int]]

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.write`."""
        self.seen.add(frozenset(os.sched_getaffinity(0)))
        return super().write(object_id, buffer)


def where_writes_run(tmp_path: Path, cpu: SharedCpu | None, *kinds: OpKind, object_bytes: int = PAGE_BYTES) -> set[int]:
    """The CPUs on which writes may run, in chains of `kinds`; they must be the same for all threads."""
    store = WatchedStore(tmp_path / "objects", KEYS, object_bytes)
    store.seen = set()
    store.open()
    arena, over, done = DramArena(1, store.stored_bytes), threading.Event(), list[OpDone]()
    pool = IoPool(store, Payload(KEYS, store.stored_bytes, buffers=4), arena, 4, cpu=cpu)

    def on_done(finished: list[OpDone]) -> None:
        done.extend(finished)
        over.set()

    pool.start()
    pool.submit([[Op(kind, number, 0) for kind in kinds] for number in range(8)], Lane.STORE, on_done)
    assert over.wait(WAIT_S)
    pool.close()
    arena.close()
    assert [one.error for one in done] == [None] * 8 * len(kinds)
    assert len(store.seen) == 1
    return set(store.seen.pop())


@pytest.mark.parametrize("number", [0, 1, 2, len(CPUS)])
def test_threads_of_a_rank_share_a_cpu(tmp_path: Path, number: int) -> None:
    """The highest for the first rank of a host, the next lower for the next, and from the top again."""
    assert where_writes_run(tmp_path, SharedCpu(number), OpKind.WRITE) == {CPUS[::-1][number % len(CPUS)]}
    assert sorted(os.sched_getaffinity(0)) == CPUS, "no other thread moves"


def test_threads_without_one_run_anywhere(tmp_path: Path) -> None:
    """As the system puts them."""
    assert where_writes_run(tmp_path, None, OpKind.WRITE) == set(CPUS)


@pytest.mark.parametrize(
    ("object_bytes", "cpus"), [(PAGE_BYTES, CPUS[-1:]), (MIB, CPUS)], ids=["small copies", "large copies"]
)
def test_large_copies_run_anywhere(tmp_path: Path, object_bytes: int, cpus: list[int]) -> None:
    """And what stands in one chain with them; afterwards the threads share their CPU again."""
    cpu, chain = SharedCpu(0), (OpKind.COPY_IN, OpKind.WRITE)
    assert where_writes_run(tmp_path, cpu, *chain, object_bytes=object_bytes) == set(cpus)
    assert where_writes_run(tmp_path, cpu, OpKind.WRITE, object_bytes=object_bytes) == set(CPUS[-1:])


def test_a_cpu_that_was_taken_away(tmp_path: Path) -> None:
    """Threads of a process that was confined to other CPUs meanwhile go on where they may."""
    cpu = SharedCpu(0)
    cpu._one = frozenset({max(CPUS) + 1_000_000})
    assert where_writes_run(tmp_path, cpu, OpKind.WRITE) == set(CPUS)
