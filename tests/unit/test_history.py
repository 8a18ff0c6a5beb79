"""History: a view over metadata files, whoever wrote them and whatever became of them."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mlpstorage.cli.history_args import add_history_arguments
from mlpstorage.cluster.process import this_process
from mlpstorage.errors import ConfigurationError, MissingFileError, UsageError
from mlpstorage.history import RunEntry, find_run, list_runs, rerun_argv, rerun_cwd
from mlpstorage.report.history_table import history_json
from mlpstorage.results.directory import create_location, metadata_path, planned_location, write_json_atomic

ROOT = Path(__file__).resolve().parents[2]


def add_run(results_dir: Path, run_datetime: str, benchmark: str = "kv_cache", **changes: object) -> Path:
    """Write a run with the six keys that every program writes, and the changes; returns the metadata file."""
    model = str(changes.get("model", "tiny-1b"))
    location = create_location(planned_location(results_dir, benchmark, model, "run", run_datetime))
    metadata: dict[str, object] = {
        "benchmark_type": benchmark,
        "model": model,
        "command": "run",
        "run_datetime": run_datetime,
        "result_dir": str(location),
        "status": "complete",
    }
    path = metadata_path(location, benchmark, run_datetime)
    write_json_atomic(path, metadata | changes)
    return path


def runs(results_dir: Path, **filters: object) -> list[RunEntry]:
    """The runs below `results_dir`, where no file is expected to be damaged."""
    warnings: list[str] = []
    entries = list_runs(results_dir, warn=warnings.append, **filters)  # type: ignore[arg-type]
    assert warnings == []
    return entries


@pytest.fixture
def three_runs(tmp_path: Path) -> Path:
    """A results directory with three runs, not written in their order."""
    add_run(tmp_path, "20261123_100000", run_id="20261123_100000-aaaaaa", model="llama3.1-8b")
    add_run(tmp_path, "20261125_100000", run_id="20261125_100000-cccccc", status="failed")
    add_run(tmp_path, "20261124_100000", benchmark="training", run_id="20261124_100000-bbbbbb", model="unet3d")
    return tmp_path


def test_runs_are_listed_newest_first(three_runs: Path) -> None:
    """Order is by the time of the run, whatever the benchmark or the place of its files."""
    assert [entry.run_id[-6:] for entry in runs(three_runs)] == ["cccccc", "bbbbbb", "aaaaaa"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"benchmark": "training"}, ["bbbbbb"]),
        ({"model": "llama3.1-8b"}, ["aaaaaa"]),
        ({"status": "failed"}, ["cccccc"]),
        ({"status": "complete"}, ["bbbbbb", "aaaaaa"]),
        ({"benchmark": "kv_cache", "status": "complete"}, ["aaaaaa"]),
        ({"limit": 2}, ["cccccc", "bbbbbb"]),
        ({"limit": 1, "status": "complete"}, ["bbbbbb"]),
        ({"model": "unet"}, []),
    ],
)
def test_filters_narrow_the_list(three_runs: Path, filters: dict[str, object], expected: list[str]) -> None:
    """Filters combine and match whole names; the limit counts what is left of the newest."""
    assert [entry.run_id[-6:] for entry in runs(three_runs, **filters)] == expected


def test_our_runs_are_read_whole(tmp_path: Path) -> None:
    """Every value that a run records of itself is in its entry."""
    path = add_run(
        tmp_path,
        "20261123_100000",
        run_id="20261123_100000-aaaaaa",
        num_processes=4,
        hosts=["h1", "h2"],
        exit_code=6,
        runtime_s=12.5,
        status="failed",
        headline="1.92 GiB/s read, TTFT p95 84 ms",
        labels={"disk": "nvme0"},
    )
    (entry,) = runs(tmp_path)
    assert entry == RunEntry(
        run_id="20261123_100000-aaaaaa",
        run_datetime="20261123_100000",
        benchmark_type="kv_cache",
        model="tiny-1b",
        command="run",
        ranks=4,
        hosts=("h1", "h2"),
        status="failed",
        exit_code=6,
        runtime_s=12.5,
        headline="1.92 GiB/s read, TTFT p95 84 ms",
        result_dir=str(path.parent),
        labels={"disk": "nvme0"},
        metadata_path=path,
        metadata=json.loads(path.read_bytes()),
    )


@pytest.mark.parametrize("benchmark", ["kv_cache", "training", "checkpointing", "vector_db"])
def test_runs_of_other_programs_are_listed(tmp_path: Path, benchmark: str) -> None:
    """The six keys suffice: the rest is absent, one rank is assumed, and the id made from them stays the same."""
    path = add_run(tmp_path, "20261123_100000", benchmark)
    (entry,) = runs(tmp_path)
    assert (entry.benchmark_type, entry.status, entry.result_dir) == (benchmark, "complete", str(path.parent))
    assert (entry.ranks, entry.hosts, entry.headline, entry.runtime_s) == (1, (), None, None)
    assert entry.run_id.startswith("20261123_100000-")
    assert runs(tmp_path)[0].run_id == entry.run_id
    assert find_run(tmp_path, entry.run_id) == entry


def test_made_ids_differ_and_outlive_a_move(tmp_path: Path) -> None:
    """Runs of one second in directories of one name have ids of their own, also once the results lie elsewhere."""
    results_dir = tmp_path / "results"
    add_run(results_dir, "20261123_100000", "training", model="unet3d")
    add_run(results_dir, "20261123_100000", "training", model="resnet50")
    before = {entry.model: entry.run_id for entry in runs(results_dir)}
    assert len(set(before.values())) == 2
    results_dir.rename(tmp_path / "moved")
    assert {entry.model: entry.run_id for entry in runs(tmp_path)} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"num_processes": None, "hosts": None, "exit_code": None, "runtime_s": None, "labels": None, "process": None},
        {"num_processes": "four", "hosts": 7, "exit_code": "6", "runtime_s": "long", "labels": [], "process": "me"},
        {"num_processes": True, "hosts": {}, "exit_code": False, "runtime_s": True, "headline": 3, "process": 1},
        {"run_id": 5, "runtime_s": 10**400, "status": "running", "process": {"pid": "x", "host": 3}},
    ],
)
def test_odd_values_of_other_programs_are_left_out(tmp_path: Path, changes: dict[str, object]) -> None:
    """What has another type than ours counts as not recorded; the run is still listed."""
    add_run(tmp_path, "20261123_100000", "kv_cache", **changes)
    (entry,) = runs(tmp_path)
    assert (entry.ranks, entry.hosts, entry.exit_code, entry.runtime_s) == (1, (), None, None)
    assert (entry.headline, entry.labels) == (None, {})


def test_hosts_may_be_one_text(tmp_path: Path) -> None:
    """Another program's `a,b c` names three hosts."""
    add_run(tmp_path, "20261123_100000", hosts="a,b c")
    assert runs(tmp_path)[0].hosts == ("a", "b", "c")


def test_failed_invocation_has_no_result_directory(tmp_path: Path) -> None:
    """A recorded `result_dir` of null stays None; where the key is missing, the file's directory is the result's."""
    add_run(tmp_path, "20261123_100000", result_dir=None, status="failed")
    path = add_run(tmp_path, "20261124_100000")
    metadata = json.loads(path.read_bytes())
    del metadata["result_dir"], metadata["status"]
    write_json_atomic(path, metadata)
    newest, oldest = runs(tmp_path)
    assert oldest.result_dir is None
    assert (newest.result_dir, newest.status) == (str(path.parent), "unknown")


GOOD: Mapping[str, object] = {"benchmark_type": "training", "command": "run", "run_datetime": "20261122_000000"}

DAMAGED = {
    "empty": b"",
    "truncated": json.dumps(GOOD).encode()[:-9],
    "two documents": json.dumps(GOOD).encode() * 2,
    "blank": b" \n",
    "binary": bytes(range(256)),
    "not UTF-8": b'{"benchmark_type": "caf\xe9"}',
    "array": json.dumps([GOOD]).encode(),
    "number": b"17",
    "null": b"null",
    "nested too deep": b"[" * 200_000,
    "number too long": b'{"benchmark_type": ' + b"9" * 10_000 + b"}",
    "foreign object": b'{"name": "a package", "version": "1.0"}',
    "no benchmark": json.dumps({**GOOD, "benchmark_type": None}).encode(),
    "no command": json.dumps({**GOOD, "command": ["run"]}).encode(),
    "no time": json.dumps({**GOOD, "run_datetime": 20261122}).encode(),
    "empty name": json.dumps({**GOOD, "benchmark_type": ""}).encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_file_costs_one_warning(three_runs: Path, content: bytes) -> None:
    """Whatever a metadata file holds, the other runs are listed, and one line names the file."""
    damaged = three_runs / "kv_cache" / "x_metadata.json"
    damaged.write_bytes(content)
    warnings: list[str] = []
    assert len(list_runs(three_runs, warn=warnings.append)) == 3
    (warning,) = warnings
    assert warning.startswith(f"{damaged}: skipped: ")
    assert "\n" not in warning


def test_object_with_the_needed_keys_is_no_damage(three_runs: Path) -> None:
    """The counterpart of the damaged files: what they were made from is a run."""
    write_json_atomic(three_runs / "kv_cache" / "x_metadata.json", GOOD)
    assert len(runs(three_runs)) == 4


def test_damaged_files_cost_a_warning_each(three_runs: Path) -> None:
    """Several damaged files at once, also with filters that no damaged file could pass."""
    for number, content in enumerate(DAMAGED.values()):
        (three_runs / f"{number}_metadata.json").write_bytes(content)
    warnings: list[str] = []
    assert len(list_runs(three_runs, warn=warnings.append, status="failed", limit=1)) == 1
    assert len(warnings) == len(DAMAGED)


def test_what_is_no_regular_file_is_never_opened(three_runs: Path) -> None:
    """A named pipe would block its reader for ever: it costs a warning."""
    os.mkfifo(three_runs / "pipe_metadata.json")
    warnings: list[str] = []
    assert len(list_runs(three_runs, warn=warnings.append)) == 3
    assert warnings == [f"{three_runs / 'pipe_metadata.json'}: skipped: not a regular file"]


def test_links_and_files_of_a_run_are_passed_over(three_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cache, rank and log directories are not searched, links not followed: no run twice, no endless way."""
    run_dir = next(three_runs.glob("kv_cache/llama3.1-8b/run/*"))
    for name in ("cache", "ranks", "logs"):
        (run_dir / name).mkdir(exist_ok=True)
        (run_dir / name / "x_metadata.json").write_text("damaged")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    add_run(elsewhere, "20261126_100000")
    (three_runs / "linked").symlink_to(elsewhere)
    (three_runs / "up").symlink_to(three_runs)
    (three_runs / "latest_metadata.json").symlink_to(next(run_dir.glob("*_metadata.json")))
    (three_runs / "summary.json").write_text("no metadata")
    assert len(runs(three_runs)) == 3


@pytest.mark.parametrize("name", ["missing", "file"])
def test_missing_results_directory_has_no_runs(tmp_path: Path, name: str) -> None:
    """No directory, no runs: a warning says so, since the name may be mistyped."""
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    assert list_runs(tmp_path / name, warn=warnings.append) == []
    (warning,) = warnings
    assert str(tmp_path / name) in warning
    assert "--results-dir" in warning


def test_other_forms_of_time_sort_among_ours(tmp_path: Path) -> None:
    """A program that writes `2026-11-24T10:00:00` is sorted by that time."""
    add_run(tmp_path, "20261123_100000", run_id="old")
    add_run(tmp_path, "20261125_100000", run_id="new")
    path = add_run(tmp_path, "20261124_100000", run_id="middle")
    write_json_atomic(path, {**json.loads(path.read_bytes()), "run_datetime": "2026-11-24T10:00:00.123"})
    assert [entry.run_id for entry in runs(tmp_path)] == ["new", "middle", "old"]


# Runs that say that they are running


def test_run_of_a_living_process_is_running(tmp_path: Path) -> None:
    """While the process that wrote `running` lives, that is the status; a process of another host cannot be judged."""
    add_run(tmp_path, "20261123_100000", status="running", process=this_process())
    add_run(tmp_path, "20261123_110000", status="running", process=this_process() | {"host": "elsewhere.invalid"})
    add_run(tmp_path, "20261123_120000", status="running")
    assert [entry.status for entry in runs(tmp_path)] == ["running"] * 3


def test_run_of_a_killed_process_is_interrupted(tmp_path: Path) -> None:
    """A process killed with SIGKILL cannot say that it ended: once it is gone, its run shows as interrupted."""
    code = "import json, sys; from mlpstorage.cluster.process import this_process; "
    code += "print(json.dumps(this_process()), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        described = json.loads(process.stdout.readline())
        path = add_run(tmp_path, "20261123_100000", status="running", process=described)
        assert [entry.status for entry in runs(tmp_path)] == ["running"]
        process.kill()
        process.wait()
    assert [entry.status for entry in runs(tmp_path)] == ["interrupted"]
    assert len(runs(tmp_path, status="interrupted")) == 1
    assert runs(tmp_path, status="running") == []
    # The file itself is the run's and stays as it was.
    assert json.loads(path.read_bytes())["status"] == "running"


def test_finished_run_keeps_its_status(tmp_path: Path) -> None:
    """A run that ended is not judged by its process, which is gone as it should be."""
    add_run(tmp_path, "20261123_100000", status="complete", process=this_process() | {"start_ticks": 1})
    assert [entry.status for entry in runs(tmp_path)] == ["complete"]


# One run


def test_run_is_found_by_id_prefix_or_place(three_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole id, any beginning that no other has, or the result directory, also relative and with a slash."""
    wanted = next(entry for entry in runs(three_runs) if entry.model == "unet3d")
    assert wanted.result_dir is not None
    monkeypatch.chdir(three_runs)
    relative = os.path.relpath(wanted.result_dir, three_runs)
    for name in (wanted.run_id, "20261124", wanted.result_dir, f"{wanted.result_dir}/", relative):
        assert find_run(three_runs, name) == wanted


def test_exact_id_beats_longer_ones(tmp_path: Path) -> None:
    """An id that is the beginning of another can still be named."""
    add_run(tmp_path, "20261123_100000", run_id="a1")
    add_run(tmp_path, "20261123_110000", run_id="a12")
    assert find_run(tmp_path, "a1").run_id == "a1"


@pytest.mark.parametrize("name", ["2026112", ""])
def test_ambiguous_id_lists_the_candidates(three_runs: Path, name: str) -> None:
    """A prefix of several ids is a usage error that names each with its directory; so is an empty one."""
    with pytest.raises(UsageError) as raised:
        find_run(three_runs, name)
    for entry in runs(three_runs):
        assert f"{entry.run_id} ({entry.result_dir})" in str(raised.value)


def test_empty_id_names_not_even_the_only_run(tmp_path: Path) -> None:
    """A script's unset variable runs nothing again."""
    add_run(tmp_path, "20261123_100000")
    with pytest.raises(UsageError):
        find_run(tmp_path, "")


def test_unknown_id_is_missing(three_runs: Path) -> None:
    """No such run: the error names the id, the directory, and a file that could not be read and may be it."""
    with pytest.raises(MissingFileError, match=f"no run 'zz' below {three_runs};"):
        find_run(three_runs, "zz")
    (three_runs / "x_metadata.json").write_text("{")
    with pytest.raises(MissingFileError, match=r"1 could not be read, the first: .*x_metadata\.json"):
        find_run(three_runs, "zz")


def test_arguments_are_kept_exactly(tmp_path: Path) -> None:
    """Blanks, quotes, line ends, empty and undecodable arguments come back byte by byte."""
    args = ["kvcache", "run", "--label", "a=b c", "", "it's", '"x"', "two\nlines", "$HOME", os.fsdecode(b"caf\xe9")]
    add_run(tmp_path, "20261123_100000", args=args, cwd=str(tmp_path))
    (entry,) = runs(tmp_path)
    assert rerun_argv(entry) == args
    assert rerun_cwd(entry) == tmp_path


@pytest.mark.parametrize("args", [None, "kvcache run", {"model": "tiny-1b"}, ["run", 5]])
def test_run_without_arguments_cannot_be_repeated(tmp_path: Path, args: object) -> None:
    """Another program's metadata may hold anything under `args`: only a list of texts can be run."""
    add_run(tmp_path, "20261123_100000", args=args)
    (entry,) = runs(tmp_path)
    with pytest.raises(ConfigurationError, match="cannot be run again"):
        rerun_argv(entry)
    assert rerun_cwd(entry) is None


def test_directory_of_the_run_must_be_there(tmp_path: Path) -> None:
    """Relative paths in the arguments mean nothing elsewhere."""
    add_run(tmp_path, "20261123_100000", args=["version"], cwd=str(tmp_path / "gone"))
    with pytest.raises(MissingFileError, match="/gone"):
        rerun_cwd(runs(tmp_path)[0])


def test_json_list_parses_and_holds_every_run(three_runs: Path) -> None:
    """The list as strict JSON: one object a run, under the metadata's names, odd characters and NaN included."""
    add_run(three_runs, "20261126_100000", model="ünï", labels={"x": os.fsdecode(b"\xff")}, num_processes=2)
    path = add_run(three_runs, "20261127_100000")
    path.write_text(path.read_text().replace('"status"', '"runtime_s": NaN, "exit_code": 1e999, "status"'))
    listed = json.loads(json.dumps(history_json(runs(three_runs)), allow_nan=False))
    assert [run["run_datetime"][:8] for run in listed] == [f"202611{day}" for day in (27, 26, 25, 24, 23)]
    assert listed[0]["runtime_s"] is None
    assert listed[0]["exit_code"] is None
    assert (listed[1]["model"], listed[1]["num_processes"]) == ("ünï", 2)
    assert listed[3] == {
        "run_id": "20261124_100000-bbbbbb",
        "run_datetime": "20261124_100000",
        "benchmark_type": "training",
        "model": "unet3d",
        "command": "run",
        "num_processes": 1,
        "hosts": [],
        "status": "complete",
        "exit_code": None,
        "runtime_s": None,
        "headline": None,
        "result_dir": str(three_runs / "training/unet3d/run/20261124_100000"),
        "labels": {},
        "metadata_path": str(three_runs / "training/unet3d/run/20261124_100000/training_20261124_100000_metadata.json"),
    }


# Arguments


def parse(*argv: str) -> argparse.Namespace:
    """The namespace of `mlpstorage history <argv>`."""
    parser = argparse.ArgumentParser()
    add_history_arguments(parser)
    return parser.parse_args(argv)


def test_list_arguments() -> None:
    """What is not given is None or false; the flags have the names of the interface."""
    assert vars(parse("list")) == {
        "command": "list",
        "limit": None,
        "benchmark": None,
        "model": None,
        "status": None,
        "results_dir": None,
        "json": False,
    }
    given = parse("list", "--limit", "3", "--benchmark", "kvcache", "--status", "failed", "-rd", "/r", "--json")
    assert (given.limit, given.benchmark, given.status, given.results_dir, given.json) == (
        3,
        "kv_cache",
        "failed",
        Path("/r"),
        True,
    )


def test_show_and_rerun_arguments() -> None:
    """Both take a run's id and a results directory; only show has a JSON form."""
    assert vars(parse("show", "2026", "--json")) == {
        "command": "show",
        "run_id": "2026",
        "results_dir": None,
        "json": True,
    }
    assert vars(parse("rerun", "2026", "--results-dir", "r")) == {
        "command": "rerun",
        "run_id": "2026",
        "results_dir": Path("r"),
    }


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["list", "--limit", "0"], "--limit: '0' is not a whole number of 1 or more"),
        (["list", "--limit", "-1"], "--limit: '-1' is not a whole number of 1 or more"),
        (["list", "--limit", "many"], "--limit: 'many' is not a whole number of 1 or more"),
        (["list", "--status", "done"], "--status: invalid choice: 'done'"),
        (["list", "--benchmark", "kv"], "--benchmark: invalid choice: 'kv'"),
        (["show"], "ID"),
        ([], "COMMAND"),
        (["clear"], "'clear'"),
    ],
)
def test_bad_arguments_name_the_flag(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong value ends in exit code 2 and a line that names the flag and what it takes."""
    with pytest.raises(SystemExit) as raised:
        parse(*argv)
    assert raised.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
