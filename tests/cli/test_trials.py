"""Several trials of one run, and a warm-up that goes on until the hit ratio is steady."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from tests.trace_files import mooncake

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Cli, Run


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, new_cli: Callable[[Path], Cli]) -> tuple[Cli, Run, dict[str, Any]]:
    """Three trials on real files, the run, and what it printed as JSON."""
    cli = new_cli(tmp_path_factory.mktemp("three"))
    ended = cli.run(*cli.load("--trials", "3", "--duration", "0.8", "--cache-dir", cli.cache, "--json"))
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads(ended.stdout)
    return cli, cli.only_run(), document


def of_trial(run: Run, number: int) -> dict[str, Any]:
    """The summary of one trial."""
    document: dict[str, Any] = json.loads((run.directory / "trials" / f"trial_{number}" / "summary.json").read_text())
    return document


def test_each_trial_has_its_own_results(three: tuple[Cli, Run, dict[str, Any]]) -> None:
    """In a directory of its own, as a run has them, but for the metadata."""
    _, run, _ = three
    places = sorted((run.directory / "trials").iterdir())
    assert [place.name for place in places] == ["trial_1", "trial_2", "trial_3"]
    for number, place in enumerate(places, 1):
        names = {path.name for path in place.iterdir()}
        assert names == {"summary.json", "timeseries.jsonl", "timeseries_hosts.jsonl", "ranks", "logs"}
        assert (place / "ranks" / "rank_0.json").is_file()
        summary = of_trial(run, number)
        assert summary["trials"] is None
        assert summary["requests"]["completed"] > 0
        assert summary["storage_total"]["write_ops"] > 0, "each begins with an empty cache"


def test_spread_is_that_of_the_trials(three: tuple[Cli, Run, dict[str, Any]]) -> None:
    """Mean, deviation of the sample and coefficient of variation, worked out from the trials' own summaries."""
    _, run, document = three
    trials = run.summary["trials"]
    assert trials["count"] == 3
    assert document["summary"]["trials"] == trials
    summaries = [of_trial(run, number) for number in (1, 2, 3)]
    for name, values in (
        ("read_gib_per_s", [one["storage"]["read_gib_per_s"] for one in summaries]),
        ("requests_per_s", [one["requests"]["rate_per_s"] for one in summaries]),
        ("hit_ratio_tokens", [one["hit_ratio"]["tokens"]["total"] for one in summaries]),
    ):
        assert trials[name]["values"] == values
        assert trials[name]["mean"] == pytest.approx(statistics.fmean(values))
        assert trials[name]["stdev"] == pytest.approx(statistics.stdev(values))
        assert trials[name]["cv"] == pytest.approx(statistics.stdev(values) / statistics.fmean(values))


def test_everything_else_is_of_all_trials_together(three: tuple[Cli, Run, dict[str, Any]]) -> None:
    """Counts are sums, rates divide by all windows, and the time series goes on from trial to trial."""
    _, run, _ = three
    summary, trials = run.summary, [of_trial(run, number) for number in (1, 2, 3)]
    for block, name in (("requests", "completed"), ("storage", "read_bytes"), ("storage_total", "written_bytes")):
        assert summary[block][name] == sum(one[block][name] for one in trials)
    measured_s = sum(one["window"]["measured_s"] for one in trials)
    assert summary["window"]["measured_s"] == pytest.approx(measured_s)
    assert summary["requests"]["rate_per_s"] == pytest.approx(summary["requests"]["completed"] / measured_s)
    assert summary["latency"]["ttft"]["count"] == sum(one["latency"]["ttft"]["count"] for one in trials)
    assert {one["workload_digest"] for one in trials} == {summary["workload_digest"]}
    assert [line["t_s"] for line in run.series] == sorted(line["t_s"] for line in run.series)
    assert len(run.series) >= 3


def test_trials_are_one_run(three: tuple[Cli, Run, dict[str, Any]]) -> None:
    """History shows one run, and nothing of any trial is left on the storage."""
    cli, run, document = three
    (shown,) = cli.history()
    assert shown["run_id"] == run.metadata["run_id"] == document["metadata"]["run_id"]
    assert run.metadata["parameters"]["trials"] == 3
    assert not cli.cache.exists(), "the run made the directory, so it removed it"


def test_trials_have_a_table(three: tuple[Cli, Run, dict[str, Any]]) -> None:
    """`history show` ends as the run did."""
    cli, run, _ = three
    ended = cli.run("history", "show", run.metadata["run_id"], "--results-dir", cli.results)
    assert ended.returncode == 0, ended.stderr
    assert any(
        line.split() == ["3", "trials", "mean", "min", "max", "stdev", "CV"] for line in ended.stdout.splitlines()
    )


def test_a_trial_that_fails_is_the_last(cli: Cli) -> None:
    """A first trial whose window is over before its only request ends the run: no second one is begun."""
    trace = mooncake(cli.place / "late.jsonl", [(0, 600, [1, 2]), (60_000, 600, [1, 2])])
    words = ("--trials", "3", "--trace", trace, "--warmup", "0.3", "--duration", "0.3", "--layout", "null")
    run = cli.play(*words, exit_code=1)
    assert [place.name for place in (run.directory / "trials").iterdir()] == ["trial_1"]
    assert (run.metadata["status"], run.summary["status"]) == ("failed", "failed")
    assert "no request was answered inside the measured window" in run.metadata["error"]


def test_a_warm_up_goes_on_until_the_hit_ratio_is_steady(cli: Cli) -> None:
    """Three spans of 5 s that agree are the least; the window then has its full length, and the table says so."""
    # Single turns find the system prompt, from the first second to the last; 1,500 requests make a span's ratio steady.
    words = ("--warmup", "steady", "--disable-multi-turn", "--request-rate", "300", "--duration", "0.5")
    ended = cli.run(*cli.load(*words, "--layout", "null", "--storage-gb", "20", "--block-tokens", "256"))
    assert ended.returncode == 0, ended.stderr
    run = cli.only_run()
    window = run.summary["window"]
    assert window["warmup_steady"] is True
    assert 15.0 <= window["warmup_s"] < 60
    assert window["measured_s"] == pytest.approx(0.5, rel=0.1)
    assert "of warm-up, to a steady hit ratio" in " ".join(ended.stdout.split())
    assert run.metadata["parameters"]["warmup"] == "steady"
    assert run.metadata["parameter_sources"]["warmup"] == "flag"
