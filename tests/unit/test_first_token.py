"""The parts of TTFT, and what it would have been without a cache: worked by hand, alone and through the engine."""

import asyncio
from dataclasses import replace

import pytest

from mlpstorage.config import GenerationMode
from mlpstorage.kvcache.first_token import FirstToken, TtftTally
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.plan.compute import ConstantCompute
from mlpstorage.storage.ops import OpKind
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench, now_ns, request, sleep_ms
from mlpstorage.testing.virtual import ModelledIO, run_virtual

# A prompt of 160 tokens at 1 ns each: 100 from storage, 20 from DRAM, 40 computed.
TOKEN = FirstToken(
    at_ns=1000,
    client_late_ns=7,
    lookup_ns=3,
    storage_load_ns=50,
    dram_load_ns=5,
    copies_ns=55,
    prefill_queue_ns=11,
    prefill_ns=41,
    storage_load_tokens=100,
    storage_recompute_ns=100,
    prompt_prefill_ns=160,
    needed_prefill_ns=40,
    waits_in_full=True,
)
# A prompt token takes 1 ms.
PACED = replace(PLAIN, pacing=replace(PLAIN.pacing, mode=GenerationMode.REALISTIC))


def test_the_parts_of_ttft_add_up_to_it() -> None:
    """7 + 3 + 50 + 5 + 11 + 41."""
    assert TOKEN.load_ns == 55
    assert TOKEN.ttft_ns == 117


def test_what_a_cache_saved_is_computing_less_loading() -> None:
    """160 - 40 computed, 55 loaded; what was waited for the accelerators or the client is no matter of the cache."""
    assert TOKEN.saved_ns == 160 - 40 - 55
    assert replace(TOKEN, client_late_ns=1000, prefill_queue_ns=1000).saved_ns == 65


def test_a_load_that_takes_longer_than_computing_saves_less_than_nothing() -> None:
    """120 ns to compute, 305 to load."""
    assert replace(TOKEN, storage_load_ns=300).saved_ns == -185


def test_ttft_without_a_cache_has_the_same_waits_and_all_of_the_prompt() -> None:
    """7 + 3 + 11 and 160, not the 55 and 41 of loading and computing the rest."""
    assert TOKEN.without_cache_ns == 21 + 160


def test_ttft_without_storage_keeps_the_other_tiers() -> None:
    """100 ns of computing more; the copies took 55 ns all the same. Had they taken 20 beside the reads' 50, 30 less."""
    assert TOKEN.without_storage_ns == 217
    assert replace(TOKEN, dram_load_ns=0, copies_ns=20).without_storage_ns == 112 - 50 + 20 + 100
    assert replace(TOKEN, dram_load_ns=0, copies_ns=0).without_storage_ns == 112 - 50 + 100


@pytest.mark.parametrize("storage_load_ns", [0, 25])
def test_without_anything_used_from_storage_it_is_what_it_was_but_for_reads_in_vain(storage_load_ns: int) -> None:
    """No load changes nothing; one that was abandoned after 25 ns would not have been waited for."""
    nothing = replace(TOKEN, dram_load_ns=0, copies_ns=0, storage_load_tokens=0, storage_recompute_ns=0)
    token = replace(nothing, storage_load_ns=storage_load_ns)
    assert token.without_storage_ns == token.ttft_ns - storage_load_ns == 62


def test_where_time_is_not_waited_for_in_full_there_is_no_other_ttft() -> None:
    """A measured load and a tenth of the prefill do not compare with a whole prefill; what was saved is in full."""
    token = replace(TOKEN, waits_in_full=False)
    assert (token.without_cache_ns, token.without_storage_ns, token.saved_ns) == (None, None, 65)


def test_what_is_not_modelled_is_not_compared() -> None:
    """None, and not 0."""
    token = replace(TOKEN, storage_recompute_ns=None, prompt_prefill_ns=None, needed_prefill_ns=None)
    assert (token.without_cache_ns, token.without_storage_ns, token.saved_ns) == (None, None, None)
    assert token.ttft_ns == 117


# Sums


def test_sums_of_first_tokens() -> None:
    """Three tokens: one with a load that was quicker than computing, one slower, one without."""
    tally = TtftTally()
    tally.add(TOKEN, 117)
    tally.add(replace(TOKEN, storage_load_ns=101), 117)
    tally.add(
        replace(TOKEN, storage_load_ns=0, storage_load_tokens=0, storage_recompute_ns=0, needed_prefill_ns=140), 117
    )
    assert tally == TtftTally(
        requests=3,
        within_target=2,
        client_late_ns=21,
        lookup_ns=9,
        storage_load_ns=151,
        dram_load_ns=15,
        prefill_queue_ns=33,
        prefill_ns=123,
        storage_loads=2,
        storage_load_tokens=200,
        storage_loads_ns=151,
        storage_recompute_ns=200,
        storage_slower_loads=1,
    )


@pytest.mark.parametrize(("target_ns", "within"), [(116, 0), (117, 1), (118, 1)])
def test_the_target_itself_is_within_the_target(target_ns: int, within: int) -> None:
    """TTFT is 117 ns."""
    tally = TtftTally()
    tally.add(TOKEN, target_ns)
    assert tally.within_target == within


def test_a_load_that_takes_as_long_as_computing_is_not_slower() -> None:
    """100 ns either way."""
    tally = TtftTally()
    tally.add(replace(TOKEN, storage_load_ns=100), 1)
    assert (tally.storage_loads, tally.storage_slower_loads) == (1, 0)


def test_reads_in_vain_are_a_part_of_ttft_and_no_load() -> None:
    """An abandoned load has its time in the parts, and in none of the figures of loads."""
    tally = TtftTally()
    tally.add(replace(TOKEN, storage_load_tokens=0, storage_recompute_ns=0), 1)
    assert (tally.storage_load_ns, tally.storage_loads, tally.storage_loads_ns) == (50, 0, 0)
    assert (tally.storage_recompute_ns, tally.storage_slower_loads) == (0, 0)


def test_one_load_that_is_not_modelled_makes_the_sum_unknown_for_good() -> None:
    """A sum over the others would pass for the whole; what was measured goes on adding up."""
    tally = TtftTally()
    for recompute_ns in (100, None, 100):
        tally.add(replace(TOKEN, storage_recompute_ns=recompute_ns), 1)
    assert (tally.storage_recompute_ns, tally.storage_slower_loads) == (None, None)
    assert (tally.storage_loads, tally.storage_load_tokens, tally.storage_loads_ns) == (3, 300, 150)


# Through the engine


def test_the_parts_of_a_request_that_waits_for_its_load_and_for_the_accelerators() -> None:
    """Beside it come prefills of 4 and 8 ms, so that they are free at 12 ms; its load ends at 5 ms, it at 16 ms.

    Reading 4 tokens took 5 ms, computing them takes 4: storage was slower. Without it, 16 - 5 + 4; without a cache 8 ms
    of computing after 7 ms of waiting; saved is 8 - 4 - 5.
    """
    bench = EngineBench(PACED, ModelledIO(latency_ns={OpKind.READ: 5 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1)
        begin_ns = now_ns()
        async with asyncio.TaskGroup() as group:
            for chain in ((1, 2), (8,), (9, 10)):
                group.create_task(bench.ask(*chain))
        assert now_ns() == begin_ns + 16 * MS

    run_virtual(play())
    recorder = bench.recorder
    # The first request alone: 4. Then 16, 4 and 4 + 8.
    assert recorder.first_tokens == TtftTally(
        requests=4,
        within_target=4,
        storage_load_ns=5 * MS,
        prefill_queue_ns=(7 + 4) * MS,
        prefill_ns=(4 + 4 + 4 + 8) * MS,
        storage_loads=1,
        storage_load_tokens=4,
        storage_loads_ns=5 * MS,
        storage_recompute_ns=4 * MS,
        storage_slower_loads=1,
    )
    latency = recorder.latency
    assert (latency["ttft"].sum_ns, latency["ttft"].max_ns) == ((4 + 16 + 4 + 12) * MS, 16 * MS)
    assert (latency["ttft_without_storage"].count, latency["ttft_without_storage"].max_ns) == (4, 15 * MS)
    assert (latency["ttft_without_cache"].count, latency["ttft_without_cache"].max_ns) == (4, 15 * MS)
    assert (latency["prefill_queue"].count, latency["prefill_queue"].max_ns) == (4, 7 * MS)
    assert (recorder.saved.losses.count, recorder.saved.losses.sum_ns, recorder.saved.gains.sum_ns) == (1, 1 * MS, 0)


def test_a_copy_from_dram_that_takes_longer_than_the_read_is_the_other_part_of_the_load() -> None:
    """Read to 2 ms, copied to 9 ms: 2 and 7. Client 3 ms late, one block of 4 ms computed: 16 ms."""
    latency_ns = {OpKind.READ: 2 * MS, OpKind.COPY_OUT: 9 * MS}
    bench = EngineBench(replace(PACED, cpu_blocks=1), ModelledIO(latency_ns=latency_ns))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        begin_ns = now_ns()
        await sleep_ms(3)
        await bench.engine.serve(request((1, 2, 3), 12), begin_ns)
        assert now_ns() == begin_ns + 16 * MS

    run_virtual(play())
    tokens = bench.recorder.first_tokens
    assert (tokens.client_late_ns, tokens.storage_load_ns, tokens.dram_load_ns) == (3 * MS, 2 * MS, 7 * MS)
    assert tokens.prefill_ns == (8 + 4) * MS
    assert bench.recorder.latency["client_late"].max_ns == 3 * MS
    # 12 - 4 ms of computing less 9 of loading.
    assert (bench.recorder.saved.losses.count, bench.recorder.saved.losses.sum_ns) == (1, 1 * MS)


def test_a_copy_that_ends_before_the_read_takes_no_time_of_its_own() -> None:
    """Both begin at once: 9 ms to read, 2 to copy."""
    latency_ns = {OpKind.READ: 9 * MS, OpKind.COPY_OUT: 2 * MS}
    bench = EngineBench(replace(PACED, cpu_blocks=1), ModelledIO(latency_ns=latency_ns))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask(1, 2, 3)

    run_virtual(play())
    tokens = bench.recorder.first_tokens
    assert (tokens.storage_load_ns, tokens.dram_load_ns) == (9 * MS, 0)


@pytest.mark.parametrize("mode", [GenerationMode.FAST, GenerationMode.NONE])
def test_in_other_modes_than_the_realistic_one_only_what_was_saved_is_told(mode: GenerationMode) -> None:
    """12 loaded tokens, 12 ms of computing in full, 3 ms of reading: 9 saved, whatever was waited for."""
    config = replace(PLAIN, pacing=replace(PLAIN.pacing, mode=mode))
    bench = EngineBench(config, ModelledIO(latency_ns={OpKind.READ: 3 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2, 3)
        await bench.ask_and_settle(1, 2, 3, 4)

    run_virtual(play())
    recorder = bench.recorder
    assert recorder.latency["ttft_without_cache"].count == recorder.latency["ttft_without_storage"].count == 0
    assert (recorder.saved.count, recorder.saved.gains.sum_ns) == (2, 9 * MS)
    assert (recorder.first_tokens.storage_recompute_ns, recorder.first_tokens.storage_slower_loads) == (12 * MS, 0)


def test_the_engine_compares_nothing_where_compute_is_not_modelled() -> None:
    """The load is counted, and nothing is said of what it saved."""
    pacing = Pacing(
        mode=GenerationMode.REALISTIC, compute=ConstantCompute(prefill_tokens_per_s=None, decode_tokens_per_s=None)
    )
    bench = EngineBench(replace(PLAIN, pacing=pacing), ModelledIO(latency_ns={OpKind.READ: 3 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1)
        await bench.ask_and_settle(1, 2)

    run_virtual(play())
    tokens = bench.recorder.first_tokens
    assert (tokens.requests, tokens.storage_loads, tokens.storage_loads_ns) == (2, 1, 3 * MS)
    assert (tokens.storage_recompute_ns, tokens.storage_slower_loads, bench.recorder.saved.count) == (None, None, 0)
    assert bench.recorder.latency["ttft_without_cache"].count == 0


def test_the_last_token_of_a_full_hit_is_computed_and_not_read() -> None:
    """Two blocks of 4 tokens are read, seven tokens are used: computing these, too, would take 7 ms."""
    bench = EngineBench(PACED, ModelledIO(latency_ns={OpKind.READ: 5 * MS}))

    async def play() -> None:
        await bench.ask_and_settle(1, 2)
        await bench.ask(1, 2)

    run_virtual(play())
    tokens = bench.recorder.first_tokens
    assert (tokens.storage_load_tokens, tokens.storage_recompute_ns, tokens.prefill_ns) == (7, 7 * MS, (8 + 1) * MS)
    assert bench.recorder.saved.gains.sum_ns == (8 - 1 - 5) * MS
