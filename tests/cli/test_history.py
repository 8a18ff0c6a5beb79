"""History over real runs: list, show and rerun, refused invocations, damaged files, and two runs at once."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Cli, Run

LABEL = """note=it's "two  words" & $HOME"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, new_cli: Callable[[Path], Cli]) -> tuple[Cli, Run]:
    """A results directory with one run, whose label has blanks, quotes and what a shell would expand."""
    cli = new_cli(tmp_path_factory.mktemp("ran"))
    return cli, cli.play("--duration", "0.6", "--label", LABEL)


def test_list_shows_a_run(ran: tuple[Cli, Run]) -> None:
    """The text list names id, status, model and result directory of a run."""
    cli, run = ran
    ended = cli.run("history", "list", "--results-dir", cli.results)
    assert (ended.returncode, ended.stderr) == (0, "")
    for text in (run.metadata["run_id"], "complete", "tiny-1b", str(run.directory)):
        assert text in ended.stdout


def test_list_as_json(ran: tuple[Cli, Run]) -> None:
    """`history list --json` gives the same as data."""
    cli, run = ran
    metadata = run.metadata
    shown = cli.history()[-1]
    assert shown["status"] == "complete"
    assert shown["result_dir"] == str(run.directory)
    for key in ("run_id", "benchmark_type", "model", "command", "run_datetime", "exit_code", "labels", "runtime_s"):
        assert shown[key] == metadata[key], key


def test_list_can_be_narrowed(ran: tuple[Cli, Run]) -> None:
    """Filters by model and status leave out what does not fit."""
    cli, _ = ran
    for words, count in ((["--model", "tiny-1b"], 1), (["--model", "llama2-7b"], 0), (["--status", "failed"], 0)):
        ended = cli.run("history", "list", "--json", "--results-dir", cli.results, *words)
        assert len(json.loads(ended.stdout)) == count, words


def test_show_prints_one_run_whole(ran: tuple[Cli, Run]) -> None:
    """`history show` takes the beginning of an id; as text it names parameters and labels, as JSON it is the files."""
    cli, run = ran
    run_id = run.metadata["run_id"]
    text = cli.run("history", "show", run_id[:-2], "--results-dir", cli.results)
    assert (text.returncode, text.stderr) == (0, "")
    for part in (run_id, str(run.directory), "num_users", "prefill_tokens_per_s"):
        assert part in text.stdout
    data = cli.run("history", "show", run_id, "--json", "--results-dir", cli.results)
    assert data.returncode == 0, data.stderr
    assert json.loads(data.stdout) == {"metadata": run.metadata, "summary": run.summary}


def test_unknown_id(ran: tuple[Cli, Run]) -> None:
    """An id that no run has: exit 3, and the id is named."""
    cli, _ = ran
    ended = cli.run("history", "show", "19990101", "--results-dir", cli.results)
    assert ended.returncode == 3
    assert "'19990101'" in ended.stderr


def test_rerun_keeps_the_quoting(cli: Cli) -> None:
    """`history rerun` runs the same words again: a label with blanks, quotes and `$` arrives as it was."""
    first = cli.play("--duration", "0.6", "--label", LABEL)
    assert first.metadata["labels"] == {"note": LABEL.partition("=")[2]}
    assert shlex.split(first.metadata["executed_command"])[1:] == first.metadata["args"]
    ended = cli.run("history", "rerun", first.metadata["run_id"], "--results-dir", cli.results)
    assert ended.returncode == 0, ended.stderr
    (second,) = [run for run in cli.runs() if run.directory != first.directory]
    assert second.metadata["args"] == first.metadata["args"]
    assert second.metadata["labels"] == first.metadata["labels"]
    assert second.summary["workload_digest"] == first.summary["workload_digest"]


def test_refused_invocation_is_listed(cli: Cli) -> None:
    """A run with a trace that is not there has no results, and appears in history as failed, with its exit code."""
    cli.run(*cli.load("--trace", cli.place / "none.jsonl"))
    (shown,) = cli.history()
    assert (shown["status"], shown["exit_code"], shown["result_dir"]) == ("failed", 3, None)
    assert (shown["model"], shown["command"], shown["benchmark_type"]) == ("tiny-1b", "run", "kv_cache")
    details = cli.run("history", "show", shown["run_id"], "--results-dir", cli.results)
    assert "none.jsonl" in details.stdout


def test_damaged_metadata_costs_one_warning(cli: Cli) -> None:
    """A metadata file that is cut off costs one line that names it; the other runs are shown."""
    for name in ("none.jsonl", "neither.jsonl"):
        cli.run(*cli.load("--trace", cli.place / name))
    damaged, _ = sorted(cli.results.rglob("*_metadata.json"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    ended = cli.run("history", "list", "--json", "--results-dir", cli.results)
    assert ended.returncode == 0
    assert len(json.loads(ended.stdout)) == 1
    (warning,) = ended.stderr.splitlines()
    assert str(damaged) in warning


def test_second_run_on_a_cache_directory_is_refused(cli: Cli) -> None:
    """While a run holds a cache directory another is refused with exit 5, by name; the first is not disturbed."""
    cli.cache.mkdir()
    (cli.cache / "precious.txt").write_text("not the run's\n")
    first = cli.start(*cli.load("--duration", "2.5", "--cache-dir", cli.cache))
    cli.eventually(lambda: cli.objects() or first.poll() is not None, "files in the cache directory")
    ended = cli.run(*cli.load("--cache-dir", cli.cache))
    assert first.poll() is None, "the first run still holds the directory"
    assert ended.returncode == 5, ended.stderr
    assert f"{cli.cache / 'rank_0'} is in use by run " in ended.stderr
    assert cli.objects(), "the first run's files are there"
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 0, stderr
    assert [path.name for path in cli.cache.rglob("*")] == ["precious.txt"]
    assert sorted(shown["status"] for shown in cli.history()) == ["complete", "failed"]
