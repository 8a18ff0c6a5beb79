"""Ranks that share a directory: each an engine of its own over real threads and files, all in one event loop."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import Verify, WriteSync
from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.existence import ExistenceThreads
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.threaded_io import ThreadedIO
from mlpstorage.measure.clock import NS, MonotonicClock
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.payload import Payload, WriteNumbers
from mlpstorage.storage.pool import IoPool
from mlpstorage.testing.engine_bench import PLAIN, request

OBJECT_BYTES = 2 * 4096
KEYS = ObjectKeys("tiny|0|0", "tiny|1|0")
CONFIG = replace(PLAIN, kv_ranks=2, object_bytes=OBJECT_BYTES, storage_blocks=8)


@dataclass(slots=True)
class Rank:
    """One rank's engine on a directory that others use, too."""

    engine: Engine
    recorder: Recorder
    failures: list[Exception]

    async def ask(self, *block_ids: int) -> tuple[int, int]:
        """Serve a request, let its writes end; returns the blocks it found, and those of them that others wrote."""
        found = self.recorder.total_requests
        before = found.hit_blocks.gpu + found.hit_blocks.cpu + found.hit_blocks.storage, found.cross_rank_blocks
        await self.engine.serve(request(block_ids, 4 * len(block_ids) + 1), MonotonicClock().now_ns())
        await self.engine.settle()
        after = found.hit_blocks.gpu + found.hit_blocks.cpu + found.hit_blocks.storage, found.cross_rank_blocks
        return after[0] - before[0], after[1] - before[1]


@dataclass(slots=True)
class Ranks:
    """A directory and the ranks on it, all of which must end with the expected failures alone, mostly none."""

    directory: Path
    config: EngineConfig = CONFIG
    failures: set[type[Exception]] = field(default_factory=set)
    ranks: list[Rank] = field(default_factory=list)

    def run(self, work: Callable[..., Awaitable[None]], ranks: int = 2) -> None:
        """Do work with so many ranks."""
        asyncio.run(self._run(work, ranks))

    def files(self, block_id: int) -> list[Path]:
        """The files of a block's objects, and of what is being written of them."""
        names = [KEYS.name(object_id) for object_id in KEYS.block_objects(block_id)]
        return [path for name in names for path in self.directory.rglob(f"*{name}*")]

    async def _run(self, work: Callable[..., Awaitable[None]], ranks: int) -> None:
        with contextlib.ExitStack() as cleanup:
            for _ in range(ranks):
                self.ranks.append(self._open(cleanup))
            await work(*self.ranks)
        for rank in self.ranks:
            assert {type(failure) for failure in rank.failures} == self.failures
            assert rank.recorder.total_requests.completed > 0
            assert bool(rank.recorder.total.io_errors) == bool(self.failures)

    def _open(self, cleanup: contextlib.ExitStack) -> Rank:
        store = FileStore(self.directory, KEYS, OBJECT_BYTES)
        store.open()
        payload = Payload(KEYS, store.stored_bytes, Verify.FULL, buffers=2, writes=WriteNumbers(shared=True))
        arena = DramArena(self.config.cpu_blocks, self.config.kv_ranks * store.stored_bytes)
        pool = IoPool(store, payload, arena, 2)
        existence = ExistenceThreads(store, self.config.kv_ranks)
        for part in (pool, existence):
            part.start()
            cleanup.callback(part.close)
        recorder = Recorder(
            object_bytes=OBJECT_BYTES,
            stored_bytes=store.stored_bytes,
            ttft_target_ns=NS,
            window_ns=(0, 1 << 62),
            shared=True,
        )
        failures: list[Exception] = []
        engine = Engine(
            self.config,
            blocks=ThreadedIO(pool, recorder.operations),
            arena=arena,
            recorder=recorder,
            clock=MonotonicClock(),
            on_failure=failures.append,
            existence=existence,
        )
        return Rank(engine, recorder, failures)


@pytest.fixture
def shared(tmp_path: Path) -> Ranks:
    """An empty directory, and as yet no ranks."""
    (tmp_path / "objects").mkdir()
    return Ranks(tmp_path / "objects")


def test_a_rank_finds_what_another_has_written(shared: Ranks) -> None:
    """The leading run goes on into blocks of the other rank, and back into its own; only the others' are cross-rank."""

    async def work(one: Rank, other: Rank) -> None:
        assert await one.ask(1, 2) == (0, 0)
        assert await other.ask(1, 2, 3) == (2, 2)
        assert await one.ask(1, 2, 3, 4) == (3, 1)

    shared.run(work)
    assert all(len(shared.files(block)) == 2 for block in (1, 2, 3, 4))
    one, other = shared.ranks
    assert (one.recorder.total.write_ops, other.recorder.total.write_ops) == (6, 2)
    assert other.recorder.total_requests.cross_rank_tokens == 8
    assert other.recorder.latency["existence_check"].count == 2
    # Each request of the other rank has one look-up, in which a question lies.
    assert other.recorder.latency["lookup"].sum_ns > other.recorder.latency["existence_check"].min_ns  # type: ignore[operator]


def test_what_is_known_is_not_asked_for_again(shared: Ranks) -> None:
    """A rank asks for the blocks behind those that it knows, and for none when it knows all."""

    async def work(one: Rank, other: Rank) -> None:
        await one.ask(1, 2, 3)
        await other.ask(1, 2, 3)
        asked = other.recorder.total.exists_ops
        assert asked == 6
        assert await other.ask(1, 2, 3) == (3, 3)
        assert other.recorder.total.exists_ops == asked
        # The fourth: once when it is looked up, once more before it is written.
        assert await other.ask(1, 2, 3, 4) == (3, 3)
        assert other.recorder.total.exists_ops == asked + 4

    shared.run(work)


def test_the_same_block_is_written_once(shared: Ranks) -> None:
    """A rank that computed what another has written meanwhile does not write it, nor count it as its own."""

    async def work(one: Rank, other: Rank) -> None:
        await one.ask(9, 1)
        # Behind the missing 8 nothing is looked for, so that 9 and 1 count as computed.
        assert await other.ask(8, 9, 1) == (0, 0)
        assert await other.ask(9, 1) == (2, 2)

    shared.run(work)
    other = shared.ranks[1].recorder.total
    assert (other.write_ops, other.dedup_skipped_bytes) == (2, 4 * OBJECT_BYTES)


def test_a_block_that_is_gone_is_a_miss_found_late(shared: Ranks) -> None:
    """The blocks before it are used, it and those behind it are computed and written anew; nothing fails."""

    async def work(one: Rank, other: Rank) -> None:
        await one.ask(1, 2, 3, 4)
        assert await other.ask(1, 2, 3, 4) == (4, 4)
        for path in shared.files(3):
            path.unlink()
        assert await other.ask(1, 2, 3, 4) == (2, 2)
        # It is this rank's own now; that it is not the first rank's any more that one does not know.
        assert await other.ask(1, 2, 3, 4) == (4, 3)
        assert await one.ask(1, 2, 3, 4) == (4, 0)

    shared.run(work)
    counted = shared.ranks[1].recorder.total
    assert counted.reads_gone == 2
    assert counted.write_ops == 2
    assert shared.ranks[1].recorder.total_requests.failed == 0


@pytest.mark.parametrize("load_batch", [0, 3])
def test_what_is_read_in_order_ends_where_a_block_is_gone(shared: Ranks, load_batch: int) -> None:
    """Reads that are skipped behind one that is gone fail no request, either."""
    shared.config = replace(CONFIG, load_batch=load_batch)

    async def work(one: Rank, other: Rank) -> None:
        await one.ask(1, 2, 3, 4)
        await other.ask(1, 2, 3, 4)
        shared.files(2)[0].unlink()
        assert await other.ask(1, 2, 3, 4) == (1, 1)

    shared.run(work)
    assert shared.ranks[1].recorder.total.reads_gone == 1


def test_a_rank_survives_the_loss_of_its_own_blocks(shared: Ranks) -> None:
    """Two ranks may own a block, and the first that evicts it deletes it: the other computes and writes it again."""

    async def work(one: Rank, other: Rank) -> None:
        await other.ask(50)
        await one.ask(1, 2)
        for path in shared.files(2):
            path.unlink()
        assert await one.ask(1, 2) == (1, 0)
        assert len(shared.files(2)) == 2
        assert await one.ask(1, 2) == (2, 0)

    shared.run(work)


def test_each_rank_makes_room_among_its_own_blocks(shared: Ranks) -> None:
    """A full rank deletes the oldest block that it wrote, not the one that it read; the other finds out."""
    shared.config = replace(CONFIG, storage_blocks=2)

    async def work(one: Rank, other: Rank) -> None:
        await one.ask(1, 2)
        await other.ask(1)
        await other.ask(11, 12)
        assert await other.ask(1) == (1, 1)
        await other.ask(13)
        assert [len(shared.files(block)) for block in (1, 2, 11, 12, 13)] == [2, 2, 2, 0, 2]
        await one.ask(3, 4)
        assert [len(shared.files(block)) for block in (1, 2, 3, 4)] == [0, 0, 2, 2]
        # It takes the first block to be there still.
        assert await other.ask(1) == (0, 0)
        assert len(shared.files(1)) == 2

    shared.run(work)
    one, other = (rank.recorder.total for rank in shared.ranks)
    assert (one.delete_ops, one.deletes_gone) == (4, 0)
    assert (other.reads_gone, other.deletes_gone) == (2, 0)


def test_a_delete_of_what_is_gone_fails_nothing(shared: Ranks) -> None:
    """It is counted apart, and its room is free."""
    shared.config = replace(CONFIG, storage_blocks=2)

    async def work(one: Rank, other: Rank) -> None:
        await other.ask(50)
        await one.ask(1, 2)
        for path in (*shared.files(1), *shared.files(2)):
            path.unlink()
        await one.ask(3, 4)
        assert await one.ask(3, 4) == (2, 0)

    shared.run(work)
    one = shared.ranks[0].recorder.total
    assert (one.delete_ops, one.deletes_gone) == (0, 4)


def test_a_block_that_another_rank_replaced_is_right(shared: Ranks) -> None:
    """Who wrote an object last cannot be known: any whole version of it is right, also of what this rank wrote."""

    async def work(one: Rank, other: Rank) -> None:
        await one.ask(1)
        for path in shared.files(1):
            path.rename(path.with_suffix(".away"))
        await other.ask(1)
        assert await one.ask(1) == (1, 0)
        assert await other.ask(1) == (1, 0)
        for path in shared.directory.rglob("*.away"):
            path.rename(path.with_suffix(""))
        assert await one.ask(1) == (1, 0)
        assert await other.ask(1) == (1, 0)

    shared.run(work)
    assert all(rank.recorder.verify_failures == 0 for rank in shared.ranks)


def test_wrong_data_of_another_rank_is_computed_and_written_again(shared: Ranks) -> None:
    """The request fails once; the block is not looked for again, but replaced by this rank's own."""

    async def work(one: Rank, other: Rank) -> None:
        await one.ask(1, 2)
        path = shared.files(2)[0]
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
        assert await other.ask(1, 2) == (0, 0)
        assert other.recorder.total_requests.failed == 1
        assert path.read_bytes() == content
        assert await other.ask(1, 2) == (1, 1)
        assert await other.ask(1, 2) == (2, 1)
        assert await one.ask(1, 2) == (2, 0)

    shared.run(work)
    assert [rank.recorder.total.verify_errors for rank in shared.ranks] == [0, 1]


def test_a_storage_that_cannot_tell_fails_the_run(shared: Ranks) -> None:
    """The request itself goes on as if nothing were there; the question's failure and the write's are reported."""

    async def work(one: Rank) -> None:
        shared.directory.rename(shared.directory.with_name("away"))
        shared.directory.write_text("no directory")
        assert await one.ask(1) == (0, 0)

    shared.failures = {NotADirectoryError}
    shared.run(work, ranks=1)
    # Two questions, and the writes of the block's two objects.
    assert len(shared.ranks[0].failures) == 4


def test_many_ranks_that_share_prefixes_agree(shared: Ranks) -> None:
    """Three ranks with little room, at the same time, over the same chains: no failure, and their room is kept."""
    shared.config = replace(CONFIG, storage_blocks=5, cpu_blocks=1, write_sync=WriteSync.BATCH, write_batch=2)

    async def serve(rank: Rank, first: int) -> None:
        for turn in range(24):
            chain = [(first + turn) % 5 * 10 + place for place in range(1 + turn % 4)]
            await rank.engine.serve(request(chain, 4 * len(chain) + 1), MonotonicClock().now_ns())

    async def work(*ranks: Rank) -> None:
        await asyncio.gather(*(serve(rank, number) for number, rank in enumerate(ranks)))
        for rank in ranks:
            await rank.engine.settle()
        assert sum(rank.engine.stored_blocks for rank in ranks) <= 15

    shared.run(work, ranks=3)
    assert all(rank.recorder.total_requests.completed == 24 for rank in shared.ranks)
    assert all(rank.recorder.verify_failures == 0 for rank in shared.ranks)
    assert sum(rank.recorder.total_requests.cross_rank_blocks for rank in shared.ranks) > 0
    assert len(list(shared.directory.rglob("*.tmp"))) == 0
    assert len([path for path in shared.directory.rglob("*") if path.is_file()]) <= 2 * 15


@settings(max_examples=30, deadline=None)
@given(there=st.integers(0, 60), behind=st.integers(0, 60), kv_ranks=st.integers(1, 2))
def test_a_miss_costs_few_questions(
    tmp_path_factory: pytest.TempPathFactory, there: int, behind: int, kv_ranks: int
) -> None:
    """Of a chain of which n blocks are there, at most 2 n + 4 are looked for, and never more than it has."""
    keys = ObjectKeys(*(f"x|{part}|0" for part in range(kv_ranks)))
    store = FileStore(tmp_path_factory.mktemp("s") / "objects", keys, 4096, levels=())
    store.open()
    for object_id in range(there * kv_ranks):
        store.path(object_id).touch()
    existence = ExistenceThreads(store, kv_ranks)
    existence.start()
    answer = asyncio.run(existence.leading(range(there + behind)))
    existence.close()
    assert answer.block_ids == list(range(there))
    assert answer.objects <= min(2 * there + 4, there + behind) * kv_ranks
    assert answer.objects >= min(there + 1, there + behind) * kv_ranks
