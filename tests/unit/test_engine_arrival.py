"""Decisions at arrival: what is found, stored and evicted hangs on the order of requests, never on the I/O."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import Decisions, Eviction, GenerationMode, Promotion, StorePolicy, TouchOrder, WriteSync
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.recorder import StorageTally, counts
from mlpstorage.storage.ops import OpKind
from mlpstorage.storage.payload import VerifyError
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench, now_ns, sleep_ms
from mlpstorage.testing.virtual import ModelledIO, run_virtual

ARRIVAL = replace(PLAIN, decisions=Decisions.ARRIVAL)
PACED = replace(ARRIVAL, pacing=replace(PLAIN.pacing, mode=GenerationMode.REALISTIC))
WRONG = VerifyError("object", 0, (1, 0), (2, 0))

CONFIGS = st.builds(
    replace,
    st.just(ARRIVAL),
    gpu_blocks=st.integers(0, 6),
    cpu_blocks=st.integers(0, 6),
    storage_blocks=st.integers(1, 20),
    kv_ranks=st.integers(1, 3),
    store_policy=st.sampled_from(StorePolicy),
    promote=st.sampled_from(Promotion),
    eviction=st.sampled_from(Eviction),
    evict_above=st.floats(0.7, 1.0),
    evict_to=st.floats(0.3, 0.7),
    write_queue_blocks=st.integers(1, 12),
    write_batch=st.integers(1, 16),
    write_sync=st.sampled_from(WriteSync),
    load_batch=st.integers(0, 3),
    min_load_tokens=st.integers(0, 12),
    touch=st.sampled_from(TouchOrder),
    pacing=st.sampled_from([PLAIN.pacing, replace(PLAIN.pacing, mode=GenerationMode.FAST)]),
)
LATENCIES_NS = st.fixed_dictionaries(dict.fromkeys(OpKind, st.integers(0, 60).map(lambda time_ms: time_ms * MS)))


def chains(seed: int, number: int) -> Iterator[tuple[int, ...]]:
    """Random walks from the root of a tree of blocks, so that they share beginnings."""
    draw = random.Random(seed)  # noqa: S311 - a workload, no secret
    for _ in range(number):
        block, chain = 0, []
        for _ in range(draw.randint(1, 8)):
            block = block * 2 + draw.randint(1, 2)
            chain.append(block)
        yield tuple(chain)


def play_all(bench: EngineBench, seed: int, gaps_ms: Sequence[int]) -> None:
    """Send the requests at their times, and let everything end."""

    async def play() -> None:
        async with asyncio.TaskGroup() as group:
            for chain, gap_ms in zip(chains(seed, len(gaps_ms)), gaps_ms, strict=True):
                group.create_task(bench.ask(*chain))
                await sleep_ms(gap_ms)
        await bench.engine.settle()
        await bench.io.idle()

    run_virtual(play())


def moved(tally: StorageTally) -> dict[str, object]:
    """What was moved, without what hangs on the I/O engine."""
    return {name: value for name, value in counts(tally).items() if name.endswith(("_bytes", "_ops"))}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    gaps_ms=st.lists(st.integers(0, 25), min_size=1, max_size=40),
    config=CONFIGS,
    servers=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    latencies_ns=st.tuples(LATENCIES_NS, LATENCIES_NS),
)
def test_two_runs_on_storage_of_any_speed_do_the_same(
    seed: int,
    gaps_ms: list[int],
    config: EngineConfig,
    servers: tuple[int, int],
    latencies_ns: tuple[dict[OpKind, int], dict[OpKind, int]],
) -> None:
    """Equal digests and byte counts, no wrong operation, no capacity exceeded, and true tiers in the end."""
    benches = [
        EngineBench(config, ModelledIO(servers=number, latency_ns=latency_ns))
        for number, latency_ns in zip(servers, latencies_ns, strict=True)
    ]
    for bench in benches:
        play_all(bench, seed, gaps_ms)
        assert bench.failures == bench.io.misuses == []
        assert bench.recorder.requests.completed == len(gaps_ms)
        assert bench.io.most_stored <= config.storage_blocks * config.kv_ranks
        stored = bench.engine._storage.stored
        assert set(config.objects(list(stored))) == bench.io.stored
        assert bench.engine.write_queue_blocks == bench.engine.in_flight == 0
        for block, slot in bench.engine._dram._slots.items():
            places = range(slot * config.kv_ranks, (slot + 1) * config.kv_ranks)
            assert [bench.io.slots[place] for place in places] == list(config.objects([block]))
    first, second = benches
    assert first.engine.operations_digest == second.engine.operations_digest
    assert moved(first.recorder.total) == moved(second.recorder.total)
    assert first.recorder.requests.hit_blocks == second.recorder.requests.hit_blocks


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    seed=st.integers(0, 10_000),
    gaps_ms=st.lists(st.integers(0, 25), min_size=1, max_size=40),
    config=CONFIGS,
    servers=st.integers(1, 6),
    latency_ns=LATENCIES_NS,
    wrong=st.sets(
        st.tuples(st.sampled_from([OpKind.READ, OpKind.COPY_OUT]), st.integers(1, 40)), min_size=1, max_size=5
    ),
)
def test_requests_that_fail_leave_the_tiers_true(
    seed: int,
    gaps_ms: list[int],
    config: EngineConfig,
    servers: int,
    latency_ns: dict[OpKind, int],
    wrong: set[tuple[OpKind, int]],
) -> None:
    """Some data is wrong: its requests give up what they had taken, whoever has evicted or taken it again meanwhile."""
    bench = EngineBench(
        config, ModelledIO(servers=servers, latency_ns=latency_ns, failures=dict.fromkeys(wrong, WRONG))
    )
    play_all(bench, seed, gaps_ms)
    assert bench.failures == bench.io.misuses == []
    assert bench.recorder.requests.completed + bench.recorder.requests.failed == len(gaps_ms)
    assert bench.io.most_stored <= config.storage_blocks * config.kv_ranks
    stored, slots = bench.engine._storage.stored, bench.engine._dram._slots
    assert set(config.objects(list(stored))) == set(bench.engine.stored_objects()) == bench.io.stored
    assert set(bench.engine._dram.ready) == set(slots)
    assert bench.arena.used_slots == len(slots)
    for block, slot in slots.items():
        places = range(slot * config.kv_ranks, (slot + 1) * config.kv_ranks)
        assert [bench.io.slots[place] for place in places] == list(config.objects([block]))
    assert bench.engine.write_queue_blocks == bench.engine.in_flight == 0


def test_other_requests_have_another_digest() -> None:
    """The digest is of what was done: one block more, or another order, shows."""
    digests = set()
    histories: list[list[tuple[int, ...]]] = [[(1, 2), (1, 2, 3)], [(1, 2, 3), (1, 2)], [(1, 2), (1, 2)]]
    for requests in histories:
        bench = EngineBench(ARRIVAL)

        async def play(bench: EngineBench = bench, requests: list[tuple[int, ...]] = requests) -> None:
            for chain in requests:
                await bench.ask_and_settle(*chain)

        run_virtual(play())
        digests.add(bench.engine.operations_digest)
    assert len(digests) == 3


def test_a_read_waits_for_the_write_that_it_needs() -> None:
    """The second request finds the block of the first, which takes 4 ms to compute and 10 to write; it reads for 3."""
    bench = EngineBench(PACED, ModelledIO(latency_ns={OpKind.WRITE: 10 * MS, OpKind.READ: 3 * MS}))

    async def play() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.ask(1))
            group.create_task(bench.ask(1, 2))
        await bench.engine.settle()

    run_virtual(play())
    assert bench.times_ms(OpKind.WRITE)[0] == (4.0, 14.0)
    assert bench.times_ms(OpKind.READ) == [(14.0, 17.0)]
    assert bench.recorder.total_requests.hit_blocks.storage == 1
    assert bench.recorder.latency["storage_load"].sum_ns == 17 * MS


def test_a_block_that_is_evicted_before_it_is_written_is_written_and_then_deleted() -> None:
    """So that the same bytes move however fast the storage is."""
    bench = EngineBench(replace(PACED, storage_blocks=1), ModelledIO(latency_ns={OpKind.WRITE: 10 * MS}))

    async def play() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.ask(1))
            group.create_task(bench.ask(2))
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2]
    assert bench.ids(OpKind.DELETE) == [1]
    assert bench.io.stored == {2}
    assert bench.io.misuses == []


def test_a_request_that_fails_leaves_nobody_waiting() -> None:
    """The read of block 1 returns wrong data: blocks 1 and 2 are gone, and the request that waits for block 2 fails."""
    bench = EngineBench(ARRIVAL, ModelledIO(latency_ns={OpKind.READ: 5 * MS}, failures={(OpKind.READ, 1): WRONG}))

    async def play() -> None:
        await bench.ask_and_settle(1)
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.ask(1, 2))
            group.create_task(bench.ask(1, 2, 3))
        await bench.engine.settle()
        assert await bench.ask_and_settle(1, 2) == 0

    run_virtual(play())
    assert bench.recorder.requests.failed == 2
    assert bench.recorder.requests.completed == 2
    assert bench.io.misuses == bench.failures == []
    assert bench.io.stored == {1, 2}


def test_a_run_that_is_cut_off_leaves_nobody_waiting() -> None:
    """Requests are cancelled while others wait for their blocks: everything settles, and nothing more is done."""
    bench = EngineBench(PACED, ModelledIO(latency_ns={OpKind.WRITE: 10 * MS}))

    async def play() -> None:
        tasks = [asyncio.create_task(bench.ask(*chain)) for chain in ((1, 2), (1, 2, 3), (1, 2, 3))]
        await sleep_ms(1)
        bench.engine.stop()
        bench.io.cancel_queued()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bench.engine.settle()
        await bench.io.idle()
        assert now_ns() == 1 * MS

    run_virtual(play())
    assert bench.io.stored == set()
    assert bench.io.misuses == bench.failures == []


def test_a_block_of_which_one_object_cannot_be_written_leaves_none_behind() -> None:
    """The second of three objects of block 1 fails: the others are deleted, and the block can be stored again."""
    error = OSError(28, "No space left on device")
    bench = EngineBench(replace(ARRIVAL, kv_ranks=3), ModelledIO(failures={(OpKind.WRITE, 2): error}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        assert bench.io.stored == {6, 7, 8}
        assert await bench.ask_and_settle(1, 2) == 0

    run_virtual(play())
    assert bench.failures == [error]
    assert bench.ids(OpKind.DELETE) == [3, 5]
    assert bench.io.stored == {3, 4, 5, 6, 7, 8}
    assert bench.io.misuses == []


def slow_and_wrong() -> ModelledIO:
    """The first read takes 10 ms and is wrong."""
    return ModelledIO(latency_ns={OpKind.READ: 10 * MS}, failures={(OpKind.READ, 1): WRONG})


def test_a_block_with_wrong_data_that_was_evicted_meanwhile_is_deleted_once() -> None:
    """A tier of one: 1 is read to 10 ms, and its room taken by 2 at 5 ms, whose delete waits for the read."""
    bench = EngineBench(replace(ARRIVAL, storage_blocks=1), slow_and_wrong())

    async def play() -> None:
        await bench.ask_and_settle(1)
        reading = asyncio.create_task(bench.ask(1))
        await sleep_ms(5)
        await bench.ask(2)
        await reading
        await bench.engine.settle()

    run_virtual(play())
    assert bench.times_ms(OpKind.DELETE) == [(10, 10)]
    assert bench.ids(OpKind.DELETE) == [1]
    assert bench.io.stored == {2}
    assert bench.failures == bench.io.misuses == []


def test_a_block_with_wrong_data_that_was_evicted_and_taken_again_meanwhile_stays() -> None:
    """The same, and at 6 ms the block is computed anew: it takes the room of 2, and it is that one that stays."""
    bench = EngineBench(replace(ARRIVAL, storage_blocks=1), slow_and_wrong())

    async def play() -> None:
        await bench.ask_and_settle(1)
        reading = asyncio.create_task(bench.ask(1))
        await sleep_ms(5)
        await bench.ask(2)
        await sleep_ms(1)
        await bench.ask(1)
        await reading
        await bench.engine.settle()
        assert await bench.ask_and_settle(1) == 1

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [1, 2]
    assert bench.ids(OpKind.WRITE) == [1, 2, 1]
    assert bench.io.stored == {1}
    assert bench.failures == bench.io.misuses == []


def test_what_a_failed_request_gives_up_is_not_what_another_has_taken_since() -> None:
    """A tier of two with 5. The first request reads 5, which is wrong at 10 ms, and takes 1 until then.

    At 5 ms 2 takes the room of 1, at 6 ms another request has 1 and takes the room of 5, at 7 ms a third finds 1: it
    waits for the second's write, whatever the first has given up, and reads.
    """
    bench = EngineBench(replace(ARRIVAL, storage_blocks=2), slow_and_wrong())

    async def play() -> None:
        await bench.ask_and_settle(5)
        first = asyncio.create_task(bench.ask(5, 1))
        await sleep_ms(5)
        await bench.ask(2)
        await sleep_ms(1)
        await bench.ask(1)
        await sleep_ms(1)
        await bench.ask(1)
        assert now_ns() == 20 * MS
        await first
        await bench.engine.settle()

    run_virtual(play())
    # 1 was not written for the first request, so that there is nothing of its to delete.
    assert bench.ids(OpKind.DELETE) == [5]
    assert bench.ids(OpKind.WRITE) == [5, 2, 1]
    assert bench.ids(OpKind.READ) == [1]
    assert bench.io.stored == set(bench.engine.stored_objects()) == {1, 2}
    assert (bench.recorder.requests.failed, bench.recorder.requests.completed) == (1, 4)
    assert bench.failures == bench.io.misuses == []


def test_wrong_data_in_a_slot_of_dram_is_no_matter_of_what_was_copied_there_since() -> None:
    """1 is copied out of a tier of one to 10 ms. 2 takes its slot at 5 ms, and 1, from storage, at 6 ms: it stays."""
    io = ModelledIO(latency_ns={OpKind.COPY_OUT: 10 * MS}, failures={(OpKind.COPY_OUT, 1): WRONG})
    bench = EngineBench(replace(ARRIVAL, cpu_blocks=1), io)

    async def play() -> None:
        await bench.ask_and_settle(1)
        copying = asyncio.create_task(bench.ask(1))
        await sleep_ms(5)
        await bench.ask(2)
        await sleep_ms(1)
        await bench.ask(1)
        await copying
        await bench.engine.settle()
        assert bench.io.slots == {0: 1}
        assert bench.engine.cpu_blocks == bench.arena.used_slots == 1
        assert await bench.ask_and_settle(1) == 1

    run_virtual(play())
    assert bench.ids(OpKind.READ) == bench.ids(OpKind.COPY_OUT) == [1]
    assert bench.recorder.requests.failed == 1
    assert bench.failures == bench.io.misuses == []


def test_the_room_of_what_was_given_up_is_no_room_before_it_is_free() -> None:
    """A tier of one: 1 is written to 20 ms. 2 takes its room and is given up at 10 ms, 3 takes the room of 2.

    3 is written when 1 is deleted, from 25 ms on, although the delete of 2 has nothing to delete.
    """
    latency_ns = {OpKind.WRITE: 20 * MS, OpKind.DELETE: 5 * MS, OpKind.COPY_OUT: 10 * MS}
    io = ModelledIO(latency_ns=latency_ns, failures={(OpKind.COPY_OUT, 1): WRONG})
    bench = EngineBench(replace(ARRIVAL, storage_blocks=1, cpu_blocks=1, touch=TouchOrder.HEAD), io)

    async def play() -> None:
        await bench.ask(1)
        failing = asyncio.create_task(bench.ask(1, 2))
        await sleep_ms(5)
        await bench.ask(3)
        await failing
        await bench.engine.settle()

    run_virtual(play())
    assert bench.recorder.requests.failed == 1
    assert bench.times_ms(OpKind.DELETE) == [(20, 25)]
    assert bench.times_ms(OpKind.WRITE) == [(0, 20), (25, 45)]
    assert (bench.io.stored, bench.io.most_stored) == ({3}, 1)
    assert bench.failures == bench.io.misuses == []


def test_what_was_given_up_with_others_does_not_stand_for_what_was_taken_since() -> None:
    """A tier of four that evicts down to three. The first request takes 1 and 2, and gives both up at 10 ms.

    Before that 4 pushes out 5 and 1, 1 is taken again, and 6 to 8 push out 2, 3, 4 and 1, in one batch. Of that, 1 was
    written after all, and is deleted; 2 was not.
    """
    config = replace(ARRIVAL, storage_blocks=4, evict_to=0.75, touch=TouchOrder.HEAD)
    bench = EngineBench(config, slow_and_wrong())

    async def play() -> None:
        await bench.ask_and_settle(5)
        first = asyncio.create_task(bench.ask(5, 1, 2))
        await sleep_ms(1)
        for block_id in (3, 4, 1):
            await bench.ask(block_id)
        await bench.ask(6, 7, 8)
        await first
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [5, 3, 4, 1, 6, 7, 8]
    assert bench.ids(OpKind.DELETE) == [5, 3, 4, 1]
    assert bench.io.stored == set(bench.engine.stored_objects()) == {6, 7, 8}
    assert bench.io.most_stored <= 4
    assert bench.failures == bench.io.misuses == []
