"""The engine on virtual time, with modelled I/O that refuses what a store could not do: every number worked by hand."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import Eviction, GenerationMode, Promotion, StorePolicy, TouchOrder, WriteOverflow, WriteSync
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.index import Admission, LruSet, admit
from mlpstorage.measure.clock import NS
from mlpstorage.storage.ops import Lane, Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.storage.payload import VerifyError
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench, now_ns, request, sleep_ms
from mlpstorage.testing.virtual import ModelError, ModelledIO, VirtualClock, VirtualTimeError, run_virtual

OBJECT_BYTES = PLAIN.object_bytes
WRONG = VerifyError("object", 0, (1, 0), (2, 0))

# A prompt token takes 1 ms, an output token after the first 10 ms.
PACING = replace(PLAIN.pacing, mode=GenerationMode.REALISTIC)
INSTANT = PLAIN.pacing

# Look-up


def test_a_leading_run_is_found_across_the_tiers_each_block_in_the_fastest() -> None:
    """One block on the GPU, the next in DRAM, the third on storage: all three are one run, and only two are moved."""
    bench = EngineBench(replace(PLAIN, gpu_blocks=1, cpu_blocks=1))

    async def play() -> None:
        assert await bench.ask_and_settle(1, 2, 3) == 0
        assert await bench.ask_and_settle(1, 2, 3, 4) == 3

    run_virtual(play())
    found = bench.recorder.requests
    assert (found.hit_blocks.gpu, found.hit_blocks.cpu, found.hit_blocks.storage) == (1, 1, 1)
    assert (found.cached_tokens.gpu, found.cached_tokens.cpu, found.cached_tokens.storage) == (4, 4, 4)
    assert bench.ids(OpKind.READ) == [3]
    assert bench.ids(OpKind.COPY_OUT) == [2]
    assert bench.ids(OpKind.WRITE) == [1, 2, 3, 4]
    assert bench.io.misuses == []


def test_a_resident_block_behind_a_missing_one_is_not_found() -> None:
    """The run ends at the first block that no tier holds; the new head alone is written."""
    bench = EngineBench()

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3)
        assert await bench.ask_and_settle(9, 1, 2) == 0
        assert await bench.ask_and_settle(1, 8, 3) == 1

    run_virtual(play())
    assert bench.ids(OpKind.READ) == [1]
    assert sorted(bench.ids(OpKind.WRITE)) == [1, 2, 3, 8, 9]


def test_without_prefix_caching_nothing_is_found_and_new_blocks_are_still_stored() -> None:
    """Every prompt is computed whole; what storage holds already is not written again."""
    bench = EngineBench(replace(PLAIN, prefix_caching=False, gpu_blocks=1, cpu_blocks=1))

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3)
        assert await bench.ask_and_settle(1, 2, 3, 4) == 0

    run_virtual(play())
    assert bench.ids(OpKind.READ) == bench.ids(OpKind.COPY_OUT) == []
    assert bench.ids(OpKind.WRITE) == [1, 2, 3, 4]
    assert bench.recorder.window.dedup_skipped_bytes == 3 * OBJECT_BYTES
    assert bench.recorder.requests.prompt_tokens == 28


def test_a_block_is_found_only_once_it_is_stored() -> None:
    """A block whose write is still running is not there for a look-up."""
    bench = EngineBench(io=ModelledIO(latency_ns={OpKind.WRITE: 10 * MS}))

    async def play() -> None:
        await bench.ask(1)
        await sleep_ms(9)
        await bench.ask(1)
        assert bench.hits == 0
        await sleep_ms(2)
        await bench.ask(1)
        assert bench.hits == 1

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1]


def test_admission_is_the_net_effect() -> None:
    """Evicted and taken again has stayed; inserted and evicted again was refused; pinned blocks leave no room."""
    tier = LruSet(2)
    assert admit(tier, [1, 2]) == Admission([1, 2], [], [])
    assert admit(tier, [3, 1]) == Admission([3], [2], [])
    assert admit(tier, [4, 5, 6]) == Admission([5, 6], [3, 1], [4])
    tier.pin(5)
    tier.pin(6)
    assert admit(tier, [7, 5]) == Admission([], [], [7])
    assert admit(LruSet(0), [1]) == Admission([], [], [1])


# Time


def test_ttft_counts_from_the_intended_arrival_through_load_and_prefill() -> None:
    """2 s late, 3 ms for the slower of two reads and a copy at once, 4 ms for the four tokens that are new."""
    latency_ns = {OpKind.READ: 3 * MS, OpKind.COPY_OUT: 1 * MS}
    bench = EngineBench(replace(PLAIN, cpu_blocks=1, pacing=PACING), ModelledIO(latency_ns=latency_ns))

    async def play() -> None:
        await bench.engine.serve(request((1, 2, 3), 12), now_ns())
        await bench.engine.settle()
        assert now_ns() == 12 * MS
        await VirtualClock().sleep_until(7 * NS)
        await bench.engine.serve(request((1, 2, 3, 4), 16), 5 * NS)
        assert now_ns() == 7 * NS + 7 * MS

    run_virtual(play())
    ttft = bench.recorder.latency["ttft"]
    assert (ttft.count, ttft.min_ns, ttft.max_ns) == (2, 12 * MS, 2 * NS + 7 * MS)
    load = bench.recorder.latency["request_load"]
    assert (load.count, load.sum_ns) == (1, 3 * MS)
    assert bench.ids(OpKind.COPY_OUT) == [1]
    # 12 loaded tokens would have taken 12 ms to compute, and took 3 ms to load; the first request loaded nothing.
    saved = bench.recorder.saved
    assert (saved.gains.count, saved.gains.sum_ns, saved.losses.count) == (2, 9 * MS, 0)
    tokens = bench.recorder.first_tokens
    assert (tokens.client_late_ns, tokens.storage_load_ns, tokens.dram_load_ns) == (2 * NS, 3 * MS, 0)
    assert (tokens.prefill_ns, tokens.prefill_queue_ns) == ((12 + 4) * MS, 0)


def test_a_full_hit_still_computes_one_token() -> None:
    """The last token of a prompt is never cached: its prefill gives the first token of the answer."""
    bench = EngineBench(replace(PLAIN, pacing=PACING), ModelledIO(latency_ns={OpKind.READ: 5 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask(1, 2)

    run_virtual(play())
    assert bench.recorder.latency["ttft"].min_ns == 6 * MS
    assert bench.recorder.requests.cached_tokens.storage == 7
    assert bench.recorder.requests.hit_blocks.storage == 2


def test_a_full_hit_with_a_partial_block_behind_it_computes_that_block_only() -> None:
    """A prompt of ten tokens has two full blocks; where both are found, two tokens are computed."""
    bench = EngineBench(replace(PLAIN, pacing=PACING), ModelledIO(latency_ns={OpKind.READ: 5 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask(1, 2, prompt_tokens=10)

    run_virtual(play())
    assert bench.recorder.latency["ttft"].min_ns == 7 * MS
    assert bench.recorder.requests.cached_tokens.storage == 8
    assert bench.ids(OpKind.WRITE) == [1, 2]


def test_decode_moves_nothing() -> None:
    """Reads end before the first token, writes begin after the last: 10 x 10 ms lie between them."""
    bench = EngineBench(
        replace(PLAIN, pacing=PACING), ModelledIO(latency_ns={OpKind.READ: 2 * MS, OpKind.WRITE: 1 * MS})
    )

    async def play() -> int:
        await bench.ask_and_settle(1)
        start_ns = now_ns()
        await bench.ask(1, 2, output_tokens=11)
        assert now_ns() == start_ns + (2 + 4 + 100) * MS
        await bench.engine.settle()
        return start_ns

    start_ns = run_virtual(play())
    (read,) = bench.io.done_of(OpKind.READ)
    write = bench.io.done_of(OpKind.WRITE)[-1]
    assert (read.queued_ns, read.end_ns) == (start_ns, start_ns + 2 * MS)
    assert (write.op.object_id, write.queued_ns) == (2, start_ns + 106 * MS)


def test_a_request_without_a_full_block_moves_nothing() -> None:
    """Three tokens of a block of four: computed, answered, never stored."""
    bench = EngineBench(replace(PLAIN, pacing=PACING, gpu_blocks=1, cpu_blocks=1))
    run_virtual(bench.ask(prompt_tokens=3))
    assert bench.recorder.requests.completed == 1
    assert bench.recorder.latency["ttft"].sum_ns == 3 * MS
    assert bench.io.finished == []


# Store


def test_blocks_that_are_stored_or_on_their_way_are_not_written_again() -> None:
    """Two requests with one prompt at once: each computes it, one write of each block, the other's are counted."""
    bench = EngineBench(io=ModelledIO(latency_ns={OpKind.WRITE: 10 * MS}))

    async def play() -> None:
        await asyncio.gather(bench.ask(1, 2), bench.ask(1, 2, 3))
        await bench.engine.settle()

    run_virtual(play())
    assert sorted(bench.ids(OpKind.WRITE)) == [1, 2, 3]
    assert bench.recorder.window.dedup_skipped_bytes == 2 * OBJECT_BYTES
    assert bench.recorder.window.writes_dropped == 0


def test_a_full_write_queue_holds_the_store_step_back() -> None:
    """Six blocks through a queue of two and one thread of 10 ms a write: the queue takes the last pair at 40 ms."""
    bench = EngineBench(replace(PLAIN, write_queue_blocks=2), ModelledIO(servers=1, latency_ns={OpKind.WRITE: 10 * MS}))
    depths: list[int] = []

    async def watch() -> None:
        while True:
            depths.append(bench.engine.write_queue_blocks)
            await sleep_ms(1)

    async def play() -> None:
        watching = asyncio.create_task(watch())
        await bench.ask(1, 2, 3, 4, 5, 6)
        assert now_ns() == 40 * MS
        await bench.engine.settle()
        assert now_ns() == 60 * MS
        watching.cancel()

    run_virtual(play())
    assert max(depths) == 2
    assert bench.ids(OpKind.WRITE) == [1, 2, 3, 4, 5, 6]
    behind = bench.recorder.latency["write_behind"]
    assert (behind.count, behind.min_ns, behind.max_ns) == (6, 10 * MS, 60 * MS)
    assert bench.recorder.latency["queue_wait"].max_ns == 10 * MS


def test_a_request_that_waits_for_the_write_queue_is_answered_already() -> None:
    """Back-pressure comes after the answer: the request is no longer in flight, its latency is counted."""
    bench = EngineBench(replace(PLAIN, write_queue_blocks=1), ModelledIO(servers=1, latency_ns={OpKind.WRITE: 10 * MS}))

    async def play() -> None:
        asking = asyncio.create_task(bench.ask(1, 2, 3))
        await sleep_ms(5)
        assert not asking.done()
        assert bench.engine.in_flight == 0
        assert bench.recorder.requests.completed == 1
        await asking

    run_virtual(play())


@pytest.mark.parametrize(
    ("touch", "kept", "found_again"), [(TouchOrder.TAIL, {1, 2, 3}, 3), (TouchOrder.HEAD, {3, 4, 5}, 0)]
)
def test_what_is_left_of_a_chain_longer_than_the_capacity(touch: TouchOrder, kept: set[int], found_again: int) -> None:
    """Tail first keeps the head, which is found again; head first keeps the tail, which is useless."""
    bench = EngineBench(replace(PLAIN, storage_blocks=3, touch=touch))

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3, 4, 5)
        assert bench.io.stored == kept
        assert bench.recorder.window.writes_dropped == 2
        assert await bench.ask_and_settle(1, 2, 3, 4, 5) == found_again

    run_virtual(play())
    assert bench.io.most_stored == 3
    assert bench.io.misuses == []


def test_storage_makes_room_before_it_takes_more() -> None:
    """On a full tier the deletes end before the writes that need their room begin."""
    bench = EngineBench(
        replace(PLAIN, storage_blocks=2), ModelledIO(latency_ns={OpKind.DELETE: 5 * MS, OpKind.WRITE: 7 * MS})
    )

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(3, 4)
        assert now_ns() == (7 + 5 + 7) * MS

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [2, 1]
    assert {done.end_ns for done in bench.io.done_of(OpKind.DELETE)} == {12 * MS}
    assert [done.start_ns for done in bench.io.done_of(OpKind.WRITE)][2:] == [12 * MS, 12 * MS]
    assert bench.io.most_stored == 2
    assert bench.io.stored == {3, 4}


def test_a_block_that_is_stored_again_while_it_is_deleted_is_not_lost() -> None:
    """The new write waits for the old delete of the same object."""
    bench = EngineBench(replace(PLAIN, storage_blocks=3), ModelledIO(latency_ns={OpKind.DELETE: 50 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3)
        await bench.ask(4)
        await sleep_ms(10)
        await bench.ask(3)
        await bench.engine.settle()
        assert await bench.ask_and_settle(3) == 1

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [3, 2]
    assert bench.io.stored == {1, 3, 4}
    assert bench.io.misuses == []
    assert bench.io.done_of(OpKind.WRITE)[-1].start_ns == 60 * MS


def test_a_request_that_pushes_out_its_own_head_for_a_moment_keeps_it() -> None:
    """Tail first, new blocks come before the touch of an old head: what goes and comes back in one step stays."""
    bench = EngineBench(replace(PLAIN, storage_blocks=4))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(9)
        assert await bench.ask_and_settle(1, 2, 3, 4) == 2
        assert await bench.ask_and_settle(1, 2, 3, 4) == 4

    run_virtual(play())
    assert bench.ids(OpKind.DELETE) == [9]
    assert bench.io.stored == {1, 2, 3, 4}
    assert bench.io.misuses == []


def test_blocks_that_are_being_read_are_not_evicted() -> None:
    """While a hit is loaded from a full tier, another request's blocks find no room; the hit is read whole."""
    bench = EngineBench(replace(PLAIN, storage_blocks=2), ModelledIO(latency_ns={OpKind.READ: 100 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        loading = asyncio.create_task(bench.ask(1, 2))
        await sleep_ms(50)
        await bench.ask(3, 4)
        assert bench.recorder.window.writes_dropped == 2
        await loading
        await bench.engine.settle()
        assert await bench.ask_and_settle(3, 4) == 0

    run_virtual(play())
    assert bench.failures == bench.io.misuses == []
    assert bench.ids(OpKind.READ) == [1, 2]
    # Once nothing is read any more, the other blocks get their room.
    assert bench.io.stored == {3, 4}


# DRAM and GPU


def test_what_leaves_the_gpu_tier_is_copied_to_dram_and_found_there() -> None:
    """Two blocks are pushed out by two others; a later hit copies them out of DRAM and reads nothing."""
    bench = EngineBench(replace(PLAIN, gpu_blocks=2, cpu_blocks=2))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        assert bench.ids(OpKind.COPY_IN) == []
        await bench.ask_and_settle(3, 4)
        assert bench.ids(OpKind.COPY_IN) == [2, 1]
        assert bench.engine.cpu_blocks == 2
        await bench.ask_and_settle(1, 2, 5)

    run_virtual(play())
    assert bench.recorder.requests.hit_blocks.cpu == 2
    assert bench.ids(OpKind.COPY_OUT) == [1, 2]
    assert bench.ids(OpKind.READ) == []
    assert bench.io.misuses == []


def test_a_block_on_its_way_to_dram_is_read_from_storage() -> None:
    """DRAM holds a block once its copy is complete, not before."""
    bench = EngineBench(replace(PLAIN, cpu_blocks=1), ModelledIO(latency_ns={OpKind.COPY_IN: 10 * MS}))

    async def play() -> None:
        await bench.ask(1)
        await sleep_ms(5)
        assert bench.engine.cpu_blocks == 0
        await bench.ask(1)
        await sleep_ms(10)
        await bench.ask(1)

    run_virtual(play())
    found = bench.recorder.requests.hit_blocks
    assert (found.cpu, found.storage) == (1, 1)
    assert bench.io.misuses == []


def test_without_a_gpu_tier_blocks_go_to_dram_at_once() -> None:
    """A capacity of 0 holds nothing, so that all is offered to the next tier, the head of the chain last."""
    bench = EngineBench(replace(PLAIN, gpu_blocks=0, cpu_blocks=2))
    run_virtual(bench.ask_and_settle(1, 2, 3))
    assert bench.ids(OpKind.COPY_IN) == [2, 1]
    assert bench.arena.used_slots == 2


def test_without_a_dram_tier_nothing_is_copied() -> None:
    """What leaves the GPU tier is found on storage."""
    bench = EngineBench(replace(PLAIN, gpu_blocks=1, cpu_blocks=0))

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask_and_settle(2)
        await bench.ask_and_settle(1)

    run_virtual(play())
    assert bench.ids(OpKind.COPY_IN) == bench.ids(OpKind.COPY_OUT) == []
    assert bench.ids(OpKind.READ) == [1]


def test_dram_never_holds_more_than_its_capacity() -> None:
    """Slots are given back before others are taken; what left DRAM is still on storage."""
    bench = EngineBench(replace(PLAIN, cpu_blocks=3), ModelledIO(latency_ns={OpKind.COPY_IN: 1 * MS}))

    async def play() -> None:
        for first in range(0, 40, 4):
            await bench.ask_and_settle(*range(first, first + 4))
            assert bench.engine.cpu_blocks == bench.arena.used_slots == 3
        assert await bench.ask_and_settle(0, 1, 2, 3) == 4

    run_virtual(play())
    assert bench.arena.touched_bytes == 0
    assert len(bench.io.slots) == 3
    assert bench.recorder.requests.hit_blocks.storage == 4
    assert bench.io.misuses == []


# Failure


def test_a_failed_read_fails_the_request_and_stores_nothing() -> None:
    """The failure is handed on once; the request counts as failed, has no TTFT, and touches no tier."""
    error = OSError(5, "Input/output error")
    bench = EngineBench(io=ModelledIO(failures={(OpKind.READ, 2): error}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3)
        await bench.ask_and_settle(1, 2, 3, 4)

    run_virtual(play())
    assert bench.failures == [error]
    assert (bench.recorder.requests.completed, bench.recorder.requests.failed) == (1, 1)
    assert bench.recorder.latency["ttft"].count == 1
    assert bench.ids(OpKind.WRITE) == [1, 2, 3]
    assert bench.recorder.window.io_errors == 1
    assert bench.engine.in_flight == 0


def test_a_block_whose_write_failed_is_not_resident() -> None:
    """The failure is handed on, the block counts as dropped and takes no room, and a look-up ends before it."""
    error = OSError(28, "No space left on device")
    bench = EngineBench(io=ModelledIO(failures={(OpKind.WRITE, 2): error}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3)
        assert bench.engine.stored_blocks == 2
        assert bench.io.stored == {1, 3}
        assert 2 not in bench.engine._storage
        assert await bench.ask_and_settle(1, 2, 3) == 1

    run_virtual(play())
    assert bench.failures == [error]
    assert bench.recorder.window.io_errors == 1
    assert bench.recorder.window.writes_dropped == 1
    assert bench.ids(OpKind.WRITE) == [1, 3, 2]


def test_a_stopped_engine_hands_out_no_more_writes() -> None:
    """After `stop` what is queued behind is given up, and does not count as dropped: it was in flight."""
    bench = EngineBench(replace(PLAIN, write_queue_blocks=1), ModelledIO(servers=1, latency_ns={OpKind.WRITE: 10 * MS}))

    async def play() -> None:
        asking = asyncio.create_task(bench.ask(1, 2, 3))
        await sleep_ms(5)
        bench.engine.stop()
        await asking
        await bench.engine.settle()
        assert now_ns() == 10 * MS

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1]
    assert bench.recorder.total.writes_dropped == 0
    assert bench.failures == []


# Against a second implementation


class ListCache:
    """One LRU tier as a plain list, oldest first: slow, obvious, and nothing of the engine's in it."""

    def __init__(self, capacity: int, *, tail_first: bool) -> None:
        self.capacity = capacity
        self.tail_first = tail_first
        self.held: list[int] = []

    def play(self, chain: Sequence[int]) -> int:
        """Blocks that a request finds; then they all become recent."""
        found = 0
        while found < len(chain) and chain[found] in self.held:
            found += 1
        for block_id in reversed(chain) if self.tail_first else chain:
            if block_id in self.held:
                self.held.remove(block_id)
            self.held.append(block_id)
            del self.held[: -self.capacity]
        return found


def chains(seed: int, count: int, depth: int, branches: int) -> list[tuple[int, ...]]:
    """Chains through a tree, so that equal ids stand for equal prefixes."""
    draw = random.Random(seed)  # noqa: S311 - a workload, no secret
    numbers: dict[tuple[int, ...], int] = {}
    made = []
    for _ in range(count):
        path = [draw.randrange(branches) for _ in range(draw.randint(1, depth))]
        made.append(tuple(numbers.setdefault(tuple(path[:end]), len(numbers)) for end in range(1, len(path) + 1)))
    return made


@pytest.mark.parametrize("touch", TouchOrder)
@pytest.mark.parametrize("capacity", [1, 3, 7, 20, 60, 10_000])
def test_one_request_at_a_time_counts_as_the_trace_inspection_does(touch: TouchOrder, capacity: int) -> None:
    """A storage-only cache finds for every request what a list worked by the definition of LRU finds."""
    bench = EngineBench(replace(PLAIN, storage_blocks=capacity, touch=touch))
    reference = ListCache(capacity, tail_first=touch is TouchOrder.TAIL)
    played = chains(seed=capacity, count=400, depth=10, branches=2)
    expected = [reference.play(chain) for chain in played]

    async def play() -> list[int]:
        return [await bench.ask_and_settle(*chain) for chain in played]

    assert run_virtual(play()) == expected
    assert sum(expected) > 0
    assert bench.failures == bench.io.misuses == []
    assert bench.io.stored == set(reference.held)
    assert bench.io.most_stored <= capacity


LATENCIES_NS = st.fixed_dictionaries({kind: st.integers(0, 20).map(lambda ms: ms * MS) for kind in OpKind})


@dataclass(frozen=True, slots=True)
class Limit:
    """A load timeout of the same length for any load."""

    time_ms: float

    def limit_s(self, tokens: int) -> float:
        """Seconds."""
        assert tokens > 0
        return self.time_ms / 1000


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    seed=st.integers(0, 10_000),
    gaps_ms=st.lists(st.integers(0, 25), min_size=1, max_size=40),
    config=st.builds(
        replace,
        st.just(PLAIN),
        gpu_blocks=st.integers(0, 6),
        cpu_blocks=st.integers(0, 6),
        storage_blocks=st.integers(1, 20),
        kv_ranks=st.integers(1, 3),
        promote=st.sampled_from(Promotion),
        store_policy=st.sampled_from(StorePolicy),
        eviction=st.sampled_from(Eviction),
        evict_above=st.floats(0.7, 1.0),
        evict_to=st.floats(0.3, 0.7),
        write_overflow=st.sampled_from(WriteOverflow),
        write_queue_blocks=st.integers(1, 12),
        write_queue_s=st.none() | st.floats(0.001, 0.1),
        write_batch=st.integers(1, 16),
        write_interval_s=st.sampled_from([0.0, 0.01, 0.1]),
        write_sync=st.sampled_from(WriteSync),
        load_batch=st.integers(0, 3),
        min_load_tokens=st.integers(0, 12),
        load_timeout=st.none() | st.builds(Limit, st.floats(0, 60)),
        touch=st.sampled_from(TouchOrder),
        prefix_caching=st.booleans(),
        pacing=st.sampled_from([INSTANT, replace(PACING, mode=GenerationMode.FAST)]),
    ),
    servers=st.integers(1, 6),
    latency_ns=LATENCIES_NS,
    wrong=st.sets(st.tuples(st.sampled_from([OpKind.READ, OpKind.COPY_OUT]), st.integers(1, 40)), max_size=5),
)
def test_no_load_makes_the_engine_ask_for_what_is_not_there(
    seed: int,
    gaps_ms: list[int],
    config: EngineConfig,
    servers: int,
    latency_ns: dict[OpKind, int],
    wrong: set[tuple[OpKind, int]],
) -> None:
    """Concurrent requests, any sizes, policies and speeds, and some wrong data.

    No wrong operation, no capacity exceeded, the tiers are true and every block that was to be stored is accounted for;
    the parts of all times to first token add up to them.
    """
    io = ModelledIO(servers=servers, latency_ns=latency_ns, failures=dict.fromkeys(wrong, WRONG))
    bench = EngineBench(config, io)
    most_used = 0

    async def play() -> None:
        nonlocal most_used
        async with asyncio.TaskGroup() as group:
            for chain, gap_ms in zip(chains(seed, len(gaps_ms), depth=8, branches=2), gaps_ms, strict=True):
                group.create_task(bench.ask(*chain))
                await sleep_ms(gap_ms)
                most_used = max(most_used, bench.arena.used_slots)
                assert bench.engine.write_queue_blocks <= config.write_queue_blocks
        await bench.io.idle()
        await bench.engine.settle()
        await bench.io.idle()

    run_virtual(play())
    engine = bench.engine
    assert bench.failures == bench.io.misuses == []
    assert bench.recorder.requests.completed + bench.recorder.requests.failed == len(gaps_ms)
    assert bench.recorder.requests.failed <= bench.recorder.verify_failures <= len(wrong)
    assert bench.io.most_stored <= config.storage_blocks * config.kv_ranks
    assert most_used <= config.cpu_blocks
    stored, slots = engine._storage.stored, engine._dram._slots
    assert set(config.objects(list(stored))) == bench.io.stored
    assert {block for block in range(400) if block in engine._storage} == set(stored)
    assert set(engine._dram.ready) == set(slots)
    assert (len(stored), len(engine._dram.ready)) == (len(set(stored)), len(slots))
    for block, slot in slots.items():
        places = range(slot * config.kv_ranks, (slot + 1) * config.kv_ranks)
        assert [bench.io.slots[place] for place in places] == list(config.objects([block]))
    assert engine.write_queue_blocks == engine.in_flight == 0
    totals = bench.recorder.total
    assert totals.write_ops - totals.delete_ops == len(bench.io.stored)
    assert totals.sync_ops == (totals.write_ops if config.write_sync is WriteSync.BATCH else 0)
    assert config.eviction is Eviction.LRU or totals.delete_ops <= len(wrong) * config.kv_ranks
    tokens, ttft = bench.recorder.first_tokens, bench.recorder.latency["ttft"]
    assert tokens.requests == ttft.count == bench.recorder.requests.completed
    waited_ns = tokens.client_late_ns + tokens.lookup_ns + tokens.prefill_queue_ns
    assert waited_ns + tokens.storage_load_ns + tokens.dram_load_ns + tokens.prefill_ns == ttft.sum_ns


# The fake itself

MISUSES: dict[str, tuple[list[Op], str]] = {
    "read": ([Op(OpKind.READ, 1)], "READ of 1: it is not there"),
    "delete": ([Op(OpKind.DELETE, 1)], "DELETE of 1: it is not there"),
    "write": ([Op(OpKind.WRITE, 1), Op(OpKind.WRITE, 1)], "WRITE of 1: it is there already"),
    "copy": ([Op(OpKind.COPY_IN, 1, 7), Op(OpKind.COPY_OUT, 2, 7)], "COPY_OUT of 2: slot 7 holds 1"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_the_modelled_io_refuses_what_a_store_could_not_do(name: str) -> None:
    """The operation that cannot be done fails, the rest of its chain is skipped, other chains go on."""
    wrong, message = MISUSES[name]
    counted: list[OpDone] = []
    io = ModelledIO(servers=2, on_operations=counted.extend)

    async def play() -> list[OpDone]:
        return await io.run([[*wrong, Op(OpKind.WRITE, 50)], [Op(OpKind.WRITE, 60)]], Lane.STORE)

    done = run_virtual(play())
    assert counted == done
    assert [type(one.error) for one in done[-3:]] == [ModelError, OperationSkippedError, type(None)]
    assert [str(error) for error in io.misuses] == [message]
    assert 60 in io.stored
    assert 50 not in io.stored


def test_the_modelled_io_refuses_two_operations_on_one_object_at_once() -> None:
    """A write that does not wait for the delete, and a delete under a read, are errors of the engine."""
    io = ModelledIO(latency_ns=dict.fromkeys(OpKind, 1 * MS), stored={1, 2})

    async def play() -> None:
        both = [(Op(OpKind.DELETE, 1),), (Op(OpKind.WRITE, 1),), (Op(OpKind.READ, 2),), (Op(OpKind.DELETE, 2),)]
        done = await io.run(both, Lane.STORE)
        assert [one.error is None for one in done] == [True, False, True, False]

    run_virtual(play())
    assert len(io.misuses) == 2


def test_modelled_servers_take_the_time_they_are_given() -> None:
    """Five reads of 10 ms by two threads take 30 ms, the first of the queue first; what is queued can be given up."""
    io = ModelledIO(servers=2, latency_ns={OpKind.READ: 10 * MS}, stored=set(range(5)))

    async def play() -> None:
        reads = [(Op(OpKind.READ, block_id),) for block_id in range(5)]
        done = await io.run(reads, Lane.LOAD)
        assert [(one.start_ns // MS, one.end_ns // MS) for one in done] == [
            (0, 10),
            (0, 10),
            (10, 20),
            (10, 20),
            (20, 30),
        ]
        given_up = asyncio.create_task(io.run(reads, Lane.LOAD))
        await sleep_ms(5)
        io.cancel_queued()
        assert [one.error is None for one in await given_up] == [True, True, False, False, False]
        await io.idle()
        assert now_ns() == 40 * MS

    run_virtual(play())
    assert io.most_running == 2
    assert io.misuses == []


def test_a_virtual_loop_on_which_nothing_can_happen_any_more_says_so() -> None:
    """Waiting for ever is an error, and so is time that runs away; a nanosecond is a moment of its own."""

    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    async def tick() -> None:
        while True:
            await sleep_ms(1000)

    async def moments() -> list[int]:
        seen: list[int] = []

        async def note(when_ns: int) -> None:
            await VirtualClock().sleep_until(when_ns)
            seen.append(now_ns())

        await asyncio.gather(*(note(when_ns) for when_ns in (NS + 2, NS, NS + 1)))
        return seen

    with pytest.raises(VirtualTimeError, match="nothing is left"):
        run_virtual(wait_for_ever())
    with pytest.raises(VirtualTimeError, match="limit of 60 s"):
        run_virtual(tick(), limit_s=60)
    assert run_virtual(moments()) == [NS, NS + 1, NS + 2]
