"""What a run says of itself: whether the storage was worth it, and that its client once stood still."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.trace_files import burstgpt

if TYPE_CHECKING:
    from tests.cli.conftest import Cli


def test_storage_that_is_slower_than_computing_is_told(cli: Cli) -> None:
    """An H100 computes the tokens of a model of one billion weights faster than a disk reads them: the run says so."""
    # Short prompts, so that 100 requests a second ask little enough of any disk; most find the system prompt's blocks.
    trace = burstgpt(cli.place / "b.csv", [(n / 100, 130 + n % 60, 3) for n in range(400)])
    words = ("--trace", trace, "--block-tokens", "64", "--generation-mode", "realistic", "--accelerator", "h100")
    ended = cli.run(*cli.load(*words, "--warmup", "0.2", "--duration", "30", "--storage-gb", "1"))
    assert ended.returncode == 0, ended.stderr
    summary, text = cli.only_run().summary, " ".join(ended.stdout.split())
    assert text.startswith("With the trace b.csv played to tiny-1b this storage served ")
    assert "Reading tokens from this storage was SLOWER than computing them again." in text
    breakeven = summary["breakeven"]
    assert breakeven["storage_loads"] > 100
    assert breakeven["storage_saved_mean_ms"] < 0
    assert breakeven["storage_slower_loads"] > breakeven["storage_loads"] / 2
    assert breakeven["load_gib_per_s"] < breakeven["read_gib_per_s_needed"]
    # What TTFT would be without the storage is known, and lies below.
    with_ms, without_ms = (summary["latency"][name]["mean_ms"] for name in ("ttft", "ttft_without_storage"))
    assert without_ms < with_ms
    assert " without it. " in text
    assert summary["saved"]["slower_requests"] > 0


def test_without_an_accelerator_nothing_is_claimed(cli: Cli) -> None:
    """Compute is not modelled: the run says so and holds nothing against the storage."""
    ended = cli.run(*cli.load("--accelerator", "none"))
    assert ended.returncode == 0, ended.stderr
    summary, text = cli.only_run().summary, " ".join(ended.stdout.split())
    assert text.startswith("At 6 users of tiny-1b this storage served ")
    assert "compute is not modelled (--accelerator none)" in text
    assert "SLOWER" not in text
    assert "without it" not in text
    breakeven = summary["breakeven"]
    assert breakeven["storage_loads"] > 0
    assert breakeven["load_gib_per_s"] > 0
    for name in ("prefill_tokens_per_s", "read_gib_per_s_needed", "storage_slower_loads", "storage_saved_mean_ms"):
        assert breakeven[name] is None, name
    assert (summary["saved"]["requests"], summary["saved"]["mean_ms"]) == (0, None)


def rank_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The run's one worker, a child of the command."""
    (rank,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "mlpstorage.kvcache.rank" in child.cmdline()
    ]
    return rank


@pytest.mark.parametrize(
    ("words", "sharing"),
    [(("--io-depth", "6"), 6), (("--io-depth", "6", "--verify", "full"), 0)],
    ids=["waiting for the disk", "checking every byte"],
)
def test_threads_that_mostly_wait_share_a_cpu(cli: Cli, words: tuple[str, ...], sharing: int) -> None:
    """As many threads of the rank as objects are in flight may run on its highest CPU alone, all others anywhere."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU is all there is")
    process = cli.start(*cli.load(*words, "--cache-dir", cli.cache, "--duration", "4"))

    def places() -> list[set[int]]:
        assert process.poll() is None, process.communicate()
        return [os.sched_getaffinity(thread.id) for thread in rank_of(process).threads()]

    def measuring() -> bool:
        series = [run.directory / "timeseries.jsonl" for run in cli.runs()]
        return any(path.is_file() and path.stat().st_size > 0 for path in series)

    cli.eventually(measuring, "a line of the time series")
    found = places()
    assert found.count({cpus[-1]}) == sharing
    assert found.count(set(cpus)) == len(found) - sharing > 0
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_client_that_stands_still_cannot_hide_it(cli: Cli) -> None:
    """Of an open loop's 4 s the client is stopped for one: what should have arrived then is late, and is counted so.

    At 400 requests a second some 400 of 1,600 arrive while it stands, late by up to a second; one in a hundred is late
    by more than 1 s x (1 - 16 / 400) = 0.96 s. A client that sent when it could would show none of it.
    """
    words = ("--request-rate", "400", "--layout", "null", "--storage-gb", "20", "--block-tokens", "256")
    process = cli.start(*cli.load(*words, "--warmup", "0.2", "--duration", "4", "--num-users", "20"))

    def measuring() -> bool:
        assert process.poll() is None, process.communicate()
        series = [run.directory / "timeseries.jsonl" for run in cli.runs()]
        return any(path.is_file() and '"window"' in path.read_text() for path in series)

    cli.eventually(measuring, "a line of the time series inside the window")
    rank = rank_of(process)
    rank.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    rank.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    latency = cli.only_run().summary["latency"]
    assert latency["ttft"]["count"] > 1_200
    for name in ("ttft", "client_late"):
        assert latency[name]["p99_ms"] > 900, name
        assert latency[name]["max_ms"] > 990, name
        assert latency[name]["p50_ms"] < 500, "the others were in time"
    # Neither look-up nor load nor prefill took that long: it is the client's own.
    assert cli.only_run().summary["ttft_parts"]["client_late_mean_ms"] > 50
