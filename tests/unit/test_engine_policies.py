"""The engine's policies of loading and storing on virtual time: every number worked by hand."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from mlpstorage.config import Decisions, GenerationMode, Promotion, StorePolicy, TouchOrder, WriteOverflow
from mlpstorage.storage.ops import OpKind
from mlpstorage.storage.payload import VerifyError
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench, now_ns, sleep_ms
from mlpstorage.testing.virtual import ModelledIO, run_virtual

# A prompt token takes 1 ms.
PACED = replace(PLAIN, pacing=replace(PLAIN.pacing, mode=GenerationMode.REALISTIC))
SECOND_USE = replace(PLAIN, store_policy=StorePolicy.SECOND_USE)


@dataclass(slots=True)
class Limits:
    """A load may take as many milliseconds as `of_tokens` says."""

    of_tokens: dict[int, float]
    asked: list[int] = field(default_factory=list)

    def limit_s(self, tokens: int) -> float:
        """Seconds."""
        self.asked.append(tokens)
        return self.of_tokens[tokens] / 1000


# Chains of reads


@pytest.mark.parametrize(
    ("load_batch", "took_ms"),
    [(1, 10), (2, 20), (3, 30), (4, 40), (0, 60)],
)
def test_reads_of_a_load_are_done_in_chains(load_batch: int, took_ms: int) -> None:
    """Six reads of 10 ms and as many threads as are asked for: chains of so many take so long."""
    bench = EngineBench(replace(PLAIN, load_batch=load_batch), ModelledIO(latency_ns={OpKind.READ: 10 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(*range(6))
        begin_ns = now_ns()
        await bench.ask(*range(6))
        assert now_ns() - begin_ns == took_ms * MS

    run_virtual(play())
    assert sorted(bench.ids(OpKind.READ)) == list(range(6))


def test_objects_of_a_block_are_reads_of_their_own_in_a_chain() -> None:
    """Two blocks of two objects in chains of three: one chain of three reads, one of one."""
    bench = EngineBench(replace(PLAIN, load_batch=3, kv_ranks=2), ModelledIO(latency_ns={OpKind.READ: 10 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask(1, 2)

    run_virtual(play())
    assert bench.ids(OpKind.READ) == [2, 5, 3, 4]
    assert bench.times_ms(OpKind.READ) == [(0, 10), (0, 10), (10, 20), (20, 30)]


# Loads that are not worth it


@pytest.mark.parametrize(("known", "reads", "ttft_ms"), [(2, 0, 16), (3, 3, 9)])
def test_too_little_on_storage_is_computed_and_not_read(known: int, reads: int, ttft_ms: int) -> None:
    """More than 8 tokens are worth a read. Of 16, 8 are known: 16 ms of computing; 12 are: 5 ms of reading and 4."""
    bench = EngineBench(replace(PACED, min_load_tokens=8), ModelledIO(latency_ns={OpKind.READ: 5 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(*range(known))
        await bench.ask_and_settle(*range(4))

    run_virtual(play())
    ttft, requests = bench.recorder.latency["ttft"], bench.recorder.requests
    assert ttft.sum_ns == (known * 4 + ttft_ms) * MS
    assert len(bench.ids(OpKind.READ)) == requests.hit_blocks.storage == reads
    assert requests.cached_tokens.storage == 4 * reads
    assert requests.loads_skipped == (0 if reads else 1)
    assert bench.recorder.latency["request_load"].count == bench.recorder.first_tokens.storage_loads == bool(reads)
    # 16 ms of computing less 5 and 4; the other requests loaded nothing and saved nothing.
    saved = bench.recorder.saved
    assert (saved.gains.count, saved.gains.sum_ns, saved.losses.count) == (2, 7 * MS if reads else 0, 0)
    # What was computed although storage has it is not written again.
    assert bench.ids(OpKind.WRITE) == [0, 1, 2, 3]
    assert bench.recorder.window.dedup_skipped_bytes == (0 if reads else 2) * PLAIN.object_bytes


def test_what_dram_holds_is_copied_also_where_storage_is_not_worth_a_read() -> None:
    """The head is in DRAM, one block on storage only: one copy, no read, one block of 4 ms computed."""
    bench = EngineBench(
        replace(PACED, min_load_tokens=4, cpu_blocks=1), ModelledIO(latency_ns={OpKind.COPY_OUT: 1 * MS})
    )

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(1, 2)

    run_virtual(play())
    requests = bench.recorder.requests
    assert (requests.hit_blocks.cpu, requests.hit_blocks.storage, requests.loads_skipped) == (1, 0, 1)
    assert bench.ids(OpKind.READ) == []
    assert bench.recorder.latency["ttft"].sum_ns == (8 + 1 + 4) * MS


# Loads that take too long


def test_a_load_that_takes_too_long_is_abandoned_and_computed() -> None:
    """Four reads of 10 ms by one thread, 25 ms for 16 tokens: two are done, one runs on, one is never begun."""
    limits = Limits({16: 25})
    io = ModelledIO(servers=1, latency_ns={OpKind.READ: 10 * MS})
    bench = EngineBench(replace(PACED, load_timeout=limits), io)

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3, 4)
        begin_ns = now_ns()
        await bench.ask(1, 2, 3, 4)
        # 25 ms, then all 16 tokens.
        assert now_ns() - begin_ns == (25 + 16) * MS
        await bench.engine.settle()

    run_virtual(play())
    requests = bench.recorder.requests
    assert limits.asked == [16]
    assert (requests.loads_abandoned, requests.loads_skipped, requests.failed) == (1, 0, 0)
    assert (requests.hit_blocks.storage, requests.cached_tokens.storage) == (0, 0)
    assert bench.ids(OpKind.READ) == [1, 2, 3]
    assert bench.recorder.window.read_ops == 3
    assert len(bench.io.finished) == 4 + 4
    load = bench.recorder.latency["request_load"]
    assert (load.count, load.sum_ns) == (1, 25 * MS)
    # The time was spent for nothing: a part of TTFT, and a loss, but of no load that was used.
    saved, tokens = bench.recorder.saved, bench.recorder.first_tokens
    assert (saved.gains.sum_ns, saved.losses.count, saved.losses.sum_ns) == (0, 1, 25 * MS)
    assert (tokens.storage_load_ns, tokens.storage_loads, tokens.storage_loads_ns) == (25 * MS, 0, 0)
    assert bench.ids(OpKind.WRITE) == [1, 2, 3, 4]


def test_a_load_that_ends_in_time_is_used() -> None:
    """The same reads with 40 ms for them end at 40 ms; one token is computed."""
    io = ModelledIO(servers=1, latency_ns={OpKind.READ: 10 * MS})
    bench = EngineBench(replace(PACED, load_timeout=Limits({16: 40})), io)

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3, 4)
        begin_ns = now_ns()
        await bench.ask(1, 2, 3, 4)
        assert now_ns() - begin_ns == 41 * MS

    run_virtual(play())
    assert bench.recorder.requests.loads_abandoned == 0
    assert bench.recorder.requests.hit_blocks.storage == 4


def test_an_abandoned_load_waits_for_its_copies() -> None:
    """DRAM has no limit: the copy of 30 ms is used, the read that was given up at 10 ms is computed."""
    latency_ns = {OpKind.READ: 50 * MS, OpKind.COPY_OUT: 30 * MS}
    bench = EngineBench(replace(PACED, load_timeout=Limits({4: 10}), cpu_blocks=1), ModelledIO(latency_ns=latency_ns))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        begin_ns = now_ns()
        await bench.ask(1, 2)
        assert now_ns() - begin_ns == (30 + 4) * MS

    run_virtual(play())
    requests = bench.recorder.requests
    assert (requests.hit_blocks.cpu, requests.hit_blocks.storage, requests.loads_abandoned) == (1, 0, 1)


def test_blocks_of_an_abandoned_load_stay_until_their_reads_have_ended() -> None:
    """A full tier of one: its block is read to 100 ms although nobody waits any more; only then can it go."""
    io = ModelledIO(latency_ns={OpKind.READ: 100 * MS})
    bench = EngineBench(replace(PLAIN, storage_blocks=1, load_timeout=Limits({4: 10})), io)

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask(1)
        assert now_ns() == 10 * MS
        await bench.ask_and_settle(2)
        assert bench.recorder.window.writes_dropped == 1
        await sleep_ms(91)
        await bench.ask_and_settle(2)

    run_virtual(play())
    assert bench.io.stored == {2}
    assert bench.io.misuses == bench.failures == []


@pytest.mark.parametrize(("error", "reported"), [(OSError(5, "Input/output error"), True), (None, False)])
def test_what_fails_after_a_load_was_abandoned_is_told(error: OSError | None, *, reported: bool) -> None:
    """The request is answered all the same; a failed call is reported, wrong data is kept and its block forgotten."""
    wrong = VerifyError("object", 0, (1, 0), (2, 0))
    io = ModelledIO(latency_ns={OpKind.READ: 100 * MS}, failures={(OpKind.READ, 1): error or wrong})
    bench = EngineBench(replace(PLAIN, load_timeout=Limits({4: 10})), io)

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask(1)
        await bench.io.idle()
        await sleep_ms(1)
        await bench.engine.settle()

    run_virtual(play())
    assert bench.recorder.requests.completed == 2
    assert bench.failures == ([error] if reported else [])
    assert bench.recorder.verify_failures == (0 if reported else 1)
    assert bench.io.stored == ({1} if reported else set())


# From which use on a block is stored


def test_a_block_is_stored_from_its_second_use_on() -> None:
    """First uses are counted, and nothing is written for them; the second use of 1 and 2 writes them."""
    bench = EngineBench(SECOND_USE)

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        assert bench.ids(OpKind.WRITE) == []
        assert bench.recorder.window.writes_deferred == 2
        await bench.ask_and_settle(1, 2, 3)
        assert bench.ids(OpKind.WRITE) == [1, 2]
        assert await bench.ask_and_settle(1, 2, 3) == 2

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2, 3]
    assert bench.recorder.window.writes_deferred == 3
    assert bench.recorder.window.writes_dropped == bench.recorder.window.dedup_skipped_bytes == 0


def test_a_use_of_a_block_in_gpu_or_dram_counts() -> None:
    """Found on the GPU and in DRAM the second time, not computed: written all the same."""
    bench = EngineBench(replace(SECOND_USE, gpu_blocks=1, cpu_blocks=1))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        assert await bench.ask_and_settle(1, 2) == 2

    run_virtual(play())
    assert (bench.recorder.requests.hit_blocks.gpu, bench.recorder.requests.hit_blocks.cpu) == (1, 1)
    assert bench.ids(OpKind.WRITE) == [1, 2]


def test_a_block_that_storage_had_and_lost_was_used_before() -> None:
    """Evicted, then computed again: its third use, so it is written."""
    bench = EngineBench(replace(SECOND_USE, storage_blocks=1))

    async def play() -> None:
        for block_id in (1, 1, 2, 2, 1):
            await bench.ask_and_settle(block_id)

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2, 1]
    assert bench.ids(OpKind.DELETE) == [1, 2]
    assert bench.recorder.window.writes_deferred == 2


def test_a_first_use_that_collects_for_an_interval_is_not_a_second() -> None:
    """Between its second use and its write a block is neither deferred nor queued twice."""
    bench = EngineBench(replace(SECOND_USE, write_interval_s=0.01))

    async def play() -> None:
        for _ in range(3):
            await bench.ask(1)
        await bench.engine.settle()

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1]
    assert bench.recorder.window.writes_deferred == 1
    assert bench.recorder.window.dedup_skipped_bytes == PLAIN.object_bytes


# A head that goes while its request runs


def test_a_block_that_was_read_and_evicted_while_its_request_ran_is_written_again() -> None:
    """A tier of two: while 1 is read and 2 is generated for 100 ms, others push 1 out; 2 alone could not be found."""
    bench = EngineBench(replace(PACED, storage_blocks=2))

    async def play() -> None:
        await bench.ask_and_settle(1)
        asking = asyncio.create_task(bench.ask(1, 2, output_tokens=11))
        await sleep_ms(10)
        await bench.ask_and_settle(8, 9)
        assert bench.io.stored == {8, 9}
        await asking
        await bench.engine.settle()
        assert await bench.ask_and_settle(1, 2) == 2

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 8, 9, 1, 2]
    assert bench.recorder.window.dedup_skipped_bytes == 0
    assert bench.io.misuses == []


def test_a_block_on_the_gpu_that_storage_has_lost_is_not_written_again() -> None:
    """Only what was computed or read from storage is: a block that stayed on the GPU all the time is not new."""
    bench = EngineBench(replace(PLAIN, gpu_blocks=1, storage_blocks=1, touch=TouchOrder.HEAD))

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask_and_settle(1)

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1]


# All at once


def test_a_block_that_was_dropped_is_written_when_it_is_computed_again() -> None:
    """A queue of one drops the second block; the next request finds the first and writes the second."""
    bench = EngineBench(replace(PLAIN, write_overflow=WriteOverflow.DROP, write_queue_blocks=1))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        assert await bench.ask_and_settle(1, 2) == 1
        assert await bench.ask_and_settle(1, 2) == 2

    run_virtual(play())
    assert bench.ids(OpKind.WRITE) == [1, 2]
    assert bench.recorder.window.writes_dropped == 1


# What was found on storage, and DRAM


@pytest.mark.parametrize("decisions", Decisions)
@pytest.mark.parametrize(
    ("promote", "copied", "found"), [(Promotion.ALWAYS, [1, 2, 1], (1, 2)), (Promotion.NEVER, [1, 2], (1, 2))]
)
def test_without_a_gpu_tier_what_was_read_goes_to_dram_or_does_not(
    promote: Promotion, copied: list[int], found: tuple[int, int], decisions: Decisions
) -> None:
    """A DRAM tier of one: 1, then 2 pushes it out. 1 is read, and pushes out 2, or leaves it where it is.

    Then 2 and 1 are asked for: the one that lies in DRAM is copied out of it, the other is read.
    """
    bench = EngineBench(replace(PLAIN, cpu_blocks=1, promote=promote, decisions=decisions))

    async def play() -> None:
        for block_id in (1, 2, 1):
            await bench.ask_and_settle(block_id)
        assert bench.ids(OpKind.READ) == [1]
        assert bench.ids(OpKind.COPY_IN) == copied
        await bench.ask_and_settle(1 if promote is Promotion.ALWAYS else 2)
        assert bench.ids(OpKind.COPY_OUT) == [1 if promote is Promotion.ALWAYS else 2]
        await bench.ask_and_settle(2 if promote is Promotion.ALWAYS else 1)

    run_virtual(play())
    hits = bench.recorder.requests.hit_blocks
    assert (hits.cpu, hits.storage) == found
    assert bench.io.misuses == []


def test_what_was_computed_behind_it_goes_to_dram_all_the_same() -> None:
    """1 and 2 are read and not promoted, 3 is new: DRAM takes it alone, and keeps what of the chain it had."""
    bench = EngineBench(replace(PLAIN, cpu_blocks=2, promote=Promotion.NEVER))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask_and_settle(8, 9)
        assert bench.io.slots == {0: 9, 1: 8} or set(bench.io.slots.values()) == {8, 9}
        await bench.ask_and_settle(1, 2, 3)

    run_virtual(play())
    assert bench.ids(OpKind.READ) == [1, 2]
    assert bench.ids(OpKind.COPY_IN) == [2, 1, 9, 8, 3]
    # 9, the tail, was the older of the two.
    assert set(bench.io.slots.values()) == {8, 3}


@pytest.mark.parametrize(("promote", "copied", "found"), [(Promotion.ALWAYS, [6, 2], 1), (Promotion.NEVER, [6], 0)])
def test_with_a_gpu_tier_what_finds_no_room_there_goes_to_dram_or_does_not(
    promote: Promotion, copied: list[int], found: int
) -> None:
    """A GPU tier of one, DRAM of two. Of each chain of two the head goes to the GPU and the tail to DRAM.

    The head goes there, too, when the next chain comes: in the end 1 and 2 are on storage alone, 6 on the GPU, 8 and 7
    in DRAM. Where 1 and 2 are read, 1 takes the place of 6, which goes to DRAM; 2 finds no place.
    """
    bench = EngineBench(replace(PLAIN, gpu_blocks=1, cpu_blocks=2, promote=promote))

    async def play() -> None:
        for chain in ((1, 2), (8, 9), (6, 7)):
            await bench.ask_and_settle(*chain)
        assert bench.ids(OpKind.COPY_IN) == [2, 1, 9, 8, 7]
        await bench.ask_and_settle(1, 2)
        assert bench.ids(OpKind.READ) == [1, 2]
        assert bench.ids(OpKind.COPY_IN)[5:] == copied
        await bench.ask_and_settle(1, 2)

    run_virtual(play())
    hits = bench.recorder.requests.hit_blocks
    assert (hits.gpu, hits.cpu, hits.storage) == (1, found, 2 + 1 - found)


def test_what_leaves_the_gpu_goes_to_dram_whatever_it_came_from() -> None:
    """1 is read from storage and has room on the GPU; pushed out of it by 5 it is found in DRAM."""
    bench = EngineBench(replace(PLAIN, gpu_blocks=1, cpu_blocks=2, promote=Promotion.NEVER))

    async def play() -> None:
        for block_id in (1, 2, 3, 4, 1, 5):
            await bench.ask_and_settle(block_id)
        assert bench.ids(OpKind.READ) == [1]
        assert await bench.ask_and_settle(1) == 1

    run_virtual(play())
    assert bench.ids(OpKind.READ) == bench.ids(OpKind.COPY_OUT) == [1]
    assert bench.recorder.requests.hit_blocks.cpu == 1
