"""Several trials of one run: how much they differ, and their sums, worked by hand."""

import hashlib
import math

import pytest

from mlpstorage.config import GIB, RunStatus
from mlpstorage.results.models import RankError, RankResult, Sample, StorageCounts, TtftCounts
from mlpstorage.results.summary import Summary
from mlpstorage.results.trials import compared, pooled
from tests.records import (
    IDLE,
    NO_REQUESTS,
    NO_STORAGE,
    NO_TOKENS,
    client,
    exported,
    merge,
    rank,
    reused,
    saved,
    window,
)


def trial(read_gib: int, write_gib: int, completed: int, measured_s: float = 10.0, ttft_ms: int = 100) -> RankResult:
    """A rank that moved so much; every TTFT has one value, of which there are enough for p95."""
    return rank(
        window=window(measured_s, warmup_s=2.0, drain_s=0.5, in_flight=3),
        requests=NO_REQUESTS.model_copy(update={"completed": completed, "prompt_tokens": 100 * completed}),
        storage=NO_STORAGE.model_copy(update={"read_bytes": read_gib * GIB, "written_bytes": write_gib * GIB}),
        latency={**IDLE.latency, "ttft": exported([ttft_ms * 1_000_000] * 200)},
    )


THREE = (trial(20, 10, 80), trial(40, 10, 100), trial(60, 10, 120))
"""2, 4 and 6 GiB/s read, 1 GiB/s written, 8, 10 and 12 requests a second."""


def test_spread_has_the_samples_deviation() -> None:
    """Of 2, 4 and 6 the mean is 4, the sample's variance (4 + 0 + 4) / 2 = 4, its root 2: cv 0.5."""
    trials = compared([merge(one) for one in THREE])
    assert trials.count == 3
    read = trials.read_gib_per_s
    assert read is not None
    assert read.values == (2.0, 4.0, 6.0)
    assert (read.mean, read.min, read.max, read.stdev, read.cv) == (4.0, 2.0, 6.0, 2.0, 0.5)
    requests, both = trials.requests_per_s, trials.storage_gib_per_s
    assert requests is not None
    assert both is not None
    assert (requests.mean, requests.stdev, requests.cv) == (10.0, 2.0, 0.2)
    # Reads and writes together: 3, 5 and 7.
    assert (both.values, both.mean, both.cv) == ((3.0, 5.0, 7.0), 5.0, 0.4)
    writes = trials.write_gib_per_s
    assert writes is not None
    assert (writes.stdev, writes.cv) == (0.0, 0.0)


def test_spread_is_of_each_trials_own_percentiles() -> None:
    """TTFT p50 and p95 of 100, 200 and 600 ms: mean 300, deviation sqrt((40,000 + 10,000 + 90,000) / 2)."""
    trials = compared([merge(trial(1, 1, 1, ttft_ms=ttft_ms)) for ttft_ms in (100, 200, 600)])
    for spread in (trials.ttft_p50_ms, trials.ttft_p95_ms):
        assert spread is not None
        assert spread.mean == 300.0
        assert spread.stdev == pytest.approx(math.sqrt(70_000))
        assert spread.cv == pytest.approx(math.sqrt(70_000) / 300)


def test_hit_ratio_is_compared() -> None:
    """Half of the tokens in one trial and a quarter in the other."""
    asked = NO_REQUESTS.model_copy(update={"completed": 1, "prompt_tokens": 100})
    halves = [
        rank(requests=asked.model_copy(update={"cached_tokens": NO_REQUESTS.cached_tokens.model_copy(update=found)}))
        for found in ({"gpu": 20, "storage": 30}, {"cpu": 25})
    ]
    spread = compared([merge(one) for one in halves]).hit_ratio_tokens
    assert spread is not None
    assert (spread.values, spread.mean) == ((0.5, 0.25), 0.375)


def test_a_number_that_a_trial_lacks_has_no_spread() -> None:
    """A trial without a request has no TTFT and no hit ratio: the others' spread would pass for all; rates are 0."""
    trials = compared([merge(THREE[0]), merge(IDLE)])
    assert (trials.ttft_p50_ms, trials.ttft_p95_ms, trials.hit_ratio_tokens) == (None, None, None)
    assert trials.requests_per_s is not None
    assert trials.requests_per_s.values == (8.0, 0.0)


def test_one_trial_has_no_deviation() -> None:
    """A run that was stopped in its second trial has one: its spread has no width, which is not 0."""
    spread = compared([merge(THREE[1])]).read_gib_per_s
    assert spread is not None
    assert (spread.values, spread.mean, spread.stdev, spread.cv) == ((4.0,), 4.0, None, None)


def test_deviation_of_nothing_has_no_ratio() -> None:
    """Two trials that moved nothing: deviation 0, and no coefficient of a mean of 0."""
    spread = compared([merge(IDLE), merge(IDLE)]).read_gib_per_s
    assert spread is not None
    assert (spread.stdev, spread.cv) == (0.0, None)


def test_pooled_rates_divide_by_all_windows() -> None:
    """40 GiB in 10 s and 20 GiB in 5 s are 60 GiB in 15 s; phases and requests in flight are added."""
    (one,) = pooled([(trial(40, 10, 100),), (trial(20, 20, 50, measured_s=5.0),)])
    summary = merge(one)
    assert summary.window.measured_s == 15.0
    assert (summary.window.warmup_s, summary.window.drain_s) == (4.0, 1.0)
    assert summary.window.requests_in_flight_at_end == 6
    assert (summary.storage.read_gib_per_s, summary.storage.write_gib_per_s) == (4.0, 2.0)
    assert (summary.requests.completed, summary.requests.rate_per_s) == (150, 10.0)
    assert summary.latency["ttft"].count == 400


def test_every_count_of_storage_and_first_tokens_is_pooled() -> None:
    """With 1, 2, 3 ... in one trial and tenfold in another, each is elevenfold: no field is left out."""

    def counts(model: type[StorageCounts] | type[TtftCounts], times: int) -> dict[str, int]:
        return {name: times * number for number, name in enumerate(model.model_fields, 1)}

    one, ten = (
        rank(
            storage=StorageCounts.model_validate(counts(StorageCounts, times)),
            storage_total=StorageCounts.model_validate(counts(StorageCounts, 2 * times)),
            first_tokens=TtftCounts.model_validate(counts(TtftCounts, times)),
        )
        for times in (1, 10)
    )
    (both,) = pooled([(one,), (ten,)])
    assert both.storage.model_dump() == counts(StorageCounts, 11)
    assert both.storage_total.model_dump() == counts(StorageCounts, 22)
    assert both.first_tokens.model_dump() == counts(TtftCounts, 11)


def test_what_a_trial_could_not_know_the_pool_does_not() -> None:
    """None in one trial, in the place of a sum that would pass for the whole."""
    silent = rank(
        first_tokens=NO_TOKENS.model_copy(update={"storage_recompute_ns": None, "storage_slower_loads": None}),
        client=client(os_bytes=None).model_copy(update={"cpu_wait_s": None}),
        dropped_page_cache_bytes=None,
    )
    (both,) = pooled([(IDLE,), (silent,)])
    assert (both.first_tokens.storage_recompute_ns, both.first_tokens.storage_slower_loads) == (None, None)
    assert (both.client.os_read_bytes, both.client.cpu_wait_s, both.dropped_page_cache_bytes) == (None, None, None)


def test_client_costs_are_added_but_for_what_does_not_add_up() -> None:
    """Processor times are added; memory is the most of any trial, and the cores are those of the host."""
    ranks = [
        rank(client=client(cpu_s=cpu_s, cores=4, rss_bytes=rss).model_copy(update={"payload_cpu_s": cpu_s / 2}))
        for cpu_s, rss in ((3.0, 700), (1.0, 900))
    ]
    (both,) = pooled([(one,) for one in ranks])
    pooled_client = both.client
    assert (pooled_client.cpu_s, pooled_client.payload_cpu_s, pooled_client.cpu_wait_s) == (4.0, 2.0, 0)
    assert (pooled_client.cores, pooled_client.max_rss_bytes) == (4, 900)


def test_savings_and_distances_are_pooled() -> None:
    """Histograms are added, gains and losses apart; distances by bucket, with the coarser sampling of the two."""
    first = rank(saved=saved([10, 10, -5]), reuse_distance=reused(3, {7: 2, 9: 1}, weight=1))
    second = rank(saved=saved([10, -5, -5]), reuse_distance=reused(4, {9: 4}, weight=2))
    (both,) = pooled([(first,), (second,)])
    assert (both.saved.gains.counts, both.saved.losses.counts) == ({10: 3}, {5: 3})
    assert (both.reuse_distance.first_uses, both.reuse_distance.distances) == (7, {7: 2, 9: 5})
    assert both.reuse_distance.sample_weight == 2


@pytest.mark.parametrize("name", ["workload_digest", "operations_digest"])
def test_digest_is_the_trials_where_they_agree(name: str) -> None:
    """Equal trials have theirs; others the SHA-256 of all of them in their order."""

    def digested(digest: str) -> RankResult:
        return IDLE.model_copy(update={name: digest})

    (same,) = pooled([(digested("aa"),)] * 3)
    assert getattr(same, name) == "aa"
    (differing,) = pooled([(digested(digest),) for digest in ("aa", "bb", "aa")])
    assert getattr(differing, name) == hashlib.sha256(b"aa\nbb\naa\n").hexdigest()


def test_each_rank_is_pooled_with_itself() -> None:
    """Two ranks of two trials are two ranks, in order; the summary then adds them as those of one run."""
    trials = [
        (rank(1, base=trial(10, 0, 10)), rank(0, base=trial(20, 0, 20))),
        (rank(0, base=trial(30, 0, 30)), rank(1, base=trial(40, 0, 40))),
    ]
    both = pooled(trials)
    assert [(one.rank, one.requests.completed) for one in both] == [(0, 50), (1, 50)]
    summary = merge(*both)
    assert (summary.window.measured_s, summary.storage.read_gib_per_s) == (20.0, 5.0)


def test_one_trial_is_left_as_it_is() -> None:
    """Also its samples and its status."""
    assert pooled([THREE[:1]]) == THREE[:1]


def test_a_trial_that_failed_is_the_last_and_makes_the_run_fail() -> None:
    """A run stops at a trial that fails: its status and error are the run's, the numbers of those before stay."""
    broken = rank(status=RunStatus.FAILED, error=RankError(exit_code=6, message="disk full"))
    summary = merge(*pooled([THREE[:1], (broken,)]))
    assert (summary.status, summary.error, summary.requests.completed) == (RunStatus.FAILED, "disk full", 80)


@pytest.mark.parametrize(
    ("steady", "merged"), [((True, True), True), ((True, False), False), ((None, None), None), ((False, True), False)]
)
def test_warm_ups_are_steady_where_all_are(steady: tuple[bool | None, ...], *, merged: bool | None) -> None:
    """One warm-up that reached its limit is told."""
    windows = [window(1.0).model_copy(update={"warmup_steady": one}) for one in steady]
    (both,) = pooled([(rank(window=one),) for one in windows])
    assert both.window.warmup_steady is merged


def test_time_series_follow_each_other() -> None:
    """The second trial's first second comes after the first trial's last, 2.5 s."""

    def at(t_s: float) -> Sample:
        zeros = dict.fromkeys(set(Sample.model_fields) - {"t_s", "phase"}, 0)
        return Sample.model_validate(zeros | {"t_s": t_s, "phase": "window"})

    (both,) = pooled([(rank(samples=(at(1.0), at(2.5))),), (rank(),), (rank(samples=(at(1.0), at(2.0))),)])
    assert [one.t_s for one in both.samples] == [1.0, 2.5, 3.5, 4.5]


def test_a_summary_with_trials_is_read_back() -> None:
    """And has them."""
    differ = compared([merge(one) for one in THREE])
    summary = merge(*pooled([(one,) for one in THREE]), trials=differ)
    assert summary.trials == differ
    assert Summary.model_validate_json(summary.model_dump_json()) == summary
