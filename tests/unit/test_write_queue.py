"""The queue of new blocks: its bound, what overflows it, batches, intervals and syncs, on virtual time."""

import asyncio
from dataclasses import replace

from mlpstorage.config import Decisions, GenerationMode, WriteOverflow, WriteSync
from mlpstorage.kvcache.write_queue import WriteGate, WriteRate
from mlpstorage.storage.ops import OpKind
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench, now_ns, sleep_ms
from mlpstorage.testing.virtual import ModelledIO, VirtualClock, run_virtual

DROPS = replace(PLAIN, write_overflow=WriteOverflow.DROP)


def one_writer(write_ms: int = 10) -> ModelledIO:
    """One thread."""
    return ModelledIO(servers=1, latency_ns={OpKind.WRITE: write_ms * MS})


# The bound on waiting writes


def test_the_gate_lets_in_first_come_first_served() -> None:
    """A small batch does not pass a large one that waits before it."""
    gate, order = WriteGate(4), list[str]()

    async def enter(name: str, blocks: int) -> None:
        await gate.enter(blocks)
        order.append(name)

    async def play() -> None:
        await enter("first", 3)
        waiting = [asyncio.create_task(enter("large", 4)), asyncio.create_task(enter("small", 1))]
        await sleep_ms(1)
        assert order == ["first"]
        gate.leave(3)
        await sleep_ms(1)
        assert order == ["first", "large"]
        gate.leave(4)
        await asyncio.gather(*waiting)
        assert (order, gate.used) == (["first", "large", "small"], 1)

    run_virtual(play())


def test_who_gives_up_waiting_at_the_gate_takes_no_room() -> None:
    """A cancelled wait leaves the count as it was, also where its turn had come in the same moment."""
    gate = WriteGate(2)

    async def play() -> None:
        await gate.enter(2)
        early = asyncio.create_task(gate.enter(2))
        late = asyncio.create_task(gate.enter(1))
        await sleep_ms(1)
        early.cancel()
        await sleep_ms(1)
        gate.leave(2)
        late.cancel()
        await sleep_ms(1)
        assert early.cancelled()
        assert late.cancelled()
        assert gate.used == 0
        await gate.enter(2)

    run_virtual(play())
    assert gate.used == 2


def test_who_gives_up_waiting_at_the_gate_makes_way_for_the_next() -> None:
    """Room that only the first in the queue could not use goes to the second once the first is gone."""
    gate = WriteGate(4)

    async def play() -> None:
        await gate.enter(3)
        large = asyncio.create_task(gate.enter(4))
        small = asyncio.create_task(gate.enter(1))
        await sleep_ms(1)
        large.cancel()
        await sleep_ms(1)
        assert small.done()

    run_virtual(play())
    assert gate.used == 4


def test_the_gate_lets_in_no_more_than_the_time_allows() -> None:
    """A limit of three blocks at a capacity of ten; where nothing waits a larger batch passes all the same."""
    gate = WriteGate(10, limit=lambda: 3)

    async def play() -> None:
        await gate.enter(5)
        waiting = asyncio.create_task(gate.enter(2))
        await sleep_ms(1)
        assert not waiting.done()
        gate.leave(4)
        await waiting
        assert gate.used == 3
        assert gate.enter_some(4) == 0
        gate.leave(2)
        assert gate.enter_some(4) == 2

    run_virtual(play())
    assert gate.used == 3


def test_the_write_rate_is_of_the_time_in_which_something_was_written() -> None:
    """Four blocks in 20 ms, nothing for a second, then two that take 20 ms: six blocks in 40 ms, 15 in 100 ms."""
    rate = WriteRate(VirtualClock())

    async def play() -> None:
        assert rate.blocks_in(1.0) is None
        rate.begin(4)
        await sleep_ms(10)
        assert rate.blocks_in(1.0) is None
        rate.begin(1)
        await sleep_ms(10)
        rate.end(4, 4)
        rate.end(1, 0)
        await sleep_ms(1000)
        assert rate.blocks_in(0.1) == 20
        rate.begin(2)
        await sleep_ms(20)
        assert rate.blocks_in(0.1) == 10
        rate.end(2, 2)
        assert rate.blocks_in(0.1) == 15

    run_virtual(play())


# Overflow


def test_what_does_not_fit_the_queue_is_dropped_and_nobody_waits() -> None:
    """A queue of three, a chain of five: three are written, two counted; the request is done at once."""
    bench = EngineBench(replace(DROPS, write_queue_blocks=3), one_writer())

    async def play() -> None:
        await bench.ask(1, 2, 3, 4, 5)
        assert now_ns() == 0
        assert bench.engine.write_queue_blocks == 3
        await sleep_ms(15)
        await bench.ask(6, 7)
        assert bench.engine.write_queue_blocks == 3
        await bench.engine.settle()

    run_virtual(play())
    # The three are one batch, which leaves the queue as a whole at 30 ms: at 15 ms there is no room.
    assert bench.ids(OpKind.WRITE) == [1, 2, 3]
    assert bench.recorder.window.writes_dropped == 4
    assert bench.failures == []


def test_what_would_wait_too_long_by_the_rate_so_far_is_dropped() -> None:
    """One block in 10 ms so far: of ten, those fit before which no more than two wait (20 ms)."""
    bench = EngineBench(replace(DROPS, write_queue_s=0.02, write_batch=1), one_writer())

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask(*range(10, 20))
        assert bench.engine.write_queue_blocks == 3
        assert bench.recorder.window.writes_dropped == 7
        await sleep_ms(15)
        # Two blocks in 25 ms by now: in 20 ms one is written, so that two may be queued, and two are.
        await bench.ask(*range(20, 30))
        assert bench.engine.write_queue_blocks == 2
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 10, 11, 12]
    assert bench.recorder.window.writes_dropped == 17


def test_before_the_first_write_only_the_capacity_bounds_the_queue() -> None:
    """There is no rate yet."""
    bench = EngineBench(replace(DROPS, write_queue_s=0.001, write_queue_blocks=5), one_writer())
    run_virtual(bench.ask_and_settle(*range(10)))
    assert len(bench.ids(OpKind.WRITE)) == 5
    assert bench.recorder.window.writes_dropped == 5


def test_a_queue_bounded_by_time_can_hold_requests_back_too() -> None:
    """With `block`, 10 ms a block so far, and 10 ms to wait, so two in the queue at a time: the last enters late."""
    bench = EngineBench(replace(PLAIN, write_queue_s=0.01, write_batch=1), one_writer())

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask(2, 3, 4, 5)
        assert now_ns() == 30 * MS
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2, 3, 4, 5]
    assert bench.recorder.window.writes_dropped == 0


# Batches


def test_blocks_of_a_batch_become_findable_together() -> None:
    """Batches of two by one thread of 10 ms: after 25 ms the first two can be found, although the third is written."""
    bench = EngineBench(replace(PLAIN, write_batch=2), one_writer())

    async def play() -> None:
        await bench.ask(1, 2, 3, 4)
        await sleep_ms(15)
        assert bench.engine.stored_blocks == 0
        await sleep_ms(20)
        assert bench.engine.stored_blocks == 2
        assert bench.io.stored == {1, 2, 3}
        await bench.engine.settle()

    run_virtual(play())
    assert bench.engine.stored_blocks == 4


def test_a_synced_batch_is_found_once_every_object_is_synced() -> None:
    """Two blocks of two objects: writes to 10 ms, then four syncs of 5 ms at once; latencies say so."""
    config = replace(PLAIN, write_sync=WriteSync.BATCH, kv_ranks=2)
    bench = EngineBench(config, ModelledIO(latency_ns={OpKind.WRITE: 10 * MS, OpKind.SYNC: 5 * MS}))

    async def play() -> None:
        await bench.ask(1, 2)
        await sleep_ms(14)
        assert bench.engine.stored_blocks == 0
        assert bench.io.stored == {2, 3, 4, 5}
        await sleep_ms(2)
        assert bench.engine.stored_blocks == 2

    run_virtual(play())
    assert bench.times_ms(OpKind.SYNC) == [(10, 15)] * 4
    assert bench.ids(OpKind.SYNC) == [2, 3, 4, 5]
    assert bench.recorder.window.sync_ops == 4
    latency = bench.recorder.latency
    assert (latency["storage_sync"].count, latency["storage_sync"].max_ns) == (4, 5 * MS)
    assert (latency["storage_write"].count, latency["storage_write"].max_ns) == (4, 10 * MS)
    assert (latency["write_behind"].count, latency["write_behind"].min_ns) == (2, 15 * MS)


def test_a_block_whose_sync_failed_is_deleted_again() -> None:
    """It may not be there after a crash: it is not found, and neither of its objects stays."""
    error = OSError(5, "Input/output error")
    config = replace(PLAIN, write_sync=WriteSync.BATCH, kv_ranks=2)
    bench = EngineBench(config, ModelledIO(failures={(OpKind.SYNC, 2): error}))
    run_virtual(bench.ask_and_settle(1, 2))
    assert bench.failures == [error]
    assert bench.io.stored == {4, 5}
    assert bench.ids(OpKind.DELETE) == [2, 3]
    assert bench.engine.stored_blocks == 1
    assert bench.recorder.window.writes_dropped == 1


def test_syncs_belong_to_the_batch_policy_alone() -> None:
    """Files are synced by the store, where each is."""
    for write_sync in (WriteSync.NONE, WriteSync.FILE):
        bench = EngineBench(replace(PLAIN, write_sync=write_sync))
        run_virtual(bench.ask_and_settle(1, 2))
        assert bench.ids(OpKind.WRITE) == [1, 2]
        assert bench.ids(OpKind.SYNC) == []


# Intervals


def test_new_blocks_collect_and_are_handed_over_every_interval() -> None:
    """Every 10 ms from the first block at 1 ms on: at 11 and 21 ms, not at 31 where nothing collected, and at 41 ms."""
    bench = EngineBench(
        replace(PLAIN, write_interval_s=0.01), ModelledIO(latency_ns={OpKind.WRITE: 2 * MS}, servers=None)
    )

    async def play() -> None:
        await sleep_ms(1)
        await bench.ask(1, 2)
        await sleep_ms(7)
        await bench.ask(3)
        assert bench.engine.write_queue_blocks == 3
        assert bench.io.finished == []
        await sleep_ms(6)
        assert bench.engine.write_queue_blocks == 0
        await bench.ask(1, 2, 3, 4)
        await sleep_ms(21)
        await bench.ask(5)
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2, 3, 4, 5]
    assert bench.times_ms(OpKind.WRITE) == [(11, 13)] * 3 + [(21, 23), (41, 43)]
    behind = bench.recorder.latency["write_behind"]
    assert (behind.count, behind.min_ns, behind.max_ns) == (5, 5 * MS, 12 * MS)


def test_a_block_that_collects_is_not_collected_again() -> None:
    """It is about to be stored: the second request with it needs no write of its own, and takes no room for it."""
    bench = EngineBench(replace(PLAIN, write_interval_s=0.01))

    async def play() -> None:
        await bench.ask(1, 2)
        await bench.ask(1, 2, 3)
        assert bench.engine.write_queue_blocks == 3
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2, 3]
    assert bench.recorder.window.dedup_skipped_bytes == 2 * PLAIN.object_bytes


def test_a_full_queue_holds_requests_back_until_the_next_interval() -> None:
    """What collects is in the queue: a chain of five through a queue of two takes three intervals."""
    bench = EngineBench(replace(PLAIN, write_interval_s=0.01, write_queue_blocks=2))

    async def play() -> None:
        await bench.ask(1, 2, 3, 4, 5)
        assert now_ns() == 20 * MS
        await bench.engine.settle()

    run_virtual(play())
    assert bench.times_ms(OpKind.WRITE) == [(10, 10)] * 2 + [(20, 20)] * 2 + [(30, 30)]


def test_what_was_stored_while_it_waited_for_the_queue_does_not_collect() -> None:
    """Two requests wait with the same block for a queue of one; the second finds it stored when its turn comes."""
    bench = EngineBench(replace(PLAIN, write_interval_s=0.01, write_queue_blocks=1))

    async def play() -> None:
        await asyncio.gather(bench.ask(1), bench.ask(2), bench.ask(2))
        assert now_ns() == 20 * MS
        await bench.engine.settle()

    run_virtual(play())
    assert bench.times_ms(OpKind.WRITE) == [(10, 10), (20, 20)]
    assert bench.recorder.window.dedup_skipped_bytes == PLAIN.object_bytes
    assert bench.engine.write_queue_blocks == 0


def test_chains_that_collected_leave_from_their_tails_oldest_first() -> None:
    """A tier of four with two chains of one interval in batches of one: the older loses its tail, the newer nothing."""
    bench = EngineBench(replace(PLAIN, write_interval_s=0.01, write_batch=1, storage_blocks=4))

    async def play() -> None:
        await bench.ask(1, 2)
        await bench.ask(3, 4)
        await bench.engine.settle()
        await bench.ask_and_settle(5)

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [2]


def test_what_collects_when_the_engine_stops_stays_in_flight() -> None:
    """Neither written nor dropped, and nobody waits for the interval's end."""
    bench = EngineBench(replace(PLAIN, write_interval_s=10.0))

    async def play() -> None:
        await bench.ask(1, 2)
        bench.engine.stop()
        await bench.ask(3)
        await bench.engine.settle()
        assert now_ns() == 0

    run_virtual(play())
    assert bench.engine.write_queue_blocks == 2
    assert bench.recorder.total.writes_dropped == 0
    assert bench.io.finished == []


# Decisions at arrival


def test_with_decisions_at_arrival_a_full_queue_holds_no_request_back() -> None:
    """Six blocks in batches of one, a queue of two, one thread of 10 ms: answered at once, written two at a time."""
    config = replace(PLAIN, decisions=Decisions.ARRIVAL, write_queue_blocks=2, write_batch=1)
    bench = EngineBench(config, one_writer())

    async def play() -> None:
        await bench.ask(1, 2, 3, 4, 5, 6)
        assert now_ns() == 0
        for _ in range(6):
            await sleep_ms(1)
            assert bench.engine.write_queue_blocks == min(2, 6 - now_ns() // (10 * MS))
            await sleep_ms(9)
        await bench.engine.settle()
        assert now_ns() == 60 * MS

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2, 3, 4, 5, 6]
    assert bench.recorder.latency["queue_wait"].max_ns == 10 * MS
    behind = bench.recorder.latency["write_behind"]
    assert (behind.count, behind.min_ns, behind.max_ns) == (6, 10 * MS, 60 * MS)
    assert bench.recorder.window.writes_dropped == bench.engine.write_queue_blocks == 0


def test_with_decisions_at_arrival_blocks_are_written_as_soon_as_they_are_computed() -> None:
    """Not after the answer, as others may wait for them already: 4 ms of prefill, then 100 ms of decode."""
    pacing = replace(PLAIN.pacing, mode=GenerationMode.REALISTIC)
    starts_ms = {}
    for decisions in Decisions:
        bench = EngineBench(replace(PLAIN, decisions=decisions, pacing=pacing))

        async def play(bench: EngineBench = bench) -> None:
            await bench.ask(1, output_tokens=11)
            await bench.engine.settle()

        run_virtual(play())
        starts_ms[decisions] = [begun_ms for begun_ms, _ in bench.times_ms(OpKind.WRITE)]
    assert starts_ms == {Decisions.ARRIVAL: [4], Decisions.COMPLETION: [104]}
