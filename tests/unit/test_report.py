"""What people see: the table at the end of a run, `history list` and `history show`, as rendered for real."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from mlpstorage.config import GIB, RunStatus
from mlpstorage.history import RunEntry
from mlpstorage.measure.histogram import Histogram, SignedHistogram
from mlpstorage.report.history_table import history_table, run_details
from mlpstorage.report.terminal import console_for, headline, summary_table
from mlpstorage.report.text import bytes_text, percent_text, plain, seconds_text, significant, time_text, with_unit
from mlpstorage.results.models import (
    LATENCIES,
    IncompleteRank,
    Reuse,
    StorageCounts,
)
from mlpstorage.results.summary import (
    BreakEven,
    Client,
    Clock,
    DeviceUse,
    HighestOfRanks,
    HitRatio,
    HostSummary,
    Latency,
    RankPercentile,
    RankSummary,
    RequestRates,
    ReuseDistance,
    Saved,
    Slo,
    Spread,
    Straggler,
    Summary,
    TierRatios,
    Trials,
    TtftParts,
    Window,
    WindowStorage,
)

ROOT = Path(__file__).resolve().parents[2]
METADATA: Mapping[str, object] = {"model": "llama3.1-8b", "num_users": 100, "num_processes": None}


def latency_of(value_ms: float, count: int) -> Latency:
    """A latency of `count` equal samples: every percentile that there is equals them."""
    histogram = Histogram()
    for _ in range(count):
        histogram.record(round(value_ms * 1e6))
    return Latency.of(histogram)


def summary_of(samples: int = 5_000, **changes: object) -> Summary:
    """A run in which everything went well, and the changes."""
    counts = dict.fromkeys(StorageCounts.model_fields, 0)
    window_counts = counts | {
        "read_bytes": 24 * GIB,
        "written_bytes": 5 * GIB,
        "read_ops": 12_288,
        "write_ops": 2_560,
    }
    values_ms = {name: 10.0 * number for number, name in enumerate(LATENCIES, 1)}
    values_ms |= {"ttft": 84.0, "ttft_without_storage": 1900.0, "ttft_without_cache": 2500.0, "lookup": 0.02}
    saved = SignedHistogram()
    for number in range(1_234):
        saved.record(-1_000_000 if number < 34 else 250_000_000)
    summary = Summary(
        run_id="20261123_093000-0a1b2c",
        status=RunStatus.COMPLETE,
        error=None,
        workload_digest="aa",
        operations_digest="bb",
        trials=None,
        incomplete_ranks=(),
        clock=Clock(max_offset_error_ms=0.02, start_skew_ms=0.3),
        window=Window(warmup_s=4.0, warmup_steady=None, measured_s=20.0, drain_s=0.5, requests_in_flight_at_end=0),
        requests=RequestRates(
            completed=1234,
            failed=0,
            loads_skipped=0,
            loads_abandoned=0,
            rate_per_s=61.7,
            prompt_tokens_per_s=617_250.0,
            cached_tokens_per_s=345_660.0,
            output_tokens_per_s=61_725.0,
        ),
        hit_ratio=HitRatio(
            tokens=TierRatios(gpu=0.12, cpu=0.03, storage=0.41, total=0.56, cross_rank=0.07),
            blocks=TierRatios(gpu=0.25, cpu=0.125, storage=0.25, total=0.625, cross_rank=0.05),
        ),
        storage=WindowStorage(
            **window_counts,
            read_gib_per_s=1.2,
            write_gib_per_s=0.25,
            read_peak_gib_per_s=3.0,
            read_burst_ratio=2.5,
        ),
        storage_total=StorageCounts(**counts),
        latency={name: latency_of(value_ms, samples) for name, value_ms in values_ms.items()},
        client=Client(
            cpu_s=3.2,
            cpu_ms_per_gib=110.3,
            payload_cpu_s=0.8,
            payload_cpu_share=0.25,
            sampling_cpu_s=0.02,
            cpu_wait_s=0.153,
            max_rss_bytes=512 << 20,
            os_read_bytes=None,
            os_written_bytes=None,
            loop_lag_p99_ms=3.17,
            bottleneck=False,
            bottleneck_reason=None,
        ),
        ttft_parts=TtftParts(
            client_late_mean_ms=0.5,
            lookup_mean_ms=0.02,
            storage_load_mean_ms=42.0,
            dram_load_mean_ms=2.0,
            prefill_queue_mean_ms=9.48,
            prefill_mean_ms=30.0,
            storage_share=0.5,
        ),
        saved=Saved.of(saved),
        breakeven=BreakEven(
            prefill_tokens_per_s=20_000,
            read_gib_per_s_needed=2.44140625,
            load_gib_per_s=5.5,
            storage_loads=1_100,
            storage_slower_loads=12,
            storage_saved_mean_ms=100.0,
        ),
        reuse_distance=ReuseDistance(first_use_share=0.375, p50_gib=12.5, p90_gib=80.0, p99_gib=None),
        slo=Slo(ttft_p95_ms_target=450.0, met=True, within_target=0.96, goodput_per_s=59.2),
        verify_failures=(),
        dropped_page_cache_bytes=0,
        reuse=None,
        hosts=(_host("h1"),),
        devices=(),
        ranks=(rank_row(0),),
        stragglers=(),
    )
    return summary.model_copy(update=changes)


def rank_row(number: int, host: str = "h1", read_gib_per_s: float = 0.6) -> RankSummary:
    """A rank's row."""
    return RankSummary(
        rank=number,
        host=host,
        status=RunStatus.COMPLETE,
        requests_completed=617,
        hit_ratio_tokens=0.56,
        read_gib_per_s=read_gib_per_s,
        write_gib_per_s=0.125,
        ttft_p95_ms=84.0,
        storage_read_p50_ms=5.0,
    )


def _host(name: str) -> HostSummary:
    return HostSummary(
        host=name, ranks=1, first_done_s=20.5, last_done_s=21.25, read_gib_per_s=1.2, write_gib_per_s=0.25
    )


def _use(host: str, busy_share: float) -> DeviceUse:
    return DeviceUse(
        host=host,
        device="nvme0n1",
        covered_s=20.0,
        read_gib_per_s=1.9,
        write_gib_per_s=0.25,
        busy_share=busy_share,
    )


def in_window(**counts: int | None) -> Summary:
    """A run in which all went well but for these storage counts of the window."""
    return summary_of(storage=summary_of().storage.model_copy(update=counts))


def few_samples() -> Summary:
    """A run that was stopped early: 15 samples of each latency, which have a median at most."""
    return summary_of(
        15,
        status=RunStatus.INTERRUPTED,
        slo=Slo(ttft_p95_ms_target=450.0, met=None, within_target=0.9, goodput_per_s=0.7),
    )


def troubled() -> Summary:
    """A run in which everything went wrong that can."""
    base = summary_of()
    wrong = {"io_errors": 2, "verify_errors": 1, "writes_dropped": 77, "retries": 8, "buffered_files": 3_000}
    return summary_of(
        status=RunStatus.FAILED,
        error="rank 1 on a-host-with-a-name.cluster.example.org: cannot write /mnt/nvme/cache/ab/cd/"
        "0123456789abcdef0123456789abcdef: no space left on device; lower --storage-gb",
        requests=base.requests.model_copy(update={"failed": 9, "loads_abandoned": 6}),
        window=base.window.model_copy(update={"requests_in_flight_at_end": 42}),
        storage_total=base.storage_total.model_copy(update=wrong),
        client=base.client.model_copy(
            update={"bottleneck": True, "bottleneck_reason": "h1: the client used 91.0% of the processor time"}
        ),
        verify_failures=("object 17: wrong stamp in sector 3",),
        slo=Slo(ttft_p95_ms_target=50.0, met=False, within_target=0.1, goodput_per_s=6.2),
        hosts=(_host("h1"), _host("a-host-with-a-name.cluster.example.org")),
    )


def shown(renderable: RenderableType, width: int = 80, *, color: bool = False) -> str:
    """What a terminal of that width shows."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
        _environ={},
    )
    console.print(renderable)
    return stream.getvalue()


def flat(text: str) -> str:
    """The text with all blanks and line ends as single blanks."""
    return " ".join(text.split())


# The end of a run


def first_sentences(summary: Summary, **metadata: object) -> str:
    """What a reader reads who reads no further."""
    text = flat(shown(summary_table(summary, metadata={"model": "tiny-1b", "num_users": 7} | metadata), 100))
    return text.partition(" Storage GiB/s ")[0]


def without(*latencies: str) -> Summary:
    """A run without any sample of these latencies."""
    return summary_of(latency=summary_of().latency | {name: latency_of(0, 0) for name in latencies})


def test_verdict_stands_first_in_words() -> None:
    """Load, model, what storage served, time to first token with and without it, and the verdict."""
    text = flat(shown(summary_table(summary_of(), metadata=METADATA)))
    assert text.startswith(
        "At 100 users of llama3.1-8b this storage served 41.0 % of the prompt tokens (all tiers 56.0 %), "
        "time to first token (TTFT) p95 84.0 ms against 1.90 s without it. It MEETS the target of 450 ms. "
    )


def test_verdict_without_a_modelled_wait_has_nothing_to_hold_it_against() -> None:
    """In generation modes `fast` and `none`, and without compute, nobody knows what TTFT would be without storage."""
    assert first_sentences(without("ttft_without_storage", "ttft_without_cache")) == (
        "At 7 users of tiny-1b this storage served 41.0 % of the prompt tokens (all tiers 56.0 %), "
        "time to first token (TTFT) p95 84.0 ms. It MEETS the target of 450 ms."
    )


@pytest.mark.parametrize(("saved_ms", "slower"), [(-0.5, True), (0.0, False), (0.5, False), (None, False)])
def test_verdict_says_where_reading_was_slower_than_computing(saved_ms: float | None, *, slower: bool) -> None:
    """On the mean of the requests that read; where that is not known nothing is said."""
    breakeven = summary_of().breakeven.model_copy(update={"storage_saved_mean_ms": saved_ms})
    text = first_sentences(summary_of(breakeven=breakeven))
    said = " It MEETS the target of 450 ms. Reading tokens from this storage was SLOWER than computing them again."
    assert text.endswith(said if slower else " It MEETS the target of 450 ms.")


def test_verdict_of_a_run_that_completed_nothing() -> None:
    """There is no share, no latency and no verdict; the sentence says so and stays one."""
    none = TierRatios(gpu=None, cpu=None, storage=None, total=None, cross_rank=None)
    slo = Slo(ttft_p95_ms_target=2000.0, met=None, within_target=None, goodput_per_s=0.0)
    assert first_sentences(summary_of(0, hit_ratio=HitRatio(tokens=none, blocks=none), slo=slo)) == (
        "At 7 users of tiny-1b this storage served nothing: no request was completed in the measured window. "
        "Too few requests were completed to tell whether TTFT p95 meets the target of 2.00 s."
    )


@pytest.mark.parametrize(
    ("metadata", "load"),
    [
        ({}, "At 7 users of tiny-1b"),
        ({"ranks": 1, "num_processes": 1}, "At 7 users of tiny-1b"),
        ({"num_processes": 4}, "At 7 users of tiny-1b on each of 4 ranks"),
        ({"ranks": 2, "num_processes": None}, "At 7 users of tiny-1b on each of 2 ranks"),
        ({"parameters": {"trace": None, "request_rate": None}}, "At 7 users of tiny-1b"),
        ({"parameters": {"trace": "/traces/chat.jsonl"}}, "With the trace chat.jsonl played to tiny-1b"),
        ({"parameters": {"trace": "/traces/agents/"}}, "With the trace agents played to tiny-1b"),
        (
            {"ranks": 4, "parameters": {"trace": "chat.jsonl"}},
            "With the trace chat.jsonl played to tiny-1b on 4 ranks",
        ),
        ({"parameters": {"request_rate": 50.0}}, "At 50 requests a second to tiny-1b"),
        ({"ranks": 4, "parameters": {"request_rate": 0.5}}, "At 0.5 requests a second to tiny-1b on 4 ranks"),
        (
            {"parameters": {"request_rate": 50.0, "trace": "/traces/chat.jsonl"}},
            "At 50 requests a second of the trace chat.jsonl to tiny-1b",
        ),
        ({"model": None}, "At 7 users of a model not recorded"),
    ],
)
def test_load_is_named(metadata: dict[str, object], load: str) -> None:
    """Users are counted per rank; a trace takes their place; a rate is of all ranks together."""
    assert first_sentences(summary_of(), **metadata).startswith(f"{load} this storage served 41.0 % of the prompt")


def test_users_stand_among_the_parameters_where_they_stand_nowhere_else() -> None:
    """Metadata of another version may have them there alone, or not at all."""
    for parameters, users in (({"num_users": 8}, "8"), ({}, "n/a")):
        text = flat(shown(summary_table(summary_of(), metadata={"model": "m", "parameters": parameters})))
        assert text.startswith(f"At {users} users of m this storage served ")


def test_numbers_stand_under_their_units() -> None:
    """Rows of the tables hold the numbers in the order of their headings."""
    lines = [line.split() for line in shown(summary_table(summary_of(), metadata=METADATA)).splitlines()]
    rows = {" ".join(line[:2]): line for line in lines if line}
    assert rows["Storage GiB/s"] == ["Storage", "GiB/s", "ops", "bytes", "p50", "ms", "p95", "ms", "p99", "ms"]
    assert ["read", "1.20", "12,288", "24.0", "GiB", "90.0", "90.0", "90.0"] in lines
    assert ["write", "0.250", "2,560", "5.00", "GiB", "100", "100", "100"] in lines
    assert rows["Latency count"] == [
        "Latency",
        "count",
        "mean",
        "ms",
        "p50",
        "ms",
        "p95",
        "ms",
        "p99",
        "ms",
        "max",
        "ms",
    ]
    assert ["TTFT", "5,000", *["84.0"] * 5] in lines
    assert ["no", "storage", "5,000", *["1,900"] * 5] in lines
    assert ["no", "cache", "5,000", *["2,500"] * 5] in lines
    # Ten times the latency's place in LATENCIES.
    assert ["client", "late", "5,000", *["40.0"] * 5] in lines
    assert ["prefill", "queue", "5,000", *["50.0"] * 5] in lines
    assert ["request", "load", "5,000", *["60.0"] * 5] in lines
    assert ["of", "storage", "5,000", *["70.0"] * 5] in lines
    assert ["lookup", "5,000", *["0.0200"] * 5] in lines
    assert rows["Cache hits"] == ["Cache", "hits", "GPU", "CPU", "storage", "total", "of", "other", "ranks"]
    assert ["of", "tokens", "12.0", "%", "3.0", "%", "41.0", "%", "56.0", "%", "7.0", "%"] in lines
    assert ["of", "blocks", "25.0", "%", "12.5", "%", "25.0", "%", "62.5", "%", "5.0", "%"] in lines


def test_facts_have_their_units() -> None:
    """Requests, window, break-even and client cost are told with units."""
    text = flat(shown(summary_table(summary_of(), metadata=METADATA)))
    for part in (
        "1,234 completed, 61.7 a second; tokens a second: 617,250 prompt, 345,660 cached, 61,725 output",
        "20.0 s measured after 4.0 s of warm-up; 0.5 s of drain",
        "Goodput 59.2 requests a second had their first token within 450 ms, 96.0 % of all",
        (
            "TTFT is made of storage load 42.0 ms, DRAM load 2.00 ms, prefill queue 9.48 ms, prefill 30.0 ms, "
            "client late 0.500 ms (means); storage is 50.0 % of it"
        ),
        (
            "Break-even a request's load got 5.50 GiB/s; reading beats computing above 2.44 GiB/s (20,000 tokens/s). "
            "Saved by storage, mean: 100 ms a request that read; 12 of 1,100 were slower than computing"
        ),
        # (1,200 x 250 - 34 x 1) / 1,234 ms
        "Saved by all tiers: TTFT 243 ms mean, 250 ms p50; 34 of 1,234 requests would have been faster without a cache",
        (
            "Reuse 37.5 % of the uses of blocks were first ones; half of the others were within 12.5 GiB of different "
            "blocks, nine in ten within 80.0 GiB"
        ),
        "Writes 5.00 GiB written; avoided: 0 B that storage had, 0 blocks at their first use, 0 blocks dropped",
        "Read bursts 3.00 GiB/s in the peak second, 2.50 times the mean",
        "CPU 110 ms per GiB moved, 3.2 s in all, 25.0 % of it for stamps and checks; waited 0.153 s for a processor",
        "for a processor; peak RSS of a rank 512 MiB; loop lag p99 3.17 ms",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("steady", "told"),
    [
        (None, "after 4.0 s of warm-up; 0.5 s"),
        (True, "after 4.0 s of warm-up, to a steady hit ratio; 0.5 s"),
        (False, "after 4.0 s of warm-up, in which the hit ratio did NOT become steady; 0.5 s"),
    ],
)
def test_warm_up_tells_whether_it_became_steady(*, steady: bool | None, told: str) -> None:
    """Where that was waited for."""
    window = summary_of().window.model_copy(update={"warmup_steady": steady})
    assert told in flat(shown(summary_table(summary_of(window=window), metadata=METADATA)))


def test_what_compute_would_tell_is_said_not_to_be_known() -> None:
    """With `--accelerator none` the bandwidth of a load is told, and why nothing stands beside it."""
    silent = {"prefill_tokens_per_s": None, "read_gib_per_s_needed": None}
    silent |= {"storage_slower_loads": None, "storage_saved_mean_ms": None}
    breakeven = summary_of().breakeven.model_copy(update=silent)
    text = flat(shown(summary_table(summary_of(breakeven=breakeven, saved=Saved.of(SignedHistogram())), metadata={})))
    assert "Break-even a request's load got 5.50 GiB/s; compute is not modelled (--accelerator none) Saved" in text
    assert "Saved not known: compute is not modelled (--accelerator none) Reuse" in text
    assert "n/a" not in text.partition(" a model not recorded ")[2]


def test_break_even_of_a_run_that_read_nothing() -> None:
    """There is nothing to hold against computing."""
    nothing = {"storage_loads": 0, "load_gib_per_s": None, "read_gib_per_s_needed": None}
    breakeven = summary_of().breakeven.model_copy(update=nothing)
    text = flat(shown(summary_table(summary_of(breakeven=breakeven), metadata=METADATA)))
    assert "Break-even no request read from storage Saved" in text


def test_writes_that_were_avoided_are_told() -> None:
    """Bytes that storage had, blocks at their first use, blocks dropped."""
    summary = in_window(dedup_skipped_bytes=3 * GIB, writes_deferred=1_200, writes_dropped=7)
    told = "avoided: 3.00 GiB that storage had, 1,200 blocks at their first use, 7 blocks dropped"
    assert told in flat(shown(summary_table(summary, metadata=METADATA)))


def test_the_peak_is_of_an_interval_of_the_time_series() -> None:
    """A second, unless the run was told otherwise."""
    text = flat(shown(summary_table(summary_of(), metadata={**METADATA, "parameters": {"timeseries_interval": 0.5}})))
    assert "Read bursts 3.00 GiB/s in the peak 0.5 s, 2.50 times the mean" in text


def test_what_all_programs_did_with_the_device() -> None:
    """One line a device, the busiest first and four at most; of several hosts each is named."""
    uses = tuple(_use(f"h{number}", 0.1 * number) for number in range(1, 7))
    one = flat(shown(summary_table(summary_of(devices=uses[:1]), metadata=METADATA), 100))
    assert "Device nvme0n1: 1.90 GiB/s read and 0.250 GiB/s written by all programs, 10.0 % busy" in one
    text = flat(
        shown(summary_table(summary_of(devices=uses, hosts=(_host("h1"), _host("h2"))), metadata=METADATA), 100)
    )
    assert [f"Device nvme0n1 of h{number}: " in text for number in (1, 2, 3, 4, 5, 6)] == [False] * 2 + [True] * 4
    assert text.index("nvme0n1 of h6") < text.index("nvme0n1 of h3")
    assert "by all programs" not in shown(summary_table(summary_of(), metadata=METADATA))


def test_bursts_that_are_not_known_have_no_line() -> None:
    """A window of less than a second, or one in which nothing was read."""
    assert "Read bursts" not in shown(summary_table(in_window(read_burst_ratio=None), metadata=METADATA))


def spread(*values: float, stdev: float | None, cv: float | None) -> Spread:
    """A spread of those values."""
    return Spread(values=values, mean=sum(values) / len(values), min=min(values), max=max(values), stdev=stdev, cv=cv)


def test_trials_have_a_table() -> None:
    """Mean, extremes and deviation of each number, and the deviation over the mean; what a trial lacks is n/a."""
    trials = Trials(
        count=3,
        storage_gib_per_s=spread(3.0, 5.0, 7.0, stdev=2.0, cv=0.4),
        read_gib_per_s=spread(2.0, 4.0, 6.0, stdev=2.0, cv=0.5),
        write_gib_per_s=spread(1.0, 1.0, 1.0, stdev=0.0, cv=0.0),
        requests_per_s=spread(8.0, 10.0, 12.0, stdev=2.0, cv=0.2),
        hit_ratio_tokens=spread(0.5, 0.625, 0.75, stdev=0.125, cv=0.2),
        ttft_p50_ms=spread(1.0, 2.0, 3.0, stdev=1.0, cv=0.5),
        ttft_p95_ms=None,
    )
    text = shown(summary_table(summary_of(trials=trials), metadata=METADATA))
    lines = [line.split() for line in text.splitlines()]
    assert ["3", "trials", "mean", "min", "max", "stdev", "CV"] in lines
    assert ["storage", "GiB/s", "5.00", "3.00", "7.00", "2.00", "40.0", "%"] in lines
    assert ["read", "GiB/s", "4.00", "2.00", "6.00", "2.00", "50.0", "%"] in lines
    assert ["write", "GiB/s", "1.00", "1.00", "1.00", "0", "0.0", "%"] in lines
    assert ["requests/s", "10.0", "8.00", "12.0", "2.00", "20.0", "%"] in lines
    assert ["hit", "ratio", "0.625", "0.500", "0.750", "0.125", "20.0", "%"] in lines
    assert ["TTFT", "p50", "ms", "2.00", "1.00", "3.00", "1.00", "50.0", "%"] in lines
    assert ["TTFT", "p95", "ms", *["n/a"] * 5] in lines
    assert text.splitlines()[-1].startswith("n/a: not measured")
    assert "trials" not in shown(summary_table(summary_of(), metadata=METADATA))


@pytest.mark.parametrize(
    "changes",
    [
        {"ttft_parts": summary_of().ttft_parts.model_copy(update={"storage_share": None})},
        {"slo": summary_of().slo.model_copy(update={"within_target": None})},
        {"reuse_distance": summary_of().reuse_distance.model_copy(update={"p90_gib": None})},
        {"saved": summary_of().saved.model_copy(update={"p50_ms": None})},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_number_that_is_shown_as_missing_is_explained(changes: dict[str, object]) -> None:
    """Wherever `n/a` stands, the last line says what it means."""
    text = shown(summary_table(summary_of().model_copy(update=changes), metadata=METADATA))
    assert " n/a" in text.rpartition("\n\n")[0]
    assert text.splitlines()[-1].startswith("n/a: not measured")


def test_good_run_has_nothing_to_overlook() -> None:
    """Without trouble there is no banner, no exclamation mark and no footnote."""
    text = shown(summary_table(summary_of(), metadata=METADATA))
    assert "Latency" in text
    for sign in ("!", "PARTIAL", "n/a"):
        assert sign not in text


def test_trouble_is_told_with_its_count() -> None:
    """Every count that changes the meaning of the numbers has a line, with the number."""
    text = shown(summary_table(troubled(), metadata={**METADATA, "num_processes": 3}), 200)
    notes = [line for line in text.splitlines() if line.startswith("! ")]
    assert [note[2:].partition(" (")[0] for note in notes] == [
        "only 2 of 3 ranks left numbers",
        "verify errors: 1",
        "I/O errors: 2",
        "failed requests: 9",
        "dropped writes: 77",
        "abandoned loads: 6",
        "retries: 8",
        "buffered files: 3,000",
        "object 17: wrong stamp in sector 3",
        "client bottleneck: the client, not the storage, may be the limit",
        "in flight at the end of the window: 42",
    ]


def test_trouble_inside_the_window_alone_is_told() -> None:
    """A count of the window is told even where the totals lack it."""
    storage = summary_of().storage.model_copy(update={"io_errors": 5})
    assert "! I/O errors: 5" in shown(summary_table(summary_of(storage=storage), metadata=METADATA))


def test_syncs_have_a_row_where_there_were_any() -> None:
    """A row of syncs has neither a rate nor bytes; without a sync there is none."""
    text = shown(summary_table(in_window(sync_ops=1_280), metadata=METADATA))
    rows = [line.split() for line in text.splitlines() if line.startswith("sync ")]
    assert rows == [["sync", "-", "1,280", "-", "120", "120", "120"]]
    assert "sync" not in shown(summary_table(summary_of(), metadata=METADATA))


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"page_cache_bytes": 6 * GIB}, "; of what was read it held 25.0 % beforehand)"),
        ({"page_cache_bytes": 0}, "; of what was read it held 0.0 % beforehand)"),
        # The page cache held the padding as well, which is not in the bytes read: no more than all can come from it.
        ({"page_cache_bytes": 25 * GIB}, "; of what was read it held 100.0 % beforehand)"),
        ({"page_cache_bytes": None}, "; how much of it cannot be known)"),
        ({"read_bytes": 0, "page_cache_bytes": 0}, ")"),
    ],
)
def test_buffered_files_tell_the_part_of_the_page_cache(counts: dict[str, int | None], told: str) -> None:
    """Of 24 GiB read the page cache held 6, hence a quarter; where that is not known, no number is invented."""
    text = shown(summary_table(in_window(buffered_files=3, **counts), metadata=METADATA), 200)
    assert f"! buffered files: 3 (the page cache is part of these numbers{told} " in flat(text) + " "
    assert "n/a" not in text


def test_unknown_page_cache_alone_is_no_missing_number() -> None:
    """Without buffered files the report shows nothing of the page cache, so there is nothing to explain in a note."""
    assert "n/a" not in shown(summary_table(in_window(page_cache_bytes=None), metadata=METADATA))


def test_first_verify_failures_are_told() -> None:
    """Three of five failures are shown, in their order; what they quote from the disk moves no cursor."""
    failures = ("object 1: \x1b[2Jwrong\nstamp", *(f"object {number}: wrong stamp" for number in (2, 3, 4, 5)))
    text = shown(summary_table(summary_of(verify_failures=failures), metadata=METADATA))
    assert [line for line in text.splitlines() if line.startswith("! ")] == [
        "! object 1:  [2Jwrong stamp",
        "! object 2: wrong stamp",
        "! object 3: wrong stamp",
    ]
    assert "\x1b" not in text


def test_client_bottleneck_has_its_reason() -> None:
    """The note ends with the rule that says so; a host's name in it moves no cursor."""
    client = summary_of().client.model_copy(
        update={"bottleneck": True, "bottleneck_reason": "h\x1b1: the client used 91.0% of the processor time"}
    )
    assert (
        "! client bottleneck: the client, not the storage, may be the limit "
        "(h 1: the client used 91.0% of the processor time)"
    ) in flat(shown(summary_table(summary_of(client=client), metadata=METADATA)))


def test_abandoned_loads_and_retries_are_told() -> None:
    """Each has a note that says what it means; loads that were skipped by rule are no trouble."""
    requests = summary_of().requests.model_copy(update={"loads_abandoned": 1_200, "loads_skipped": 9})
    summary = in_window(retries=3).model_copy(update={"requests": requests})
    lines = shown(summary_table(summary, metadata=METADATA)).splitlines()
    assert [line for line in lines if line.startswith("! ")] == [
        "! abandoned loads: 1,200 (they took too long and were computed instead)",
        "! retries: 3 (storage requests that had to be sent again)",
    ]


def test_reused_objects_have_a_row() -> None:
    """What an earlier run left is told with its size and the time it took to find; without reuse there is no row."""
    reuse = Reuse(
        objects=4_096, bytes=8 * GIB, damaged_objects=0, incomplete_blocks=0, foreign_entries=0, rebuild_s=1.234
    )
    text = shown(summary_table(summary_of(reuse=reuse), metadata=METADATA))
    assert "Reused 4,096 objects (8.00 GiB) of an earlier run, found in 1.23 s" in flat(text)
    assert "Reused" not in shown(summary_table(summary_of(), metadata=METADATA))


def test_unknown_client_cost_is_not_zero() -> None:
    """A share without processor time and a wait that no kernel tells are `n/a`, which the last line explains."""
    for name, told in (
        ("payload_cpu_share", "3.2 s in all, n/a of it for stamps and checks; waited 0.153 s for a processor"),
        ("cpu_wait_s", "3.2 s in all, 25.0 % of it for stamps and checks; waited n/a for a processor"),
    ):
        client = summary_of().client.model_copy(update={name: None})
        text = shown(summary_table(summary_of(client=client), metadata=METADATA))
        assert told in flat(text)
        assert text.splitlines()[-1].startswith("n/a: not measured, or too few samples")


@pytest.mark.parametrize("status", [RunStatus.FAILED, RunStatus.INTERRUPTED, RunStatus.RUNNING])
def test_partial_run_says_so_on_top(status: RunStatus) -> None:
    """The first line tells the status and that the numbers are partial; the verdict repeats it."""
    text = shown(summary_table(summary_of(status=status, error="it broke"), metadata=METADATA))
    lines = text.splitlines()
    assert lines[0] == f"RUN {status.upper()}: the numbers are PARTIAL, up to where it stopped"
    assert lines[1] == "it broke"
    assert "as far as the partial numbers tell" in flat(text)


def test_missing_numbers_are_not_zeros() -> None:
    """Percentiles that too few samples have are `n/a`, with a footnote; the medians that there are stay."""
    text = shown(summary_table(few_samples(), metadata=METADATA))
    lines = [line.split() for line in text.splitlines()]
    assert ["TTFT", "15", "84.0", "n/a", "n/a", "n/a", "84.0"] in lines
    assert text.splitlines()[-1].startswith("n/a: not measured, or too few samples")
    assert "Too few requests were completed to tell" in flat(text)


def test_run_without_a_request_tells_it() -> None:
    """Nothing was measured: no rate is printed as a number, and no percentage."""
    none = TierRatios(gpu=None, cpu=None, storage=None, total=None, cross_rank=None)
    base = summary_of()
    summary = summary_of(
        0,
        hit_ratio=HitRatio(tokens=none, blocks=none),
        storage=base.storage.model_copy(update={"read_gib_per_s": None, "write_gib_per_s": None}),
        client=base.client.model_copy(update={"cpu_s": 0.0, "payload_cpu_s": 0.0, "payload_cpu_share": None}),
        ttft_parts=TtftParts(**dict.fromkeys(TtftParts.model_fields)),
        saved=Saved.of(SignedHistogram()),
        reuse_distance=ReuseDistance(**dict.fromkeys(ReuseDistance.model_fields)),
        slo=Slo(ttft_p95_ms_target=450.0, met=None, within_target=None, goodput_per_s=None),
    )
    text = flat(shown(summary_table(summary, metadata=METADATA)))
    assert "no request was completed in the measured window" in text
    assert "%" not in text
    assert "None" not in text
    assert headline(summary) == "n/a read, TTFT p95 n/a"


@pytest.mark.parametrize("summary", [summary_of(), few_samples(), troubled()], ids=["good", "few", "troubled"])
@pytest.mark.parametrize("width", [80, 120, 100_000])
def test_table_fits_the_terminal(summary: Summary, width: int) -> None:
    """No line is longer than the terminal, nor than one reads; rows of a table stay one line each."""
    lines = shown(summary_table(summary, metadata=METADATA), width).splitlines()
    assert len(lines) > 20
    assert max(map(len, lines)) <= min(width, 100)
    for heading in ("read", "write", "TTFT", "of tokens"):
        rows = [line for line in lines if line.startswith(f"{heading}  ")]
        assert len(rows) == 1
        assert not rows[0].endswith("…")


def test_ranks_have_a_table_where_there_are_several() -> None:
    """A row a rank with its numbers, its status and its host, and what is known of the common start."""
    several = summary_of(ranks=(rank_row(0), rank_row(1, "h2").model_copy(update={"status": RunStatus.FAILED})))
    text = flat(shown(summary_table(several, metadata=METADATA)))
    assert "Rank requests hits read GiB/s write GiB/s TTFT p95 status host" in text
    assert "0 617 56.0 % 0.600 0.125 84.0 complete h1 1 617 56.0 % 0.600 0.125 84.0 failed h2" in text
    assert "ranks began within 0.300 ms; their clocks are known to 0.0200 ms" in text
    assert "Rank requests" not in flat(shown(summary_table(summary_of(), metadata=METADATA)))


def test_of_many_ranks_those_are_shown_that_one_should_look_at() -> None:
    """Of 40 the 16: one that failed and one straggler, however fast they read, and the 14 slowest readers."""
    rows = [rank_row(number, read_gib_per_s=1.0 + number / 100) for number in range(40)]
    rows[39] = rows[39].model_copy(update={"status": RunStatus.FAILED})
    lone = Straggler(rank=38, host="h1", reason="its median read took 9.00 ms, that of the others 2.00 ms")
    text = shown(summary_table(summary_of(ranks=tuple(rows), stragglers=(lone,)), metadata=METADATA))
    lines = text[text.index("TTFT p95  ") :].splitlines()[2:18]
    assert [int(line.split()[0]) for line in lines] == [*range(14), 38, 39]
    assert "and 24 more" in text
    assert "! straggler: rank 38 on h1: its median read took 9.00 ms, that of the others 2.00 ms" in flat(text)


def test_the_worst_rank_stands_beside_the_percentile() -> None:
    """Its p95 and its number, in a table that a single rank does not have."""
    highest = HighestOfRanks(
        p50_ms=None, p90_ms=None, p95_ms=RankPercentile(rank=1, ms=99.5), p99_ms=None, p999_ms=None
    )
    base = summary_of(ranks=(rank_row(0), rank_row(1)))
    ttft = base.latency["ttft"].model_copy(update={"highest_of_ranks": highest})
    text = flat(shown(summary_table(base.model_copy(update={"latency": base.latency | {"ttft": ttft}}), metadata={})))
    assert "Worst rank p50 ms rank p95 ms rank p99 ms rank" in text
    assert "TTFT n/a n/a 99.5 1 n/a n/a storage read n/a" in text
    assert "Worst rank" not in shown(summary_table(summary_of(), metadata={}))


def test_ranks_without_a_final_result_are_named() -> None:
    """When each was heard of last; of many the first three, and how many more."""
    missing = [IncompleteRank(rank=number, host="h1", last_seen_s=12.25) for number in range(5)]
    missing[1] = IncompleteRank(rank=1, host=None, last_seen_s=None)
    text = flat(shown(summary_table(summary_of(incomplete_ranks=tuple(missing)), metadata=METADATA)))
    assert "! rank 0 on h1 left no final result; last heard of 12.2 s after the start" in text
    assert "! rank 1 left no final result and was never heard of" in text
    assert "! 2 more ranks left no final result" in text


def test_hosts_have_a_table_where_there_are_several() -> None:
    """Each host's share stands in a table; a long name is folded, never cut."""
    text = shown(summary_table(troubled(), metadata=METADATA))
    assert "first done" in text
    row = next(line for line in text.splitlines() if line.startswith("h1 "))
    assert row.split() == ["h1", "1", "1.20", "0.250", "20.5", "s", "21.2", "s"]
    assert "first done" not in shown(summary_table(summary_of(), metadata=METADATA))
    wide = shown(summary_table(troubled(), metadata=METADATA), 120)
    assert "a-host-with-a-name.cluster.example.org  " in wide


def test_colour_marks_what_matters() -> None:
    """A met target is green, a missed one and an error red; without colour no escape sequence is written."""
    good = shown(summary_table(summary_of(), metadata=METADATA), color=True)
    bad = shown(summary_table(troubled(), metadata=METADATA), 120, color=True)
    assert "\x1b[32mMEETS" in good
    assert "\x1b[1;31mMISSES" in bad
    assert "\x1b[1;31mRUN FAILED" in bad
    assert "\x1b[1;31m! verify errors: 1" in bad
    assert "\x1b[33m! buffered files" in bad
    assert "\x1b" not in shown(summary_table(troubled(), metadata=METADATA))


def test_headline_is_read_speed_and_ttft() -> None:
    """The headline fits a column of the history."""
    assert headline(summary_of()) == "1.20 GiB/s read, TTFT p95 84.0 ms"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0.0, "0"),
        (0.001234, "0.00123"),
        (0.01999, "0.0200"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1234567.8, "1,234,568"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    """Histograms are good for three digits; whole numbers keep all of theirs."""
    assert significant(value) == text


def test_units_of_bytes_ratios_and_times() -> None:
    """Binary units by powers of 1,024; ratios as percentages; run times as one reads them."""
    assert [bytes_text(value) for value in (None, 0, 1, 1023, 1024, 3 << 29, 5 << 50, 1 << 70)] == [
        "n/a",
        "0 B",
        "1.00 B",
        "1,023 B",
        "1.00 KiB",
        "1.50 GiB",
        "5.00 PiB",
        "1,048,576 PiB",
    ]
    assert [percent_text(part) for part in (None, 0.0, 0.4567, 1.0)] == ["n/a", "0.0 %", "45.7 %", "100.0 %"]
    assert [seconds_text(value_s) for value_s in (None, 0.04, 59.4, 59.9, 61, 3599.6, 7384)] == [
        "n/a",
        "0.0 s",
        "59.4 s",
        "1 m 00 s",
        "1 m 01 s",
        "1 h 00 m",
        "2 h 03 m",
    ]


def test_latencies_are_in_seconds_from_one_second_on() -> None:
    """As one would say them; a number that is not there has no unit."""
    assert [time_text(value_ms) for value_ms in (None, 0.0, 84.0, 999.0, 1000.0, 1900.0, 61_000.0)] == [
        "n/a",
        "0 ms",
        "84.0 ms",
        "999 ms",
        "1.00 s",
        "1.90 s",
        "61.0 s",
    ]
    assert [with_unit(number, "ms") for number in ("n/a", "84.0")] == ["n/a", "84.0 ms"]


def test_text_of_others_moves_no_cursor() -> None:
    """Control characters, line ends and broken text become blanks; markup is shown as it stands."""
    assert plain("a\x1b[2Jb\nc\udcff\u200bd") == "a [2Jb c  d"
    text = shown(summary_table(summary_of(error="[red]x[/] [/nothing]"), metadata={"model": "[bold]m"}))
    assert "[red]x[/] [/nothing]" in text
    assert "At n/a users of [bold]m this" in text


# History


def run_entry(number: int = 0, **changes: object) -> RunEntry:
    """A run of our own."""
    metadata = {
        "error": "rank 1: disk full",
        "args": ["kvcache", "run", "--label", "a=b c"],
        "cwd": "/home/ana/here",
        "executed_command": "mpirun -n 2 python -m mpi4py",
        "num_users": 100,
        "parameters": {"num_users": 100, "trace": None, "tiers": {"gpu_mem_gb": 16.0}},
        "parameter_sources": {"num_users": "flag", "trace": "default", "tiers": {"gpu_mem_gb": "file"}},
        "cluster_information": {"hosts": [{"host": "h1", "cpu": {"logical_cores": 8}}, {"host": "h2"}]},
        "software": {"mlpstorage": "0.1.0", "python": "3.11.7", "mpi": None},
    }
    values: dict[str, object] = {
        "run_id": f"20261123_09300{number}-0a1b2c",
        "run_datetime": f"20261123_09300{number}",
        "benchmark_type": "kv_cache",
        "model": "llama3.1-70b-instruct",
        "command": "run",
        "ranks": 16,
        "hosts": tuple(f"host{host}" for host in range(8)),
        "status": "failed",
        "exit_code": 6,
        "runtime_s": 87.2,
        "headline": "1.92 GiB/s read, TTFT p95 84.0 ms",
        "result_dir": f"/mnt/results/kv_cache/llama3.1-70b-instruct/run/20261123_09300{number}",
        "labels": {"disk": "nvme0"},
        "metadata_path": Path("/mnt/results/x_metadata.json"),
        "metadata": metadata,
    }
    return RunEntry(**(values | changes))  # type: ignore[arg-type]


BARE = run_entry(
    1,
    benchmark_type="training",
    model=None,
    ranks=1,
    hosts=(),
    status="unknown",
    exit_code=None,
    runtime_s=None,
    headline=None,
    result_dir=None,
    labels={},
    metadata={},
)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_history_fits_the_terminal(width: int) -> None:
    """Ids and result directories are whole at any width, and no line is longer than the terminal."""
    entries = [run_entry(), BARE]
    text = shown(history_table(entries), width)
    assert max(map(len, text.splitlines())) <= width
    unfolded = "".join(text.split())
    for entry in entries:
        assert entry.run_id in text
    assert "1.92GiB/sread,TTFTp9584.0ms" in unfolded
    if width < 200:
        assert "/mnt/results/kv_cache/llama3.1-70b-instruct/run/20261123_093000" in text
    assert text.index(entries[0].run_id) < text.index(entries[1].run_id)


def test_wide_history_is_a_table() -> None:
    """At 200 columns each run has a row under the headings; of many hosts the first are named."""
    lines = shown(history_table([run_entry(), BARE]), 200).splitlines()
    assert lines[0].split("  ")[0] == "id"
    for heading in ("when", "benchmark", "model", "command", "ranks", "hosts", "status", "run time", "result dir"):
        assert heading in lines[0]
    row = next(line for line in lines if line.startswith("20261123_093000-0a1b2c"))
    assert "2026-11-23 09:30:00" in row
    assert "host0,host1 +6" in row
    assert row.split("1 m 27 s")[0].rstrip().endswith("failed")


def test_piped_history_is_neither_cut_nor_folded(tmp_path: Path) -> None:
    """Where the output is a file, a run is one line with everything, however long, and no escape sequence."""
    entries = [run_entry(result_dir="/mnt/" + "d" * 3_000, hosts=tuple(f"node{n:04}" for n in range(500))), BARE]
    with (tmp_path / "out").open("w+", encoding="utf-8") as stream:
        console_for(stream).print(history_table(entries))
        stream.seek(0)
        lines = stream.read().splitlines()
    assert len(lines) == 2 + len(entries)
    assert "/mnt/" + "d" * 3_000 in lines[2]
    assert "node0000,node0001," in lines[2]
    assert "node0499 " in lines[2]
    assert lines[3].split() == [
        "20261123_093001-0a1b2c",
        "2026-11-23",
        "09:30:01",
        "training",
        "-",
        "run",
        "1",
        "-",
        "unknown",
        "-",
        "-",
        "-",
    ]
    assert "\x1b" not in "".join(lines)


def test_status_is_coloured() -> None:
    """Complete is green, failed red, interrupted yellow, in both forms of the list."""
    entries = [run_entry(number, status=status) for number, status in enumerate(("complete", "failed", "interrupted"))]
    for width in (80, 250):
        text = shown(history_table(entries), width, color=True)
        assert "\x1b[32mcomplete" in text
        assert "\x1b[1;31mfailed" in text
        assert "\x1b[33minterrupted" in text


def test_history_without_runs_says_so() -> None:
    """An empty list is told in words."""
    assert shown(history_table([])) == "no runs\n"


def test_history_shows_texts_of_others_as_they_stand() -> None:
    """Names from foreign files are no markup and no terminal commands."""
    entry = run_entry(model="[red]\x1b[2J", headline="[/x]", run_datetime="2026-11-23T09:30:00", hosts=("[b]",))
    for width in (80, 300):
        text = shown(history_table([entry]), width)
        assert "[red] [2J" in text
        assert "[/x]" in text
        assert "[b]" in text
        assert "2026-11-23T09:30:00" in text
        assert "\x1b" not in text


def test_details_tell_the_whole_run() -> None:
    """Status, error, place, arguments with their quotes, parameters with their sources, cluster and software."""
    text = shown(run_details(run_entry(), None), 120)
    lines = [line.split() for line in text.splitlines()]
    assert ["Run", "20261123_093000-0a1b2c", "failed,", "exit", "code", "6"] in lines
    assert ["num_users", "100", "flag"] in lines
    assert ["trace", "-", "default"] in lines
    assert ["tiers.gpu_mem_gb", "16.0", "file"] in lines
    assert ["hosts[0].cpu.logical_cores", "8"] in lines
    for part in (
        "rank 1: disk full",
        "kvcache run --label 'a=b c'",
        "/home/ana/here",
        "mpirun -n 2 python -m mpi4py",
        "disk=nvme0",
        "mlpstorage 0.1.0, python 3.11.7",
        "16 on host0, host1",
    ):
        assert part in text


def test_details_end_with_the_summary_of_the_run() -> None:
    """A summary of a KV-cache run is shown as at its end; read from JSON, as `history show` has it."""
    document = json.loads(summary_of().model_dump_json())
    text = shown(run_details(run_entry(), document))
    # The model's name stands in the metadata, which this entry does not have.
    assert shown(summary_table(summary_of(), metadata=run_entry().metadata)) in text
    assert "time to first token (TTFT) p95 84.0 ms against 1.90 s without it" in flat(text)


@pytest.mark.parametrize(
    "summary",
    [
        {"epochs": 5, "samples_per_second": {"mean": 12.5, "all": [1.5, 2.5]}},
        {**json.loads(summary_of().model_dump_json()), "latency": {}, "epochs": 5, "mean": 12.5},
    ],
    ids=["another benchmark", "another version"],
)
def test_details_show_summaries_of_others(summary: dict[str, object]) -> None:
    """Numbers of another benchmark or version are listed by name."""
    lines = [line.split() for line in shown(run_details(BARE, summary), 120).splitlines()]
    assert ["epochs", "5"] in lines
    assert any(line[-1:] == ["12.5"] for line in lines)


def test_summary_without_a_latency_is_listed_instead() -> None:
    """A valid summary that lacks a latency which the table shows does not break `history show`."""
    document = json.loads(summary_of().model_dump_json())
    del document["latency"]["ttft"]
    text = shown(run_details(run_entry(), document), 120)
    assert "storage.read_bytes" in text


def test_details_of_a_run_that_recorded_little() -> None:
    """Where nothing but the six keys is there, nothing is invented and no empty heading shown."""
    text = shown(run_details(BARE, None))
    assert text.split()[0] == "Run"
    for absent in ("Parameter", "Cluster", "Software", "Arguments", "Error", "None"):
        assert absent not in text


def test_details_fit_the_terminal() -> None:
    """Long commands and facts are folded."""
    facts = {"hosts": [{"mount": "/a" * 100, "number": number} for number in range(100)]}
    entry = run_entry(metadata={"cluster_information": facts, "executed_command": "x" * 300})
    lines = shown(run_details(entry, None)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("... and 140 more")


@pytest.mark.parametrize("module", ["mlpstorage.history", "mlpstorage.cli.history_args", "mlpstorage.results.merge"])
def test_rich_is_loaded_by_reports_alone(module: str) -> None:
    """Only the report modules pay for rich."""
    code = f"import sys, {module}; print('rich' in sys.modules, {module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
