"""The merge of ranks, against sums worked by hand and percentiles taken from sorted samples."""

import hashlib
import random
from collections.abc import Sequence

import pytest

from mlpstorage.config import GIB, RunStatus
from mlpstorage.results.models import (
    LATENCIES,
    RankError,
    RankResult,
    RequestCounts,
    Reuse,
    Sample,
    StorageCounts,
    TierCounts,
    TtftCounts,
)
from mlpstorage.results.summary import Saved, Summary
from tests.records import (
    IDLE,
    NO_STORAGE,
    NO_TOKENS,
    client,
    costing,
    exported,
    merge,
    rank,
    reused,
    saved,
    storage_times,
    window,
)


def nearest_rank_ns(samples_ns: Sequence[int], percent: float) -> int:
    """The percentile by its definition: of the sorted samples, the one that `percent` do not exceed."""
    return sorted(samples_ns)[-int(-len(samples_ns) * percent // 100) - 1]


BUSY = [
    rank(
        0,
        window=window(10.0, warmup_s=2.0, drain_s=0.5, in_flight=3),
        requests=RequestCounts(
            completed=30,
            failed=1,
            loads_skipped=5,
            loads_abandoned=2,
            prompt_tokens=6_000,
            output_tokens=900,
            prompt_blocks=60,
            cached_tokens=TierCounts(gpu=1_000, cpu=500, storage=1_500),
            hit_blocks=TierCounts(gpu=10, cpu=5, storage=15),
            cross_rank_tokens=600,
            cross_rank_blocks=6,
        ),
        storage=NO_STORAGE.model_copy(
            update={"read_bytes": 6 * GIB, "written_bytes": 2 * GIB, "padding_bytes": GIB, "read_ops": 60}
        ),
        storage_total=NO_STORAGE.model_copy(update={"read_bytes": 7 * GIB, "direct_files": 11}),
        client=client(cpu_s=3.0, rss_bytes=100, os_bytes=10),
    ),
    rank(
        1,
        window=window(8.0, warmup_s=3.0, drain_s=1.5, in_flight=4),
        requests=RequestCounts(
            completed=10,
            failed=2,
            loads_skipped=7,
            loads_abandoned=1,
            prompt_tokens=2_000,
            output_tokens=100,
            prompt_blocks=20,
            cached_tokens=TierCounts(gpu=0, cpu=0, storage=1_000),
            hit_blocks=TierCounts(gpu=0, cpu=0, storage=10),
            cross_rank_tokens=200,
            cross_rank_blocks=4,
        ),
        storage=NO_STORAGE.model_copy(
            update={"read_bytes": 2 * GIB, "written_bytes": 3 * GIB, "padding_bytes": 0, "read_ops": 20}
        ),
        storage_total=NO_STORAGE.model_copy(update={"read_bytes": 3 * GIB, "direct_files": 22}),
        client=client(cpu_s=1.0, rss_bytes=300, os_bytes=20),
    ),
    rank(
        2,
        host="h2",
        window=window(10.0, warmup_s=1.0, drain_s=0.25),
        storage=NO_STORAGE.model_copy(update={"read_bytes": 2 * GIB, "read_ops": 5}),
        client=client(cpu_s=0.5, rss_bytes=200, os_bytes=30),
    ),
]
"""Two ranks on h1 and one on h2."""


def test_window_is_the_longest_of_any_rank() -> None:
    """Each phase is that of the rank for which it was longest; requests in flight are added."""
    merged = merge(*BUSY).window
    assert (merged.warmup_s, merged.measured_s, merged.drain_s) == (3.0, 10.0, 1.5)
    assert merged.requests_in_flight_at_end == 3 + 4


def test_counts_are_added_and_rates_divide_by_the_window() -> None:
    """Sums over the ranks; rates are the sums over the ten seconds of the longest window."""
    summary = merge(*BUSY)
    requests, storage = summary.requests, summary.storage
    assert (requests.completed, requests.failed) == (40, 3)
    assert (requests.loads_skipped, requests.loads_abandoned) == (12, 3)
    assert requests.rate_per_s == 4.0
    assert requests.prompt_tokens_per_s == 800.0
    assert requests.cached_tokens_per_s == 400.0
    assert requests.output_tokens_per_s == 100.0
    assert (storage.read_bytes, storage.written_bytes, storage.padding_bytes) == (10 * GIB, 5 * GIB, GIB)
    assert storage.read_ops == 85
    assert (storage.read_gib_per_s, storage.write_gib_per_s) == (1.0, 0.5)
    assert (summary.storage_total.read_bytes, summary.storage_total.direct_files) == (10 * GIB, 33)


def test_every_storage_count_is_added() -> None:
    """No field of the counts is left out: with 1, 2, 3 ... in one rank and tenfold in another, each is elevenfold."""
    one = StorageCounts(**{name: number for number, name in enumerate(StorageCounts.model_fields, 1)})
    ten = StorageCounts(**{name: 10 * number for number, name in enumerate(StorageCounts.model_fields, 1)})
    summary = merge(rank(0, storage=one, storage_total=ten), rank(1, storage=ten, storage_total=ten))
    for number, name in enumerate(StorageCounts.model_fields, 1):
        assert getattr(summary.storage, name) == 11 * number
        assert getattr(summary.storage_total, name) == 20 * number


def test_page_cache_bytes_are_whole_or_absent() -> None:
    """Where one rank cannot tell what the page cache held, nor can the run; the other counts stay, and each phase."""
    known = NO_STORAGE.model_copy(update={"page_cache_bytes": 3 * GIB, "sync_ops": 4, "retries": 1})
    unknown = known.model_copy(update={"page_cache_bytes": None})
    summary = merge(rank(0, storage=known, storage_total=known), rank(1, storage=unknown, storage_total=known))
    assert summary.storage.page_cache_bytes is None
    assert (summary.storage.sync_ops, summary.storage.retries) == (8, 2)
    assert summary.storage_total.page_cache_bytes == 6 * GIB


def test_dropped_page_cache_is_whole_or_absent() -> None:
    """Bytes that the page cache forgot are added; where one rank does not know them, the run does not."""
    assert (
        merge(*(rank(number, dropped_page_cache_bytes=5 + number) for number in (0, 1))).dropped_page_cache_bytes == 11
    )
    ranks = [rank(0, dropped_page_cache_bytes=5), rank(1, dropped_page_cache_bytes=None)]
    assert merge(*ranks).dropped_page_cache_bytes is None


def test_reuse_is_added_and_takes_the_longest_time() -> None:
    """Ranks search at the same time, so the run waited for the slowest; a rank that reused nothing adds nothing."""
    first = Reuse(objects=1, bytes=20, damaged_objects=300, incomplete_blocks=4_000, foreign_entries=50, rebuild_s=0.5)
    second = Reuse(objects=6, bytes=70, damaged_objects=800, incomplete_blocks=9_000, foreign_entries=10, rebuild_s=0.2)
    assert merge(rank(0, reuse=first), rank(1), rank(2, reuse=second)).reuse == Reuse(
        objects=7, bytes=90, damaged_objects=1_100, incomplete_blocks=13_000, foreign_entries=60, rebuild_s=0.5
    )


def test_no_reuse_is_none() -> None:
    """A run without `--reuse-cache` found nothing because it did not look: None, not zeros."""
    assert merge(*BUSY).reuse is None


def test_verify_failures_stand_in_rank_order() -> None:
    """Messages of the ranks follow each other by rank, whatever order the ranks came in."""
    ranks = [rank(1, verify_failures=("c",)), rank(2), rank(0, verify_failures=("a", "b"))]
    assert merge(*ranks).verify_failures == ("a", "b", "c")


def test_verify_failures_are_at_most_a_hundred() -> None:
    """Of 60 messages of each of two ranks, all of the first and 40 of the second are kept."""
    first, second = (tuple(f"{name}{number}" for number in range(60)) for name in "ab")
    merged = merge(rank(0, verify_failures=first), rank(1, verify_failures=second)).verify_failures
    assert merged == first + second[:40]


def test_hit_ratio_is_found_over_asked() -> None:
    """Tokens and blocks of each tier over those of all prompts, not the mean of the ranks' ratios."""
    ratio = merge(*BUSY).hit_ratio
    assert (ratio.tokens.gpu, ratio.tokens.cpu, ratio.tokens.storage) == (1_000 / 8_000, 500 / 8_000, 2_500 / 8_000)
    assert ratio.tokens.total == 0.5
    assert (ratio.blocks.gpu, ratio.blocks.cpu, ratio.blocks.storage) == (10 / 80, 5 / 80, 25 / 80)
    assert ratio.blocks.total == 0.5
    assert (ratio.tokens.cross_rank, ratio.blocks.cross_rank) == (800 / 8_000, 10 / 80)


def test_percentiles_are_those_of_the_pooled_samples() -> None:
    """A slow rank with few samples and a fast one with many: the merged percentiles are those of all samples sorted."""
    random_ns = random.Random(7)  # noqa: S311 - test data
    fast_ns = [random_ns.randrange(1_000_000, 3_000_000) for _ in range(20_000)]
    slow_ns = [random_ns.randrange(50_000_000, 90_000_000) for _ in range(1_500)]
    summary = merge(
        rank(0, latency={**IDLE.latency, "ttft": exported(fast_ns)}),
        rank(1, latency={**IDLE.latency, "ttft": exported(slow_ns)}),
    )
    ttft, pooled_ns = summary.latency["ttft"], fast_ns + slow_ns
    assert ttft.count == 21_500
    assert ttft.mean_ms == pytest.approx(sum(pooled_ns) / 21_500 / 1e6, rel=1e-6)
    assert (ttft.min_ms, ttft.max_ms) == pytest.approx((min(pooled_ns) / 1e6, max(pooled_ns) / 1e6))
    for percent, merged_ms in ((50, ttft.p50_ms), (90, ttft.p90_ms), (95, ttft.p95_ms), (99, ttft.p99_ms)):
        assert merged_ms == pytest.approx(nearest_rank_ns(pooled_ns, percent) / 1e6, rel=0.008)
    # The mean of the two ranks' own 95th percentiles lies far off.
    averaged_ms = (nearest_rank_ns(fast_ns, 95) + nearest_rank_ns(slow_ns, 95)) / 2 / 1e6
    assert ttft.p95_ms is not None
    assert abs(averaged_ms - ttft.p95_ms) > 0.2 * ttft.p95_ms


def test_every_latency_is_merged_and_none_invented() -> None:
    """Each latency has its own samples; one that only some ranks know is merged from those."""
    first = {name: exported([number]) for number, name in enumerate(LATENCIES)}
    second = {name: exported([number]) for number, name in enumerate(LATENCIES)} | {"new_one": exported([77])}
    merged = merge(rank(0, latency=first), rank(1, latency=second)).latency
    assert list(merged) == [*LATENCIES, "new_one"]
    for number, name in enumerate(LATENCIES):
        assert merged[name].histogram.counts == {number: 2}
    assert merged["new_one"].histogram.counts == {77: 1}


def test_idle_run_has_no_rates_of_zero() -> None:
    """What has no denominator is None: ratios without a prompt, costs without a byte, savings without a hit."""
    summary = merge(IDLE)
    assert summary.hit_ratio.tokens.total is None
    assert summary.hit_ratio.blocks.gpu is None
    assert summary.client.cpu_ms_per_gib is None
    assert summary.client.payload_cpu_share is None
    assert summary.client.bottleneck_reason is None
    assert summary.breakeven.load_gib_per_s is None
    assert summary.breakeven.storage_saved_mean_ms is None
    assert summary.saved.mean_ms is None
    assert summary.ttft_parts.storage_share is None
    assert summary.reuse_distance.first_use_share is None
    assert (summary.slo.met, summary.slo.within_target) == (None, None)
    # Without a line in the window there is no second in which most was read.
    assert (summary.storage.read_peak_gib_per_s, summary.storage.read_burst_ratio) == (None, None)
    assert summary.latency["ttft"].p50_ms is None
    # It did measure ten seconds, in which nothing was read: that is a rate of 0, and known.
    assert summary.storage.read_gib_per_s == 0.0
    assert summary.requests.rate_per_s == 0.0
    assert summary.slo.goodput_per_s == 0.0


def test_run_that_never_measured_has_no_rates() -> None:
    """A run that ended in its warm-up has None for every rate, also of its hosts, and its client is not blamed."""
    summary = merge(rank(0, base=BUSY[0], window=window(0.0, warmup_s=1.0)))
    assert summary.storage.read_gib_per_s is None
    assert summary.storage.write_gib_per_s is None
    assert summary.requests.rate_per_s is None
    assert summary.requests.cached_tokens_per_s is None
    assert summary.hosts[0].read_gib_per_s is None
    assert summary.client.bottleneck is False
    assert summary.storage_total.read_bytes == 7 * GIB


def test_client_cost_is_per_gib_moved() -> None:
    """4.5 s of processor time for 10 GiB read, 5 written and 1 of padding: 281.25 ms a GiB."""
    merged = merge(*BUSY).client
    assert merged.cpu_s == 4.5
    assert merged.cpu_ms_per_gib == 4_500 / 16
    assert merged.max_rss_bytes == 300
    assert (merged.os_read_bytes, merged.os_written_bytes) == (60, 60)


def test_payload_share_is_that_of_all_processor_time() -> None:
    """3 s and 1 s of processor time, of which 0.5 s and 0.5 s went into payloads: a quarter, not the mean of ratios."""
    ranks = [rank(number, client=costing(cpu_s, payload_cpu_s=0.5)) for number, cpu_s in enumerate((3.0, 1.0))]
    merged = merge(*ranks).client
    assert (merged.cpu_s, merged.payload_cpu_s, merged.payload_cpu_share) == (4.0, 1.0, 0.25)


@pytest.mark.parametrize(("waits_s", "merged"), [((0.25, 0.5), 0.75), ((0.25, None), None), ((0.0, 0.0), 0.0)])
def test_processor_wait_is_whole_or_absent(waits_s: tuple[float, float | None], merged: float | None) -> None:
    """Waits of the ranks are added; where one kernel does not tell, the sum is not known."""
    ranks = [rank(number, client=costing(cpu_wait_s=wait_s)) for number, wait_s in enumerate(waits_s)]
    assert merge(*ranks).client.cpu_wait_s == merged


def test_system_counters_are_whole_or_absent() -> None:
    """Where one rank could not read the system's counters, the sum of the others would pass for the whole."""
    merged = merge(rank(0, client=client(os_bytes=10)), rank(1, client=client(os_bytes=None))).client
    assert merged.os_read_bytes is None
    assert merged.os_written_bytes is None


@pytest.mark.parametrize(
    ("cpu_s", "hosts", "bottleneck"),
    [
        # One host of four cores has 40 s of processor time in ten seconds; nine tenths of it are 36 s.
        ((18.0, 18.0), ("h1", "h1"), False),
        ((18.0, 18.1), ("h1", "h1"), True),
        # On two hosts there are 40 s on each.
        ((18.0, 18.1), ("h1", "h2"), False),
        ((1.0, 36.1), ("h1", "h2"), True),
    ],
)
def test_client_is_the_bottleneck_where_a_host_is_full(
    cpu_s: tuple[float, float], hosts: tuple[str, str], *, bottleneck: bool
) -> None:
    """Above nine tenths of a host's processor time; its cores count once, however many ranks share them."""
    ranks = [rank(number, host=hosts[number], client=client(cpu_s=cpu_s[number])) for number in (0, 1)]
    assert merge(*ranks).client.bottleneck is bottleneck


def test_full_host_is_named_with_its_figures() -> None:
    """36.4 s of the 40 s of h2 are 91 %: the reason names that host, its share and its cores."""
    merged = merge(rank(0, client=client(cpu_s=1.0)), rank(1, host="h2", client=client(cpu_s=36.4))).client
    assert merged.bottleneck_reason == "h2: the client used 91.0% of the processor time of 4 cores, over 90%"


@pytest.mark.parametrize(
    ("wait_s", "storage_s", "bottleneck"),
    [
        # A quarter of 8 s of storage I/O is 2 s, and a tenth of the ten seconds 1 s.
        (2.0, 8.0, False),
        (2.01, 8.0, True),
        # A quarter of 2 s is only 0.5 s: then the tenth of the window decides.
        (1.0, 2.0, False),
        (1.01, 2.0, True),
        # Far over a tenth of the window, but below a quarter of the I/O; and the other way about.
        (9.9, 40.0, False),
        (0.9, 1.0, False),
        # Without any storage I/O there is nothing that the wait could not exceed.
        (1.01, 0.0, True),
    ],
)
def test_client_is_the_bottleneck_where_its_threads_starve(
    wait_s: float, storage_s: float, *, bottleneck: bool
) -> None:
    """Both bounds have to be exceeded, the share of the I/O time and that of the window."""
    merged = merge(rank(client=costing(cpu_wait_s=wait_s), latency=storage_times(storage_read=storage_s))).client
    assert merged.bottleneck is bottleneck
    assert (merged.bottleneck_reason is not None) is bottleneck


def test_starved_host_is_named_with_its_figures() -> None:
    """On h2 two ranks wait 2.2 s together, over a quarter of the 8 s that their four kinds of I/O took."""
    first = storage_times(storage_read=1.0, storage_write=2.0)
    second = storage_times(storage_delete=0.5, storage_sync=4.5) | {"write_behind": exported([90_000_000_000])}
    merged = merge(
        rank(0, latency=storage_times(storage_read=9.0)),
        rank(1, host="h2", client=costing(cpu_wait_s=0.7), latency=first),
        rank(2, host="h2", client=costing(cpu_wait_s=1.5), latency=second),
    ).client
    assert merged.bottleneck_reason == (
        "h2: the client's threads waited 2.2 s for a processor, over 25% of the 8.0 s that count as storage I/O"
    )


def test_waits_on_different_hosts_are_not_added() -> None:
    """Each of two hosts is below the tenth of the window: that both together are over it says nothing."""
    ranks = [rank(number, host=f"h{number}", client=costing(cpu_wait_s=0.9)) for number in (0, 1)]
    assert merge(*ranks).client.bottleneck is False
    assert merge(*(one.model_copy(update={"host": "h1"}) for one in ranks)).client.bottleneck is True


def test_unknown_wait_is_not_a_wait_of_zero() -> None:
    """A rank that cannot tell its wait counts on neither side: 3 s of waiting are held against the other's 8 s alone.

    As a wait of 0 it would bring its own 40 s of I/O, of which 3 s are no quarter. Where no rank can tell, none is
    blamed.
    """
    silent = rank(1, client=costing(cpu_wait_s=None), latency=storage_times(storage_read=40.0))
    merged = merge(rank(0, client=costing(cpu_wait_s=3.0), latency=storage_times(storage_read=8.0)), silent).client
    assert merged.cpu_wait_s is None
    assert merged.bottleneck_reason == (
        "h1: the client's threads waited 3.0 s for a processor, over 25% of the 8.0 s that count as storage I/O"
    )
    assert merge(silent).client.bottleneck is False


@pytest.mark.parametrize(("late", "bottleneck"), [(15, False), (40, True)])
def test_client_is_the_bottleneck_where_its_loops_lag(late: int, *, bottleneck: bool) -> None:
    """Of 2,000 lags of both ranks, 15 late ones are under one in a hundred, 40 are over it: then p99 is 30 ms."""
    lagging = client().model_copy(update={"loop_lag": exported([1_000_000] * (1_000 - late) + [30_000_000] * late)})
    steady = client().model_copy(update={"loop_lag": exported([1_000_000] * 1_000)})
    merged = merge(rank(0, client=lagging), rank(1, client=steady)).client
    assert merged.bottleneck is bottleneck
    assert merged.loop_lag_p99_ms == pytest.approx(30.0 if bottleneck else 1.0, rel=0.008)


@pytest.mark.parametrize(
    ("lag_ns", "reason"),
    [(20_000_000, None), (20_500_000, "the event loop was 20.5 ms late at p99, over 20 ms")],
)
def test_late_loop_is_told_above_twenty_milliseconds(lag_ns: int, reason: str | None) -> None:
    """All lags have one value, hence p99 is exact: 20 ms is no bottleneck, 20.5 ms is one, and the reason tells it."""
    lagging = client().model_copy(update={"loop_lag": exported([lag_ns] * 1_000)})
    assert merge(rank(client=lagging)).client.bottleneck_reason == reason


def first_tokens(**changes: int | None) -> TtftCounts:
    """Sums over first tokens, all 0 but for the changes."""
    return NO_TOKENS.model_copy(update=changes)


def test_break_even_is_of_the_requests_that_read() -> None:
    """Two ranks' sums: 60,000 tokens, 3 s to compute, 4 s to read, in 40 requests, 30 of them slower.

    60,000 / 3 s are 20,000 tokens/s, at 131,072 bytes a token 2.44140625 GiB/s. Read were 60,000 x 131,072 bytes
    (7.32421875 GiB) in 4 s: 1.8310546875 GiB/s. Reading cost each request (3 s - 4 s) / 40 = -25 ms.
    """
    first = first_tokens(
        requests=50,
        storage_loads=30,
        storage_load_tokens=45_000,
        storage_loads_ns=3_500_000_000,
        storage_recompute_ns=2_000_000_000,
        storage_slower_loads=28,
    )
    second = first_tokens(
        requests=10,
        storage_loads=10,
        storage_load_tokens=15_000,
        storage_loads_ns=500_000_000,
        storage_recompute_ns=1_000_000_000,
        storage_slower_loads=2,
    )
    breakeven = merge(rank(0, first_tokens=first), rank(1, first_tokens=second)).breakeven
    assert breakeven.prefill_tokens_per_s == 20_000.0
    assert breakeven.read_gib_per_s_needed == 2.44140625
    assert breakeven.load_gib_per_s == 1.8310546875
    assert (breakeven.storage_loads, breakeven.storage_slower_loads) == (40, 30)
    assert breakeven.storage_saved_mean_ms == -25.0


def test_break_even_is_not_known_where_a_rank_does_not_compute() -> None:
    """Without modelled compute nothing can be held against the reads; what a load got is known all the same.

    1,024 tokens of 131,072 bytes are 1/8 GiB, in half a second 0.25 GiB/s.
    """
    silent = first_tokens(
        requests=1,
        storage_loads=1,
        storage_load_tokens=1_024,
        storage_loads_ns=500_000_000,
        storage_recompute_ns=None,
        storage_slower_loads=None,
    )
    told = first_tokens(storage_recompute_ns=7, storage_slower_loads=0)
    for ranks in ([rank(first_tokens=silent)], [rank(0, first_tokens=silent), rank(1, first_tokens=told)]):
        breakeven = merge(*ranks).breakeven
        assert (breakeven.storage_loads, breakeven.load_gib_per_s) == (1, 0.25)
        assert breakeven.prefill_tokens_per_s is None
        assert breakeven.read_gib_per_s_needed is None
        assert breakeven.storage_slower_loads is None
        assert breakeven.storage_saved_mean_ms is None


def test_parts_are_means_over_all_first_tokens_and_add_up() -> None:
    """Sums of two ranks over their 4 + 6 first tokens; 30 ms of 100 ms are the storage's share."""
    parts = {
        "client_late_ns": (1_000_000, 9_000_000),
        "lookup_ns": (2_000_000, 0),
        "storage_load_ns": (100_000_000, 200_000_000),
        "dram_load_ns": (38_000_000, 20_000_000),
        "prefill_queue_ns": (30_000_000, 100_000_000),
        "prefill_ns": (400_000_000, 100_000_000),
    }
    ranks = [
        rank(number, first_tokens=first_tokens(requests=count, **{name: sums[number] for name, sums in parts.items()}))
        for number, count in enumerate((4, 6))
    ]
    merged = merge(*ranks).ttft_parts
    assert merged.client_late_mean_ms == 1.0
    assert merged.lookup_mean_ms == 0.2
    assert merged.storage_load_mean_ms == 30.0
    assert merged.dram_load_mean_ms == 5.8
    assert merged.prefill_queue_mean_ms == 13.0
    assert merged.prefill_mean_ms == 50.0
    assert merged.storage_share == 0.3


def test_savings_are_pooled_with_their_signs() -> None:
    """60 requests gain 40 ms, 40 lose 10 ms: mean (2,400 - 400) / 100 = 20 ms, p5 a loss, p50 a gain.

    Of 100 differences in order the 5th and all up to the 40th are losses; p5 has only four below it, ten are needed.
    With twice as many it is the 10th, with nine below; with 220 the 11th, and told.
    """
    gains, losses = [40_000_000] * 60, [-10_000_000] * 40
    summary = merge(rank(0, saved=saved(gains + losses[:15])), rank(1, saved=saved(losses[15:])))
    assert (summary.saved.requests, summary.saved.slower_requests) == (100, 40)
    assert summary.saved.mean_ms == 20.0
    assert summary.saved.p5_ms is None
    assert summary.saved.p50_ms == 40.0
    assert summary.saved.p95_ms is None
    many = merge(rank(saved=saved([*gains * 2, *losses * 2, *losses[:20]]))).saved
    assert (many.requests, many.slower_requests) == (220, 100)
    assert (many.p5_ms, many.p50_ms, many.p95_ms) == (-10.0, 40.0, 40.0)
    assert many.mean_ms == pytest.approx((120 * 40 - 100 * 10) / 220, abs=1e-6)
    assert Saved.model_validate_json(many.model_dump_json()) == many


def test_goodput_is_the_requests_within_the_target() -> None:
    """45 of 60 first tokens of two ranks within the target in ten seconds: 75 %, and 4.5 a second."""
    ranks = [
        rank(0, first_tokens=first_tokens(requests=50, within_target=44)),
        rank(1, window=window(8.0), first_tokens=first_tokens(requests=10, within_target=1)),
    ]
    slo = merge(*ranks).slo
    assert (slo.within_target, slo.goodput_per_s) == (0.75, 4.5)
    assert merge(rank(base=ranks[0], window=window(0.0))).slo.goodput_per_s is None


def sample(number: int, t_s: float, read_gib_per_s: float, phase: str = "window") -> Sample:
    """A line of the time series of a rank; only its rate matters here."""
    counters = dict.fromkeys(set(Sample.model_fields) - {"rank", "t_s", "phase", "read_gib_per_s"}, 0)
    return Sample.model_validate(
        counters | {"rank": number, "t_s": t_s, "phase": phase, "read_gib_per_s": read_gib_per_s}
    )


def test_the_peak_is_of_the_second_in_which_all_together_read_most() -> None:
    """Rank 0 reads 3, 1, 2 GiB/s, rank 1 reads 0, 4, 2: together 3, 5, 4. The peaks of each, 3 and 4, never met.

    The run's mean is 20 GiB in ten seconds, hence the bursts are 2.5 times that. Lines of the warm-up do not count.
    """
    read = NO_STORAGE.model_copy(update={"read_bytes": 10 * GIB})
    first = (sample(0, 1.0, 9.0, "warmup"), sample(0, 2.0, 3.0), sample(0, 3.001, 1.0), sample(0, 4.0, 2.0))
    second = (sample(1, 1.0, 9.0, "warmup"), sample(1, 2.001, 0.0), sample(1, 3.0, 4.0), sample(1, 4.1, 2.0))
    storage = merge(rank(0, storage=read, samples=first), rank(1, storage=read, samples=second)).storage
    assert storage.read_gib_per_s == 2.0
    assert storage.read_peak_gib_per_s == 5.0
    assert storage.read_burst_ratio == 2.5
    idle = merge(rank(samples=second[1:2])).storage
    assert (idle.read_peak_gib_per_s, idle.read_burst_ratio) == (0.0, None)


def test_reuse_distances_are_pooled_and_in_gib() -> None:
    """50 first uses; 150 others, 80 of them at 32 blocks, 60 at 64, 10 at 96, over two ranks. A block is 1/32 GiB.

    Of 150 the 75th lies at 32 blocks, 1 GiB; the 135th at 64, 2 GiB; above the 148.5th lie fewer than ten.
    """
    ranks = [
        rank(0, reuse_distance=reused(10, {32: 80, 64: 5})),
        rank(1, reuse_distance=reused(40, {64: 55, 96: 10})),
    ]
    merged = merge(*ranks).reuse_distance
    assert merged.first_use_share == 0.25
    assert (merged.p50_gib, merged.p90_gib, merged.p99_gib) == (1.0, 2.0, None)


def test_sampled_reuse_needs_ten_sampled_blocks_above() -> None:
    """Where a tracked block stands for four, each of ten samples counts four: 40 uses must lie above, not ten."""
    ranks = [rank(0, reuse_distance=reused(0, {10: 4}, weight=1)), rank(1, reuse_distance=reused(0, {20: 396}, 4))]
    merged = merge(*ranks).reuse_distance
    assert merged.first_use_share == 0.0
    # 400 uses: above p90 lie 40, above p99 four. Of 396 there are 39.6 above p90.
    assert (merged.p90_gib, merged.p99_gib) == (20 / 32, None)
    fewer = merge(rank(reuse_distance=reused(0, {20: 396}, 4))).reuse_distance
    assert (fewer.p50_gib, fewer.p90_gib) == (20 / 32, None)


def test_a_warm_up_is_steady_where_that_of_every_rank_is() -> None:
    """None where nobody waited for it; false where any rank's hit ratio was still moving."""

    def of(*steady: bool | None) -> bool | None:
        windows = [window(10.0).model_copy(update={"warmup_steady": one}) for one in steady]
        return merge(*(rank(number, window=one) for number, one in enumerate(windows))).window.warmup_steady

    assert (of(None), of(None, None)) == (None, None)
    assert of(True, True) is True
    assert of(True, False) is False


@pytest.mark.parametrize(("target_ms", "met"), [(255.0, True), (254.0, False)])
def test_verdict_compares_the_pooled_p95(target_ms: float, *, met: bool) -> None:
    """All of 400 requests took 255 ms (one value, hence exact): a target of 255 ms is met, one of 254 is not."""
    samples = exported([255_000_000] * 200)
    ranks = [rank(number, latency={**IDLE.latency, "ttft": samples}) for number in (0, 1)]
    slo = merge(*ranks, ttft_p95_ms_target=target_ms).slo
    assert slo.ttft_p95_ms_target == target_ms
    assert slo.met is met


def test_verdict_needs_ten_samples_above() -> None:
    """199 requests leave nine above the 95th percentile: too few for a verdict; the 200th makes it."""
    for count, met in ((199, None), (200, True)):
        assert merge(rank(0, latency={**IDLE.latency, "ttft": exported([1_000] * count)})).slo.met is met


def test_hosts_show_first_and_last_done() -> None:
    """Per host the first and the last of its ranks to be done; the hosts' rates add up to the run's.

    Seconds since the common start are 2 + 10 + 0.5, 3 + 8 + 1.5 and 1 + 10 + 0.25; the first window began after 1.
    """
    summary = merge(*BUSY)
    first, second = summary.hosts
    assert (first.host, first.ranks, first.first_done_s, first.last_done_s) == ("h1", 2, 11.5, 11.5)
    assert (second.host, second.ranks, second.first_done_s, second.last_done_s) == ("h2", 1, 10.25, 10.25)
    assert (first.read_gib_per_s, second.read_gib_per_s) == (0.8, 0.2)
    assert (first.write_gib_per_s, second.write_gib_per_s) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("statuses", "merged"),
    [
        (("complete", "complete"), "complete"),
        (("complete", "interrupted"), "interrupted"),
        (("interrupted", "failed"), "failed"),
        (("failed", "complete"), "failed"),
        (("running", "complete"), "running"),
    ],
)
def test_status_is_the_worst_of_the_ranks(statuses: tuple[str, str], merged: str) -> None:
    """Failed is worse than interrupted, which is worse than complete."""
    ranks = [rank(number, status=RunStatus(status)) for number, status in enumerate(statuses)]
    assert merge(*ranks).status == merged


def test_error_is_that_of_the_rank_that_failed() -> None:
    """Where one rank fails and the others are stopped for it, its error is the run's, with the rank and the host."""
    stopped = RankError(exit_code=130, message="stopped")
    full = RankError(exit_code=6, message="disk full")
    ranks = [
        rank(0, status=RunStatus.INTERRUPTED, error=stopped),
        rank(1, host="h2", status=RunStatus.FAILED, error=full),
        rank(2, host="h3", status=RunStatus.FAILED, error=RankError(exit_code=6, message="also full")),
    ]
    assert merge(*ranks).error == "rank 1 on h2: disk full"
    assert merge(ranks[1]).error == "disk full"
    assert merge(*BUSY).error is None


def test_workload_digest_is_of_all_ranks_in_their_order() -> None:
    """One rank's digest is the run's; of several, the SHA-256 of the digests by rank, whatever order they came in."""
    ranks = [rank(number, workload_digest=digest) for number, digest in enumerate(("aa", "bb", "cc"))]
    assert merge(ranks[0]).workload_digest == "aa"
    expected = hashlib.sha256(b"aa\nbb\ncc\n").hexdigest()
    assert merge(*ranks).workload_digest == expected
    assert merge(ranks[2], ranks[0], ranks[1]).workload_digest == expected


def test_operations_digest_is_of_all_ranks_in_their_order() -> None:
    """As that of the workload, and of the operations alone."""
    ranks = [rank(number, operations_digest=digest) for number, digest in enumerate(("dd", "ee"))]
    assert merge(ranks[1]).operations_digest == "ee"
    assert merge(*reversed(ranks)).operations_digest == hashlib.sha256(b"dd\nee\n").hexdigest()


def test_order_of_the_ranks_changes_nothing() -> None:
    """Ranks may be handed over in any order."""
    assert merge(*reversed(BUSY)) == merge(*BUSY)


def test_summary_is_read_back_as_it_was() -> None:
    """A summary survives JSON."""
    summary = merge(*BUSY)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


@pytest.mark.parametrize("ranks", [[], [IDLE, rank(1, run_id="another")]])
def test_ranks_of_one_run_are_needed(ranks: list[RankResult]) -> None:
    """No rank at all, or ranks of two runs, make no summary."""
    with pytest.raises(ValueError, match="exactly one run"):
        merge(*ranks)
