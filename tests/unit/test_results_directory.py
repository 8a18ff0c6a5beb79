"""Result directories and whole-or-nothing files, on a real file system and with real processes."""

import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpstorage.config import BENCHMARK_TYPES, RunStatus
from mlpstorage.errors import AccessError, RunError
from mlpstorage.measure.histogram import Histogram
from mlpstorage.results.directory import (
    check_results_dir,
    create_location,
    invocation_path,
    metadata_path,
    new_run_id,
    planned_location,
    write_json_atomic,
    write_jsonl_atomic,
    write_text_atomic,
)
from mlpstorage.results.models import HistogramData

ROOT = Path(__file__).resolve().parents[2]
WHEN = "20261123_093000"
NOBODY = 65534


def plan(results_dir: Path, model: str = "tiny-1b") -> Path:
    """The location of a KV-cache run of `model`."""
    return planned_location(results_dir, BENCHMARK_TYPES.kv_cache, model, "run", WHEN)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user of the machine can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


def as_ordinary_user(statement: str, path: Path) -> str:
    """What `statement` (with `path` a Path) raises in a process that is not root: `class: message`, or `nothing`."""
    code = f"""
import os, sys
from pathlib import Path
from mlpstorage.results.directory import *
from mlpstorage.results.directory import planned_location
if os.getuid() == 0:
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
path = Path(sys.argv[1])
try:
    {statement}
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
else:
    print("nothing")
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# Files


def test_json_file_holds_models_enums_and_paths(tmp_path: Path) -> None:
    """Result models, enums, paths and tuples are written as JSON has them, whatever they are nested in."""
    histogram = Histogram()
    histogram.record(7)
    document = {
        "status": RunStatus.COMPLETE,
        "where": Path("/a b"),
        "parts": ({"histogram": HistogramData.of(histogram)},),
        "absent": None,
    }
    write_json_atomic(tmp_path / "x.json", document)
    assert json.loads((tmp_path / "x.json").read_bytes()) == {
        "status": "complete",
        "where": "/a b",
        "parts": [
            {
                "histogram": {
                    "scheme": "log-linear-7",
                    "counts": {"7": 1},
                    "sum_ns": 7,
                    "min_ns": 7,
                    "max_ns": 7,
                }
            }
        ],
        "absent": None,
    }


def test_model_is_read_back_as_it_was(tmp_path: Path) -> None:
    """What is written of a result model gives the same model again."""
    histogram = Histogram()
    for value_ns in (0, 255, 10**6, 10**9):
        histogram.record(value_ns)
    written = HistogramData.of(histogram)
    write_json_atomic(tmp_path / "h.json", written)
    assert HistogramData.model_validate_json((tmp_path / "h.json").read_bytes()) == written


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    """NaN and infinities are written as null, at any depth: a strict reader takes the file."""
    write_json_atomic(tmp_path / "x.json", {"a": [float("nan"), {"b": float("inf")}, -float("inf"), 1.5]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {"a": [None, {"b": None}, None, 1.5]}


def test_argument_that_is_no_text_survives(tmp_path: Path) -> None:
    """An argument with bytes that are not UTF-8 is written, and read back as the same bytes."""
    raw = b"/data/caf\xe9 \xff"
    write_json_atomic(tmp_path / "x.json", {"args": [os.fsdecode(raw), "größe"]})
    args = json.loads((tmp_path / "x.json").read_bytes())["args"]
    assert os.fsencode(args[0]) == raw
    assert args[1] == "größe"


def test_lines_file_holds_one_record_a_line(tmp_path: Path) -> None:
    """Each record is one line, also where its text has line ends of its own."""
    records: list[dict[str, object]] = [{"t_s": 1.0, "text": "a\nb"}, {"t_s": float("nan")}]
    write_jsonl_atomic(tmp_path / "series.jsonl", iter(records))
    lines = (tmp_path / "series.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [{"t_s": 1.0, "text": "a\nb"}, {"t_s": None}]
    assert lines[-1] == b""


def test_failed_document_leaves_the_old_file_alone(tmp_path: Path) -> None:
    """A document that JSON cannot hold raises, and the file and its directory stay as they were."""
    path = tmp_path / "x.json"
    write_json_atomic(path, {"version": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"version": object()})
    assert json.loads(path.read_bytes()) == {"version": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    """Where the system refuses further bytes, the old file stays and nothing else is left; the error names the file."""
    path = tmp_path / "x.txt"
    write_text_atomic(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write .*x\.txt: file too large"):
            write_text_atomic(path, "n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reader_never_sees_a_part(tmp_path: Path) -> None:
    """While a process rewrites a file a hundred times, every look at it finds one whole version."""
    path = tmp_path / "x.json"
    code = """
import sys
from pathlib import Path
from mlpstorage.results.directory import write_json_atomic
for version in range(100):
    write_json_atomic(Path(sys.argv[1]), {"version": version, "filling": [version] * 20_000})
    if version == 0:
        print("begun", flush=True)
"""
    looks = 0
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        while writer.poll() is None:
            document = json.loads(path.read_bytes())
            assert document["filling"] == [document["version"]] * 20_000
            looks += 1
    assert writer.returncode == 0
    assert looks > 0
    assert json.loads(path.read_bytes())["version"] == 99


def test_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    """Others may read results as they may read any file of the user's: no mode 0600 of a temporary file is left."""
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_directory_without_permission_is_an_access_error(open_dir: Path) -> None:
    """A file that may not be written ends in exit code 4, one whose directory is not there in exit code 6."""
    open_dir.chmod(0o555)
    denied = as_ordinary_user("write_text_atomic(path / 'x', 'text')", open_dir)
    assert denied == f"AccessError: cannot write {open_dir / 'x'}: permission denied"
    missing = as_ordinary_user("write_text_atomic(path / 'no' / 'x', 'text')", open_dir)
    assert missing == f"RunError: cannot write {open_dir / 'no' / 'x'}: no such file or directory"


# Names


def test_location_is_planned_without_being_made(tmp_path: Path) -> None:
    """The plan names benchmark, model, command and time, and creates nothing."""
    assert plan(tmp_path / "results") == tmp_path / "results/kv_cache/tiny-1b/run" / WHEN
    assert list(tmp_path.iterdir()) == []


def test_taken_names_are_passed_over(tmp_path: Path) -> None:
    """The first name that nothing has is planned; a dangling link has its name as well."""
    parent = tmp_path / "kv_cache/tiny-1b/run"
    (parent / WHEN).mkdir(parents=True)
    (parent / f"{WHEN}-2").symlink_to(tmp_path / "nowhere")
    assert plan(tmp_path) == parent / f"{WHEN}-3"


@pytest.mark.parametrize(
    ("model", "component"),
    [
        ("llama3.1-8b", "llama3.1-8b"),
        ("meta-llama/Llama 3", "meta-llama_Llama_3"),
        ("..", "__"),
        (".hidden", "_hidden"),
        ("", "_"),
        ("a\nb\0c", "a_b_c"),
        ("m" * 300, "m" * 128),
    ],
)
def test_model_name_is_one_safe_component(tmp_path: Path, model: str, component: str) -> None:
    """No model name leaves the benchmark's directory, hides itself, or is too long to create."""
    location = create_location(plan(tmp_path, model))
    assert location == tmp_path / "kv_cache" / component / "run" / WHEN
    assert location.is_dir()


def test_names_of_metadata_files(tmp_path: Path) -> None:
    """Metadata of a run lies with it; of an invocation without a result directory, below `invocations`."""
    assert metadata_path(tmp_path, "kv_cache", WHEN) == tmp_path / f"kv_cache_{WHEN}_metadata.json"
    assert invocation_path(tmp_path, f"{WHEN}-0a1b2c") == tmp_path / f"invocations/{WHEN}-0a1b2c_metadata.json"


def test_run_ids_of_one_second_differ() -> None:
    """Ids begin with the time, so that they sort, and end in random digits."""
    ids = {new_run_id(WHEN) for _ in range(20)}
    assert len(ids) == 20
    for run_id in ids:
        begin, _, digits = run_id.rpartition("-")
        assert begin == WHEN
        assert len(digits) == 6
        int(digits, 16)


# Directories


def test_location_is_made_with_its_folders(tmp_path: Path) -> None:
    """A new result directory has `ranks` and `logs`; a second one for the same plan is another."""
    planned = plan(tmp_path)
    first, second, third = (create_location(planned) for _ in range(3))
    assert [location.name for location in (first, second, third)] == [WHEN, f"{WHEN}-2", f"{WHEN}-3"]
    for location in (first, second, third):
        assert sorted(path.name for path in location.iterdir()) == ["logs", "ranks"]


def test_processes_at_once_get_a_directory_each(tmp_path: Path) -> None:
    """Eight processes that create five locations each from one plan, all at once, get forty directories."""
    planned = plan(tmp_path)
    code = """
import sys
from pathlib import Path
from mlpstorage.results.directory import create_location
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    print(create_location(Path(sys.argv[1])))
"""
    command = [sys.executable, "-c", code, str(planned)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    made = [Path(line) for output in outputs for line in output.splitlines()]
    expected = {planned, *(planned.with_name(f"{WHEN}-{number}") for number in range(2, 41))}
    assert len(made) == 40
    assert set(made) == set(planned.parent.iterdir()) == expected


@pytest.mark.parametrize("below", ["", "results", "results/deeper"])
def test_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    """A file where a directory has to be is named, with the flag to change, before and at the creation."""
    (tmp_path / "file").write_text("mine")
    results_dir = tmp_path / "file" / below
    with pytest.raises(AccessError, match=r"/file is not a directory.*--results-dir"):
        check_results_dir(results_dir)
    with pytest.raises(AccessError, match=r"cannot create .*/file.*--results-dir"):
        create_location(plan(results_dir))
    assert (tmp_path / "file").read_text() == "mine"


def test_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    """A dangling link is no directory and none can be created in its place."""
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(AccessError, match=r"/link is not a directory"):
        check_results_dir(tmp_path / "link" / "results")
    with pytest.raises(AccessError):
        create_location(plan(tmp_path / "link"))


@pytest.mark.parametrize("mode", [0o555, 0o444, 0o222])
def test_directory_without_permission_is_refused(open_dir: Path, mode: int) -> None:
    """To an ordinary user, a directory that may not be written or searched is no place for results."""
    closed = open_dir / "closed"
    closed.mkdir()
    closed.chmod(mode)
    for results_dir in (closed, closed / "new" / "results"):
        refused = as_ordinary_user("check_results_dir(path)", results_dir)
        assert refused.startswith(f"AccessError: cannot write to the results directory {results_dir}: {closed}: ")
        assert "--results-dir" in refused
        failed = as_ordinary_user("create_location(planned_location(path, 'a', 'b', 'c', 'd'))", results_dir)
        assert failed.startswith(f"AccessError: cannot create the result directory {results_dir / 'a/b/c/d'}: ")
        assert "--results-dir" in failed
    closed.chmod(0o755)
    assert list(closed.iterdir()) == []


def test_directory_that_not_even_root_can_write_is_refused() -> None:
    """Where the permission bits say nothing to root, the trial shows what they do not."""
    for results_dir in (Path("/sys"), Path("/sys/results")):
        with pytest.raises(AccessError, match=r"/sys: .*--results-dir"):
            check_results_dir(results_dir)


@pytest.mark.parametrize("below", [".", "new", "new/deep/results"])
def test_check_leaves_nothing(tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a good directory returns and leaves nothing behind; a relative path is one from here."""
    check_results_dir(tmp_path / below)
    monkeypatch.chdir(tmp_path)
    check_results_dir(Path(below))
    assert list(tmp_path.iterdir()) == []
