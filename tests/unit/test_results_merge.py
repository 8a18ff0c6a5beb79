"""The merge of ranks, against sums worked by hand and percentiles taken from sorted samples."""

import hashlib
import random
from collections.abc import Iterable, Sequence

import pytest

from mlpstorage.config import GIB, RunStatus
from mlpstorage.measure.histogram import Histogram
from mlpstorage.results.merge import merge_ranks
from mlpstorage.results.models import (
    LATENCIES,
    HistogramData,
    RankClient,
    RankError,
    RankResult,
    RankWindow,
    RequestCounts,
    Reuse,
    StorageCounts,
    Summary,
    TierCounts,
)

NO_TIERS = TierCounts(gpu=0, cpu=0, storage=0)
NO_REQUESTS = RequestCounts(
    completed=0,
    failed=0,
    loads_skipped=0,
    loads_abandoned=0,
    prompt_tokens=0,
    output_tokens=0,
    prompt_blocks=0,
    cached_tokens=NO_TIERS,
    hit_blocks=NO_TIERS,
    ttft_saved_ns=0,
    ttft_saved_requests=0,
)
NO_STORAGE = StorageCounts(**dict.fromkeys(StorageCounts.model_fields, 0))


def exported(samples_ns: Iterable[int] = ()) -> HistogramData:
    """The export of a histogram of the samples."""
    histogram = Histogram()
    for sample_ns in samples_ns:
        histogram.record(sample_ns)
    return HistogramData.of(histogram)


def window(measured_s: float, warmup_s: float = 0, drain_s: float = 0, in_flight: int = 0) -> RankWindow:
    """A window of that length."""
    return RankWindow(
        start_unix_s=None,
        warmup_s=warmup_s,
        measured_s=measured_s,
        drain_s=drain_s,
        requests_in_flight_at_end=in_flight,
    )


def client(cpu_s: float = 0, cores: int = 4, rss_bytes: int = 1, os_bytes: int | None = 0) -> RankClient:
    """A client that never lagged or waited, filled no payload and asked the system for `os_bytes` each way."""
    return RankClient(
        cpu_s=cpu_s,
        payload_cpu_s=0,
        cpu_wait_s=0,
        cores=cores,
        max_rss_bytes=rss_bytes,
        os_read_bytes=os_bytes,
        os_written_bytes=os_bytes,
        loop_lag=exported(),
    )


def costing(cpu_s: float = 0, payload_cpu_s: float = 0, cpu_wait_s: float | None = 0) -> RankClient:
    """A client of four cores with those costs."""
    return client(cpu_s).model_copy(update={"payload_cpu_s": payload_cpu_s, "cpu_wait_s": cpu_wait_s})


def storage_times(**sums_s: float) -> dict[str, HistogramData]:
    """Latencies of a rank of which the named ones have one sample each, of so many seconds."""
    samples = {name: exported([round(sum_s * 1e9)]) for name, sum_s in sums_s.items()}
    return {name: exported() for name in LATENCIES} | samples


IDLE = RankResult(
    run_id="20261123_093000-0a1b2c",
    rank=0,
    host="h1",
    status=RunStatus.COMPLETE,
    error=None,
    workload_digest="aa",
    window=window(10.0),
    requests=NO_REQUESTS,
    storage=NO_STORAGE,
    storage_total=NO_STORAGE,
    latency={name: exported() for name in LATENCIES},
    client=client(),
    verify_failures=(),
    dropped_page_cache_bytes=0,
    reuse=None,
    host_facts={},
    samples=(),
)
"""A rank that measured for ten seconds, in which nothing happened."""


def rank(number: int = 0, base: RankResult = IDLE, **changes: object) -> RankResult:
    """Rank `number`, as `base` but for the changes."""
    return base.model_copy(update={"rank": number, **changes})


def merge(*ranks: RankResult, prefill_tokens_per_s: float = 20_000.0, ttft_p95_ms_target: float = 450.0) -> Summary:
    """The summary of a model with 131,072 bytes a token."""
    return merge_ranks(
        ranks,
        prefill_tokens_per_s=prefill_tokens_per_s,
        bytes_per_token=131_072,
        ttft_p95_ms_target=ttft_p95_ms_target,
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
            ttft_saved_ns=3_000_000_000,
            ttft_saved_requests=20,
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
            ttft_saved_ns=1_000_000_000,
            ttft_saved_requests=5,
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
    assert summary.breakeven.ttft_saved_mean_ms is None
    assert summary.slo.met is None
    assert summary.latency["ttft"].p50_ms is None
    # It did measure ten seconds, in which nothing was read: that is a rate of 0, and known.
    assert summary.storage.read_gib_per_s == 0.0
    assert summary.requests.rate_per_s == 0.0


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


def test_break_even_is_prefill_speed_times_bytes() -> None:
    """20,000 tokens a second of 131,072 bytes each are 2.44140625 GiB/s; 4 s saved in 25 requests are 160 ms each."""
    breakeven = merge(*BUSY).breakeven
    assert breakeven.prefill_tokens_per_s == 20_000.0
    assert breakeven.read_gib_per_s_needed == 2.44140625
    assert breakeven.ttft_saved_mean_ms == 160.0


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
    """Per host the first and the last of its ranks to be done; the hosts' rates add up to the run's."""
    summary = merge(*BUSY)
    first, second = summary.hosts
    assert (first.host, first.ranks, first.first_done_s, first.last_done_s) == ("h1", 2, 9.5, 10.5)
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
