"""Whose a cache directory is, what of it is deleted, and what is never touched."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpstorage.errors import AccessError, ConfigurationError
from mlpstorage.storage.base import aligned_memory
from mlpstorage.storage.cache_dir import LOCK_NAME, MARKER_NAME, CacheDirectory, Removed, clear_leftovers
from mlpstorage.storage.file_store import FileStore

REPOSITORY = Path(__file__).resolve().parents[2]
OBJECT_BYTES = 8192
HOLDER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from mlpstorage.storage.base import aligned_memory
    from mlpstorage.storage.cache_dir import CacheDirectory
    from mlpstorage.storage.file_store import FileStore
    held = CacheDirectory.claim(Path(sys.argv[1]), sys.argv[2])
    store = FileStore(held.objects, "m|0|full", 8192)
    store.open()
    for block_id in range(int(sys.argv[3])):
        store.write(block_id, aligned_memory(8192))
    print("ready", flush=True)
    sys.stdin.read()
    """
)


@contextlib.contextmanager
def holder(directory: Path, run_id: str, objects: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a directory and has written objects; killed in the end."""
    command = [sys.executable, "-c", HOLDER, str(directory), run_id, str(objects)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def kill_one(directory: Path, run_id: str, objects: int) -> None:
    """Leave what a run leaves that is killed by SIGKILL."""
    with holder(directory, run_id, objects):
        pass


def fill(objects: Path, count: int) -> FileStore:
    """A store below a directory, with objects in it."""
    store = FileStore(objects, "m|0|full", OBJECT_BYTES)
    store.open()
    for block_id in range(count):
        store.write(block_id, aligned_memory(OBJECT_BYTES))
    return store


def tree(root: Path) -> list[str]:
    """All that is below a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_claim_and_release_leave_nothing(tmp_path: Path) -> None:
    """A claim creates the directory and its parents; after the objects are removed the release takes all away again."""
    held = CacheDirectory.claim(tmp_path / "a" / "b" / "cache", "run-1")
    assert held.cleared is None
    assert held.objects == tmp_path / "a" / "b" / "cache" / "run-1"
    assert held.objects.is_dir()
    fill(held.objects, 20)
    assert held.remove_objects() == Removed(run_id="run-1", files=20, bytes=20 * OBJECT_BYTES)
    held.release()
    held.release()
    assert tree(tmp_path) == []
    with pytest.raises(ValueError, match="given back"):
        held.remove_objects()


def test_directories_that_were_there_stay(tmp_path: Path) -> None:
    """Only what the claim itself created is removed, though it be empty."""
    (tmp_path / "a").mkdir()
    CacheDirectory.claim(tmp_path / "a" / "cache", "run-1").release()
    assert tree(tmp_path) == ["a"]
    CacheDirectory.claim(tmp_path / "a", "run-2").release()
    assert tree(tmp_path) == ["a"]


def test_marker_names_the_run(tmp_path: Path) -> None:
    """The marker says which tool, run, process and host hold the directory, and what the claim created."""
    held = CacheDirectory.claim(tmp_path / "cache", "run-1")
    document = json.loads((tmp_path / "cache" / MARKER_NAME).read_text(encoding="utf-8"))
    assert document.pop("created") > 1.7e9
    assert document == {
        "tool": "mlpstorage",
        "run_id": "run-1",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "created_directories": [str(tmp_path / "cache")],
    }
    held.release()


def test_second_claim_is_refused(tmp_path: Path) -> None:
    """A directory that another process holds is refused with its run and process named, and stays as it is."""
    with holder(tmp_path / "cache", "run-1", objects=3) as process:
        before = tree(tmp_path)
        with pytest.raises(ConfigurationError) as caught:
            CacheDirectory.claim(tmp_path / "cache", "run-2")
        for part in (str(tmp_path / "cache"), "run run-1", f"process {process.pid}", "--cache-dir"):
            assert part in str(caught.value)
        assert caught.value.exit_code == 5
        assert clear_leftovers(tmp_path / "cache", "run-1") is None
        assert tree(tmp_path) == before


def test_second_claim_in_the_same_process_is_refused(tmp_path: Path) -> None:
    """The lock is the claim's, not the process's; once given back the directory can be claimed anew."""
    held = CacheDirectory.claim(tmp_path, "run-1")
    with pytest.raises(ConfigurationError, match="in use by run run-1"):
        CacheDirectory.claim(tmp_path, "run-2")
    held.release()
    CacheDirectory.claim(tmp_path, "run-2").release()


def test_claim_clears_what_a_killed_run_left(tmp_path: Path) -> None:
    """The next claim deletes the dead run's objects, reports them, and inherits the directories it had created."""
    kill_one(tmp_path / "a" / "cache", "dead-1", objects=7)
    held = CacheDirectory.claim(tmp_path / "a" / "cache", "run-2")
    assert held.cleared == Removed(run_id="dead-1", files=7, bytes=7 * OBJECT_BYTES)
    assert tree(tmp_path / "a" / "cache") == sorted([LOCK_NAME, MARKER_NAME, "run-2"])
    held.remove_objects()
    held.release()
    assert tree(tmp_path) == []


def test_clear_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    """A launcher clears what its killed worker left, down to the directories it had created; twice does no harm."""
    kill_one(tmp_path / "a" / "cache", "dead-1", objects=5)
    assert clear_leftovers(tmp_path / "a" / "cache", "dead-1") == Removed(
        run_id="dead-1", files=5, bytes=5 * OBJECT_BYTES
    )
    assert tree(tmp_path) == []
    assert clear_leftovers(tmp_path / "a" / "cache", "dead-1") == Removed(run_id="dead-1", files=0, bytes=0)


def test_clear_leftovers_touches_no_other_run(tmp_path: Path) -> None:
    """Leftovers of another run are not the launcher's to clear."""
    kill_one(tmp_path, "dead-1", objects=2)
    before = tree(tmp_path)
    assert clear_leftovers(tmp_path, "run-2") == Removed(run_id="run-2", files=0, bytes=0)
    assert tree(tmp_path) == before


def test_release_without_removal_keeps_the_objects_findable(tmp_path: Path) -> None:
    """Objects that were not removed stay with their marker, and the next claim clears them."""
    held = CacheDirectory.claim(tmp_path / "cache", "run-1")
    fill(held.objects, 4)
    held.release()
    second = CacheDirectory.claim(tmp_path / "cache", "run-2")
    assert second.cleared == Removed(run_id="run-1", files=4, bytes=4 * OBJECT_BYTES)
    second.remove_objects()
    second.release()
    assert tree(tmp_path) == []


def test_half_written_and_probe_files_are_removed(tmp_path: Path) -> None:
    """What a store was writing or trying when it died goes with the objects."""
    held = CacheDirectory.claim(tmp_path, "run-1")
    store = fill(held.objects, 1)
    name = store.path(1).name
    store.path(1).with_name(f"{name}.0123abcd-17.tmp").write_bytes(b"half")
    (held.objects / ".probe-0123abcd").write_bytes(b"probe")
    assert held.remove_objects() == Removed(run_id="run-1", files=2, bytes=OBJECT_BYTES + 4)
    held.release()
    assert tree(tmp_path) == []


@pytest.mark.parametrize("after_a_kill", [False, True])
def test_foreign_files_survive(tmp_path: Path, *, after_a_kill: bool) -> None:
    """Files and directories that no run made stay, wherever they lie and however much they look alike."""
    cache = tmp_path / "cache"
    name = "ab" + "0" * 30
    foreign = [
        "notes.txt",
        "other/0/0/" + "0" * 32,
        f"run-1/{name}",
        "run-1/0/keep.bin",
        f"run-1/0/{name}",
        "run-1/0/0/" + "A" * 32,
        "run-1/0/0/" + "0" * 31,
        "run-1/0/0/" + "0" * 33,
        "run-1/0/0/" + "0" * 32 + ".tmp",
        "run-1/0/0/" + "0" * 32 + ".0123abcd-1.tmp.bak",
        "run-1/0/0/deeper/" + "0" * 32,
        "run-1/g/0/" + "0" * 32,
        "run-1/00/0/" + "0" * 32,
    ]

    def plant() -> None:
        for path in foreign:
            (cache / path).parent.mkdir(parents=True, exist_ok=True)
            (cache / path).write_text("mine", encoding="ascii")

    if after_a_kill:
        kill_one(cache, "run-1", objects=9)
        plant()
        removed = clear_leftovers(cache, "run-1")
    else:
        held = CacheDirectory.claim(cache, "run-1")
        fill(held.objects, 9)
        plant()
        removed = held.remove_objects()
        held.release()
    assert removed == Removed(run_id="run-1", files=9, bytes=9 * OBJECT_BYTES)
    assert {path for path in tree(cache) if (cache / path).is_file()} - {MARKER_NAME} == set(foreign)
    assert not (cache / LOCK_NAME).exists()


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    """Links in place of an object, a hash directory or the run's directory lead to nothing being deleted."""
    outside = tmp_path / "outside"
    for digit in "0123456789abcdef":
        (outside / digit).mkdir(parents=True)
        (outside / digit / (digit * 32)).write_text("mine", encoding="ascii")
    before = tree(outside)
    kill_one(tmp_path / "cache", "dead-1", objects=3)
    objects = tmp_path / "cache" / "dead-1"
    for path in objects.glob("5/*/*"):
        path.unlink()
    for path in objects.glob("5/*"):
        path.rmdir()
    (objects / "5").rmdir()
    (objects / "5").symlink_to(outside, target_is_directory=True)
    (objects / "6" / "6" / ("6" * 32)).symlink_to(outside / "6" / ("6" * 32))
    assert clear_leftovers(tmp_path / "cache", "dead-1") is not None
    assert tree(outside) == before
    kill_one(tmp_path / "other", "dead-2", objects=3)
    (tmp_path / "other" / "dead-2").rename(tmp_path / "moved")
    (tmp_path / "other" / "dead-2").symlink_to(tmp_path / "moved", target_is_directory=True)
    moved = tree(tmp_path / "moved")
    assert clear_leftovers(tmp_path / "other", "dead-2") == Removed(run_id="dead-2", files=0, bytes=0)
    assert tree(tmp_path / "moved") == moved


def test_linked_cache_directory_is_followed(tmp_path: Path) -> None:
    """The directory that the user names may be a link; the claim is of what it leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    held = CacheDirectory.claim(tmp_path / "link", "run-1")
    assert held.objects == tmp_path / "real" / "run-1"
    held.release()
    assert tree(tmp_path / "real") == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '"mlpstorage"',
        '{"tool": "other", "run_id": "victim", "pid": 1, "host": "h", "created": 1, "created_directories": []}',
        '{"tool": "mlpstorage", "run_id": "../victim", "pid": 1, "host": "h", "created": 1, "created_directories": []}',
        '{"tool": "mlpstorage", "run_id": "..", "pid": 1, "host": "h", "created": 1, "created_directories": []}',
        '{"tool": "mlpstorage", "run_id": 5, "pid": 1, "host": "h", "created": 1, "created_directories": []}',
        '{"tool": "mlpstorage", "run_id": "victim"}',
    ],
)
def test_marker_that_is_not_ours_stops_everything(tmp_path: Path, content: str) -> None:
    """Where the marker cannot be trusted nothing is deleted, and the user is told what to do."""
    victim = tmp_path / "victim" / "0" / "0"
    victim.mkdir(parents=True)
    (victim / ("0" * 32)).write_text("mine", encoding="ascii")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MARKER_NAME).write_text(content, encoding="ascii")
    with pytest.raises(ConfigurationError, match="remove it by hand") as caught:
        CacheDirectory.claim(tmp_path / "cache", "run-1")
    assert str(tmp_path / "cache" / MARKER_NAME) in str(caught.value)
    assert (victim / ("0" * 32)).exists()
    assert tree(tmp_path / "cache") == [MARKER_NAME]


def test_forged_marker_removes_no_other_directory(tmp_path: Path) -> None:
    """Directories that a marker lists are removed only where a claim of this directory can have created them."""
    (tmp_path / "bystander").mkdir()
    kill_one(tmp_path / "cache", "dead-1", objects=0)
    marker = tmp_path / "cache" / MARKER_NAME
    document = json.loads(marker.read_text(encoding="utf-8"))
    document["created_directories"].append(str(tmp_path / "bystander"))
    marker.write_text(json.dumps(document), encoding="utf-8")
    clear_leftovers(tmp_path / "cache", "dead-1")
    assert tree(tmp_path) == ["bystander"]


def test_directory_of_the_runs_name_is_refused(tmp_path: Path) -> None:
    """A directory that bears the run's name but is not the run's is not taken over."""
    (tmp_path / "run-1" / "0").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="is there already"):
        CacheDirectory.claim(tmp_path, "run-1")
    assert tree(tmp_path) == ["run-1", "run-1/0"]


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "/etc", ".hidden", "a" * 129, "a\n"])
def test_run_id_must_be_a_plain_name(tmp_path: Path, run_id: str) -> None:
    """A run id names a directory, and nothing but one."""
    with pytest.raises(ConfigurationError):
        CacheDirectory.claim(tmp_path, run_id)
    assert tree(tmp_path) == []


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    """A file in place of the directory, or of a parent, is told, and nothing is left behind."""
    (tmp_path / "file").write_text("mine", encoding="ascii")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigurationError, match="--cache-dir") as caught:
            CacheDirectory.claim(path, "run-1")
        assert str(tmp_path / "file") in str(caught.value)
    assert tree(tmp_path) == ["file"]


def test_read_only_file_system_is_an_access_error(tmp_path: Path) -> None:
    """Where nothing may be written the claim fails with code 4 and names the path and the flag."""
    target = tmp_path / "mounted"
    target.mkdir()
    mounted = subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "ro", "none", str(target)], check=False)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        for path in (target, target / "a" / "cache"):
            with pytest.raises(AccessError, match="--cache-dir") as caught:
                CacheDirectory.claim(path, "run-1")
            assert str(target) in str(caught.value)
            assert caught.value.exit_code == 4
    finally:
        subprocess.run(["/bin/umount", str(target)], check=True)


def test_forbidden_directory_is_an_access_error(tmp_path: Path) -> None:
    """Where the user has no right to write the claim fails with code 4."""
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(AccessError, match="Permission denied"):
            CacheDirectory.claim(tmp_path / "cache", "run-1")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("parents", [0, 2])
def test_one_claim_holds_at_a_time(tmp_path: Path, parents: int) -> None:
    """Claims and releases that race, each making and unlinking the lock and the directories, never hold at once."""
    directory = tmp_path.joinpath(*["deeper"] * parents, "cache")
    holding = threading.Lock()
    overlaps: list[str] = []
    successes: list[str] = []

    def claim_often(number: int) -> None:
        for turn in range(60):
            try:
                held = CacheDirectory.claim(directory, f"run-{number}-{turn}")
            except ConfigurationError:
                continue
            if holding.acquire(blocking=False):
                successes.append(held.objects.name)
                holding.release()
            else:
                overlaps.append(held.objects.name)
            assert held.cleared is None
            held.release()

    threads = [threading.Thread(target=claim_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert successes
    assert overlaps == []
    assert not [path for path in tree(tmp_path) if "run-" in path or path.endswith((MARKER_NAME, LOCK_NAME))]
