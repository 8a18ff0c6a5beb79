"""The storage tier's policies on virtual time: what makes room, what is taken over, what is wrong."""

import asyncio
import random
import tracemalloc
from dataclasses import replace

import pytest

from mlpstorage.config import Eviction, StorePolicy, TouchOrder
from mlpstorage.kvcache.block_io import Behind
from mlpstorage.kvcache.operations import OperationsDigest
from mlpstorage.kvcache.other_ranks import OtherRanks
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.storage_tier import USED_BEFORE_BLOCKS, StorageTier
from mlpstorage.storage.ops import OpKind
from mlpstorage.storage.payload import VerifyError
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench, now_ns, sleep_ms
from mlpstorage.testing.virtual import ModelledIO, VirtualClock, run_virtual

WRONG = VerifyError("object", 0, (1, 0), (2, 0))


# Eviction


@pytest.mark.parametrize("touch", TouchOrder)
def test_without_eviction_new_blocks_are_dropped_and_nothing_is_deleted(touch: TouchOrder) -> None:
    """A tier of four keeps the heads of the first chains, in either order of touch, and finds them for ever."""
    bench = EngineBench(replace(PLAIN, storage_blocks=4, eviction=Eviction.NONE, touch=touch))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(3, 4, 5, 6, 7)
        assert bench.io.stored == {1, 2, 3, 4}
        await bench.ask_and_settle(8)
        assert await bench.ask_and_settle(1, 2) == 2
        assert await bench.ask_and_settle(3, 4, 5) == 2

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == []
    # 5 to 7, 8, and 5 once more.
    assert bench.recorder.window.writes_dropped == 5
    assert bench.io.most_stored == 4
    assert bench.io.misuses == []


def test_without_eviction_a_chain_longer_than_the_tier_keeps_its_head() -> None:
    """Head first too, where with eviction it would keep its tail: a tail alone is useless, and would stay for ever."""
    config = replace(PLAIN, storage_blocks=3, eviction=Eviction.NONE, touch=TouchOrder.HEAD)
    bench = EngineBench(config)
    run_virtual(bench.ask_and_settle(1, 2, 3, 4, 5))
    assert bench.io.stored == {1, 2, 3}
    assert bench.recorder.window.writes_dropped == 2


def test_a_tier_above_its_watermark_evicts_down_to_the_lower_one_in_one_batch() -> None:
    """Capacity 10, above 0.8, to 0.5: nine blocks would be too many, so the four oldest go and five are left."""
    bench = EngineBench(
        replace(PLAIN, storage_blocks=10, evict_above=0.8, evict_to=0.5),
        ModelledIO(latency_ns={OpKind.DELETE: 3 * MS, OpKind.WRITE: 7 * MS}),
    )

    async def play() -> None:
        for block_id in range(8):
            await bench.ask_and_settle(block_id)
        assert bench.ids(OpKind.DELETE) == []
        await bench.ask_and_settle(8)

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [0, 1, 2, 3]
    assert bench.io.stored == {4, 5, 6, 7, 8}
    (queued_ns,) = {done.queued_ns for done in bench.io.done_of(OpKind.DELETE)}
    # There is room up to the capacity: the write does not wait for the deletes, which begin with it.
    assert bench.times_ms(OpKind.WRITE)[-1] == (queued_ns / MS, queued_ns / MS + 7)


def test_a_tier_between_its_watermarks_waits_for_deletes_only_where_it_would_be_over_full() -> None:
    """Deletes of 100 ms: four more blocks at once have no room beside the five that are still being deleted."""
    bench = EngineBench(
        replace(PLAIN, storage_blocks=10, evict_above=0.9, evict_to=0.5),
        ModelledIO(latency_ns={OpKind.DELETE: 100 * MS}),
    )

    async def play() -> None:
        await bench.ask_and_settle(*range(9))
        await bench.ask(20)
        await sleep_ms(1)
        assert bench.ids(OpKind.WRITE)[-1] == 20
        assert bench.engine.stored_blocks == 5
        await bench.ask(30, 31, 32, 33)
        await bench.engine.settle()
        assert now_ns() == 100 * MS

    run_virtual(play())
    assert len(bench.ids(OpKind.DELETE)) == 5
    assert bench.times_ms(OpKind.WRITE)[-4:] == [(100, 100)] * 4
    assert bench.io.most_stored == 10
    assert bench.engine.stored_blocks == 9


@pytest.mark.parametrize(
    ("above", "to", "most", "left"), [(0.29, 0.29, 29, 29), (0.7, 0.07, 70, 7), (1.0, 0.0, 100, 1), (0.001, 0.0, 1, 1)]
)
def test_watermarks_are_whole_blocks(above: float, to: float, most: int, left: int) -> None:
    """0.29 of 100 are 29 although the float product is below; a tier holds at least the block that it takes."""
    bench = EngineBench(replace(PLAIN, storage_blocks=100, evict_above=above, evict_to=to))

    async def play() -> None:
        for block_id in range(most):
            await bench.ask_and_settle(block_id)
        assert bench.engine.stored_blocks == most
        await bench.ask_and_settle(1000)

    run_virtual(play())
    assert bench.engine.stored_blocks == left
    assert 1000 in bench.io.stored


def test_the_head_is_taken_where_others_leave_no_room_for_the_whole_chain() -> None:
    """Two of four blocks are being read: a chain of three pushes out the other two, and keeps its head."""
    bench = EngineBench(replace(PLAIN, storage_blocks=4), ModelledIO(latency_ns={OpKind.READ: 100 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(3, 4)
        loading = asyncio.create_task(bench.ask(1, 2))
        await sleep_ms(1)
        await bench.ask_and_settle(5, 6, 7)
        assert bench.io.stored == {1, 2, 5, 6}
        await loading

    run_virtual(play())
    assert bench.recorder.window.writes_dropped == 1
    assert bench.io.misuses == []


def test_a_chain_makes_no_room_for_its_own_tail() -> None:
    """All else in the tier is being read: the new tail is dropped, where it could only push out its own head."""
    bench = EngineBench(replace(PLAIN, storage_blocks=3), ModelledIO(latency_ns={OpKind.READ: 100 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(9)
        loading = [asyncio.create_task(bench.ask(9)), asyncio.create_task(bench.ask(1, 2, 3))]
        await sleep_ms(99)
        loading.append(asyncio.create_task(bench.ask(9)))
        await asyncio.gather(*loading)
        await bench.engine.settle()

    run_virtual(play())
    assert bench.io.stored == {1, 2, 9}
    assert bench.recorder.window.writes_dropped == 1
    assert bench.io.misuses == []


# What was there before


def test_blocks_of_an_earlier_run_are_found_and_the_oldest_leave_first() -> None:
    """Three adopted, the least recent first, in a tier of three: a new block pushes out the first of them."""
    bench = EngineBench(replace(PLAIN, storage_blocks=3, kv_ranks=2), ModelledIO(stored=set(range(2, 8))))

    async def play() -> None:
        bench.engine.adopt((1, 2, 3))
        await bench.engine.settle()
        assert await bench.ask_and_settle(2) == 1
        assert await bench.ask_and_settle(9) == 0
        assert sorted(bench.engine.stored_objects()) == [4, 5, 6, 7, 18, 19]

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [2, 3]
    assert bench.io.misuses == []


def test_more_blocks_of_an_earlier_run_than_fit_are_deleted() -> None:
    """Of five the oldest two go, in one batch of measured deletes."""
    bench = EngineBench(replace(PLAIN, storage_blocks=3), ModelledIO(stored={1, 2, 3, 4, 5}))

    async def play() -> None:
        bench.engine.adopt((5, 4, 3, 2, 1))
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [5, 4]
    assert bench.recorder.total.delete_ops == 2
    assert bench.engine.stored_blocks == 3
    assert bench.io.misuses == []


# Parts of a block


def test_a_block_is_one_object_a_kv_rank_in_every_operation() -> None:
    """Four kv ranks: block 5 is objects 20 to 23, written, read and deleted as four, and one block throughout."""
    bench = EngineBench(replace(PLAIN, storage_blocks=1, kv_ranks=4))

    async def play() -> None:
        await bench.ask_and_settle(5)
        assert bench.engine.stored_blocks == 1
        assert await bench.ask_and_settle(5) == 1
        await bench.ask_and_settle(6)

    run_virtual(play())
    assert bench.ids(OpKind.READ) == bench.ids(OpKind.DELETE) == [20, 21, 22, 23]
    assert bench.ids(OpKind.WRITE) == [20, 21, 22, 23, 24, 25, 26, 27]
    counted = bench.recorder.window
    assert (counted.read_ops, counted.write_ops, counted.delete_ops) == (4, 8, 4)
    assert (counted.read_bytes, counted.written_bytes, counted.deleted_bytes) == (4 * 4096, 8 * 4096, 4 * 4096)
    assert bench.recorder.requests.hit_blocks.storage == 1
    assert bench.recorder.latency["write_behind"].count == 2
    assert bench.io.most_stored == 4


def test_a_block_is_not_there_before_its_last_object() -> None:
    """One thread writes two objects of 10 ms each: at 15 ms the block has one of them and is not found."""
    bench = EngineBench(replace(PLAIN, kv_ranks=2), ModelledIO(servers=1, latency_ns={OpKind.WRITE: 10 * MS}))

    async def play() -> None:
        await bench.ask(1)
        await sleep_ms(15)
        assert bench.io.stored == {2}
        assert bench.engine.stored_blocks == 0
        await sleep_ms(10)
        assert bench.engine.stored_blocks == 1

    run_virtual(play())


def test_where_one_object_cannot_be_written_the_others_are_deleted_again() -> None:
    """The second of three objects of block 1 fails: the block is dropped, the room is free, block 2 is whole."""
    error = OSError(28, "No space left on device")
    bench = EngineBench(replace(PLAIN, kv_ranks=3, storage_blocks=2), ModelledIO(failures={(OpKind.WRITE, 2): error}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        assert bench.io.stored == {6, 7, 8}
        assert bench.ids(OpKind.DELETE) == [3, 5]
        assert bench.recorder.window.writes_dropped == 1
        await bench.ask_and_settle(3)

    run_virtual(play())
    assert bench.failures == [error]
    assert bench.io.stored == {6, 7, 8, 9, 10, 11}
    assert bench.io.misuses == []


def test_a_block_in_dram_has_one_slot_for_all_its_objects() -> None:
    """Two kv ranks: two copies in, two out, one slot of the tier's one."""
    bench = EngineBench(replace(PLAIN, cpu_blocks=1, kv_ranks=2))

    async def play() -> None:
        await bench.ask_and_settle(1)
        assert bench.arena.used_slots == bench.engine.cpu_blocks == 1
        assert await bench.ask_and_settle(1) == 1

    run_virtual(play())
    assert bench.ids(OpKind.COPY_IN) == bench.ids(OpKind.COPY_OUT) == [2, 3]
    assert {done.op.slot for done in bench.io.done_of(OpKind.COPY_OUT)} == {0}
    assert bench.recorder.requests.hit_blocks.cpu == 1
    assert bench.ids(OpKind.READ) == []


# Wrong data


def test_a_block_with_wrong_data_is_forgotten_and_deleted_and_the_run_goes_on() -> None:
    """The second object of block 1 is wrong: its request fails, both objects go, and the next request rewrites it."""
    bench = EngineBench(replace(PLAIN, kv_ranks=2), ModelledIO(failures={(OpKind.READ, 2): WRONG}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(1, 2, 3)
        assert bench.io.stored == {4, 5}
        assert bench.engine.stored_blocks == 1
        assert await bench.ask_and_settle(1, 2) == 0
        assert await bench.ask_and_settle(1, 2) == 2

    run_virtual(play())
    assert bench.failures == bench.io.misuses == []
    assert (bench.recorder.requests.failed, bench.recorder.requests.completed) == (1, 3)
    assert bench.recorder.verify_failures == bench.recorder.window.verify_errors == 1
    assert bench.recorder.failures == [str(WRONG)]
    assert bench.ids(OpKind.DELETE) == [2, 3]


def test_a_block_with_wrong_data_is_not_deleted_under_another_reader() -> None:
    """The first finds it wrong at 10 ms, the second reads it from 5 to 15 ms and finds it right: the delete waits.

    The second request then writes the block again, as one that it has and storage has not.
    """
    io = ModelledIO(latency_ns={OpKind.READ: 10 * MS}, failures={(OpKind.READ, 1): WRONG})
    bench = EngineBench(replace(PLAIN, storage_blocks=1), io)

    async def play() -> None:
        await bench.ask_and_settle(1)
        first = asyncio.create_task(bench.ask(1))
        await sleep_ms(5)
        second = asyncio.create_task(bench.ask(1))
        await sleep_ms(6)
        assert bench.engine.stored_blocks == 0
        assert bench.io.stored == {1}
        await asyncio.gather(first, second)
        await bench.engine.settle()

    run_virtual(play())
    assert bench.times_ms(OpKind.DELETE) == [(15, 15)]
    assert bench.times_ms(OpKind.WRITE) == [(0, 0), (15, 15)]
    assert bench.io.stored == {1}
    assert bench.io.misuses == []
    assert (bench.recorder.requests.failed, bench.recorder.requests.completed) == (1, 2)


def test_a_block_with_wrong_data_in_dram_is_forgotten_there_alone() -> None:
    """The copy fails, and its slot is free; storage still has the block."""
    io = ModelledIO(failures={(OpKind.COPY_OUT, 1): WRONG})
    bench = EngineBench(replace(PLAIN, cpu_blocks=1), io)

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask_and_settle(1)
        assert bench.engine.cpu_blocks == bench.arena.used_slots == 0
        assert await bench.ask_and_settle(1) == 1

    run_virtual(play())
    assert bench.ids(OpKind.READ) == [1]
    assert bench.recorder.verify_failures == bench.recorder.requests.failed == 1
    assert bench.recorder.window.verify_errors == 0
    assert bench.failures == bench.io.misuses == []


def test_a_block_in_dram_stays_while_it_is_copied() -> None:
    """A tier of one whose block is copied to 100 ms: another request's block finds no place there."""
    bench = EngineBench(replace(PLAIN, cpu_blocks=1), ModelledIO(latency_ns={OpKind.COPY_OUT: 100 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1)
        copying = asyncio.create_task(bench.ask(1))
        await sleep_ms(50)
        await bench.ask_and_settle(2)
        assert bench.io.slots == {0: 1}
        await copying
        await bench.ask_and_settle(2)
        assert bench.io.slots == {0: 2}

    run_virtual(play())
    assert bench.io.misuses == bench.failures == []


# Memory


def test_a_million_blocks_on_storage_take_less_than_400_bytes_each() -> None:
    """All that the engine keeps of a block that lies on storage, its id included."""
    blocks = 1_000_000
    draw = random.Random(1)  # noqa: S311 - ids like those of a hash, no secret
    tracemalloc.start()
    engine = EngineBench(replace(PLAIN, storage_blocks=blocks)).engine
    before_bytes, _ = tracemalloc.get_traced_memory()
    for _ in range(0, blocks, 1000):
        engine.adopt([draw.getrandbits(63) for _ in range(1000)])
    used_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
    tracemalloc.stop()
    assert engine.stored_blocks == blocks
    assert 50 * blocks < used_bytes < 400 * blocks


# The memory of uses


def test_uses_are_remembered_of_so_many_blocks_and_no_more() -> None:
    """The oldest use is forgotten for the newest: that block's next use counts as its first."""
    config = replace(PLAIN, store_policy=StorePolicy.SECOND_USE)
    behind = Behind(ModelledIO(), lambda _: None)
    recorder = Recorder(object_bytes=4096, stored_bytes=4096, ttft_target_ns=0)
    nobody = OtherRanks(None, behind=behind, recorder=recorder, clock=VirtualClock())
    tier = StorageTier(config, behind, OperationsDigest(), nobody)
    assert not any(tier.used_before(block_id) for block_id in range(USED_BEFORE_BLOCKS))
    assert tier.used_before(1)
    assert not tier.used_before(-1)
    assert tier.used_before(1)
    assert not tier.used_before(0)
