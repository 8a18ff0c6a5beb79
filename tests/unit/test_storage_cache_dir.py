"""Whose a cache directory is, what of it is deleted, and what is never touched."""

import contextlib
import dataclasses
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
from typing import Any

import pytest

from mlpstorage.config import Layout
from mlpstorage.errors import AccessError, ConfigurationError
from mlpstorage.storage.base import aligned_memory
from mlpstorage.storage.cache_dir import LOCK_NAME, CacheDirectory, clear_leftovers, leftover_bytes
from mlpstorage.storage.claim import CacheFormat, Claim, Removed, format_document
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.marker import MARKER_NAME

REPOSITORY = Path(__file__).resolve().parents[2]
OBJECT_BYTES = 8192
NAMESPACE = "m|0|0"
FORMAT = CacheFormat(
    layout=Layout.FILE, namespaces=(NAMESPACE,), object_bytes=OBJECT_BYTES, block_tokens=16, levels=(1, 1)
)
HOLDER = textwrap.dedent(
    """
    import json
    import sys
    from pathlib import Path
    from mlpstorage.storage.base import aligned_memory
    from mlpstorage.storage.cache_dir import CacheDirectory
    from mlpstorage.storage.claim import parsed_format
    from mlpstorage.storage.file_store import FileStore
    from mlpstorage.storage.keys import ObjectKeys
    _, directory, run_id, count, cache_format, how = sys.argv
    cache_format = parsed_format(json.loads(cache_format))
    held = CacheDirectory.claim(
        Path(directory), run_id, format=cache_format, keep="keep" in how, reuse="reuse" in how
    )
    if "claimed" not in how:
        held.run_begins()
    store = FileStore(held.objects, ObjectKeys(*cache_format.namespaces), 8192, levels=cache_format.levels)
    store.open()
    for object_id in range(int(count)):
        store.write(object_id, aligned_memory(8192))
    print("ready", flush=True)
    sys.stdin.read()
    """
)


def claim(
    directory: Path,
    run_id: str,
    *,
    cache_format: CacheFormat = FORMAT,
    keep: bool = False,
    reuse: bool = False,
    begins: bool = True,
) -> CacheDirectory:
    """A claim for objects of one format, unless another is given, whose run has begun, unless it is not to."""
    held = CacheDirectory.claim(directory, run_id, format=cache_format, keep=keep, reuse=reuse)
    if begins:
        held.run_begins()
    return held


@contextlib.contextmanager
def holder(
    directory: Path, run_id: str, objects: int = 0, *, how: str = "", cache_format: CacheFormat = FORMAT
) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a directory and has written objects; killed in the end."""
    words = [str(directory), run_id, str(objects), json.dumps(format_document(cache_format)), how]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def kill_one(directory: Path, run_id: str, objects: int, *, how: str = "", cache_format: CacheFormat = FORMAT) -> None:
    """Leave what a run leaves that is killed by SIGKILL."""
    with holder(directory, run_id, objects, how=how, cache_format=cache_format):
        pass


def fill(objects: Path, count: int, levels: tuple[int, ...] = (1, 1)) -> FileStore:
    """A store below a directory, with objects in it."""
    store = FileStore(objects, ObjectKeys(NAMESPACE), OBJECT_BYTES, levels=levels)
    store.open()
    for object_id in range(count):
        store.write(object_id, aligned_memory(OBJECT_BYTES))
    return store


def content(root: Path) -> dict[str, bytes]:
    """All files below a directory, and what is in them."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def tree(root: Path) -> list[str]:
    """All that is below a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_claim_and_release_leave_nothing(tmp_path: Path) -> None:
    """A claim creates the directory and its parents; after the objects are removed the release takes all away again."""
    held = claim(tmp_path / "a" / "b" / "cache", "run-1")
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
    claim(tmp_path / "a" / "cache", "run-1").release()
    assert tree(tmp_path) == ["a"]
    claim(tmp_path / "a", "run-2").release()
    assert tree(tmp_path) == ["a"]


def test_marker_names_the_run(tmp_path: Path) -> None:
    """The marker says which tool, run, process and host hold the directory, what is in it, and what the claim made."""
    held = claim(tmp_path / "cache", "run-1", keep=True)
    document = json.loads((tmp_path / "cache" / MARKER_NAME).read_text(encoding="utf-8"))
    assert document.pop("created") > 1.7e9
    assert document == {
        "tool": "mlpstorage",
        "run_id": "run-1",
        "objects": "run-1",
        "keep": True,
        "format": {
            "layout": "file",
            "namespaces": ["m|0|0"],
            "object_bytes": 8192,
            "block_tokens": 16,
            "levels": [1, 1],
        },
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
            claim(tmp_path / "cache", "run-2")
        for part in (str(tmp_path / "cache"), "run run-1", f"process {process.pid}", "--cache-dir"):
            assert part in str(caught.value)
        assert caught.value.exit_code == 5
        assert clear_leftovers(tmp_path / "cache", "run-1") is None
        assert tree(tmp_path) == before


def test_second_claim_in_the_same_process_is_refused(tmp_path: Path) -> None:
    """The lock is the claim's, not the process's; once given back the directory can be claimed anew."""
    held = claim(tmp_path, "run-1")
    with pytest.raises(ConfigurationError, match="in use by run run-1"):
        claim(tmp_path, "run-2")
    held.release()
    claim(tmp_path, "run-2").release()


def test_claim_clears_what_a_killed_run_left(tmp_path: Path) -> None:
    """The next claim deletes the dead run's objects, reports them, and inherits the directories it had created."""
    kill_one(tmp_path / "a" / "cache", "dead-1", objects=7)
    held = claim(tmp_path / "a" / "cache", "run-2")
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
    held = claim(tmp_path / "cache", "run-1")
    fill(held.objects, 4)
    held.release()
    second = claim(tmp_path / "cache", "run-2")
    assert second.cleared == Removed(run_id="run-1", files=4, bytes=4 * OBJECT_BYTES)
    second.remove_objects()
    second.release()
    assert tree(tmp_path) == []


def test_half_written_and_probe_files_are_removed(tmp_path: Path) -> None:
    """What a store was writing or trying when it died goes with the objects."""
    held = claim(tmp_path, "run-1")
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
        held = claim(cache, "run-1")
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
    held = claim(tmp_path / "link", "run-1")
    assert held.objects == tmp_path / "real" / "run-1"
    held.release()
    assert tree(tmp_path / "real") == []


WHO = '"pid": 1, "host": "h", "created": 1, "created_directories": []'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"mlpstorage"',
        '{"tool": "other", "run_id": "victim", ' + WHO + "}",
        '{"tool": "mlpstorage", "run_id": "../victim", ' + WHO + "}",
        '{"tool": "mlpstorage", "run_id": "..", ' + WHO + "}",
        '{"tool": "mlpstorage", "run_id": 5, ' + WHO + "}",
        '{"tool": "mlpstorage", "run_id": "victim"}',
        '{"tool": "mlpstorage", "run_id": "r", "objects": "../victim", ' + WHO + "}",
        '{"tool": "mlpstorage", "run_id": "victim", "format": 5, ' + WHO + "}",
        '{"tool": "mlpstorage", "run_id": "victim", "format": {"layout": "heap"}, ' + WHO + "}",
    ],
)
def test_marker_that_is_not_ours_stops_everything(tmp_path: Path, text: str) -> None:
    """Where the marker cannot be trusted nothing is deleted, and the user is told what to do."""
    victim = tmp_path / "victim" / "0" / "0"
    victim.mkdir(parents=True)
    (victim / ("0" * 32)).write_text("mine", encoding="ascii")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MARKER_NAME).write_text(text, encoding="ascii")
    with pytest.raises(ConfigurationError, match="remove it by hand") as caught:
        claim(tmp_path / "cache", "run-1")
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
        claim(tmp_path, "run-1")
    assert tree(tmp_path) == ["run-1", "run-1/0"]


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "/etc", ".hidden", "a" * 129, "a\n"])
def test_run_id_must_be_a_plain_name(tmp_path: Path, run_id: str) -> None:
    """A run id names a directory, and nothing but one."""
    with pytest.raises(ConfigurationError):
        claim(tmp_path, run_id)
    assert tree(tmp_path) == []


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    """A file in place of the directory, or of a parent, is told, and nothing is left behind."""
    (tmp_path / "file").write_text("mine", encoding="ascii")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigurationError, match="--cache-dir") as caught:
            claim(path, "run-1")
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
                claim(path, "run-1")
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
            claim(tmp_path / "cache", "run-1")
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
                held = claim(directory, f"run-{number}-{turn}")
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


def test_claim_fulfils_the_contract(tmp_path: Path) -> None:
    """A held directory is a `Claim`, for mypy and at run time."""
    contract: Claim = claim(tmp_path / "cache", "run-1")
    assert contract.place == str(tmp_path / "cache")
    assert not contract.reused
    contract.release()


def test_kept_objects_outlive_their_run(tmp_path: Path) -> None:
    """With `keep` the release leaves objects and marker, and takes the lock away."""
    held = claim(tmp_path / "cache", "run-1", keep=True)
    fill(held.objects, 5)
    before = content(held.objects)
    held.release()
    assert content(tmp_path / "cache" / "run-1") == before
    assert not (tmp_path / "cache" / LOCK_NAME).exists()
    assert json.loads((tmp_path / "cache" / MARKER_NAME).read_text(encoding="utf-8"))["keep"] is True


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_kept_objects_are_not_cleared(tmp_path: Path, *, killed: bool, keep: bool) -> None:
    """A claim that does not ask for them leaves kept objects alone, and says whose they are and what to do."""
    cache = tmp_path / "cache"
    if killed:
        kill_one(cache, "run-1", objects=5, how="keep")
    else:
        held = claim(cache, "run-1", keep=True)
        fill(held.objects, 5)
        held.release()
    before = content(cache / "run-1")
    assert len(before) == 5
    with pytest.raises(ConfigurationError) as caught:
        claim(cache, "run-2", keep=keep)
    for part in (str(cache), "run-1", "--reuse-cache", "--keep-cache", "--cache-dir"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 5
    assert clear_leftovers(cache, "run-1") == Removed(run_id="run-1", files=0, bytes=0)
    assert content(cache / "run-1") == before
    assert not (cache / LOCK_NAME).exists()


@pytest.mark.parametrize("how", ["keep", ""])
def test_reuse_takes_over_what_a_killed_run_left(tmp_path: Path, how: str) -> None:
    """The objects stay in their directory; without `keep` all is removed at the end, what the dead run made too."""
    cache = tmp_path / "a" / "cache"
    kill_one(cache, "dead-1", objects=6, how=how)
    before = content(cache / "dead-1")
    held = claim(cache, "run-2", reuse=True)
    assert held.reused
    assert held.cleared is None
    assert held.objects == cache / "dead-1"
    assert content(held.objects) == before
    with pytest.raises(ConfigurationError, match="in use by run run-2"):
        claim(cache, "run-3", reuse=True)
    assert held.remove_objects() == Removed(run_id="run-2", files=6, bytes=6 * OBJECT_BYTES)
    held.release()
    assert tree(tmp_path) == []


def test_reuse_again_and_again(tmp_path: Path) -> None:
    """Runs that reuse and keep pass the same objects on; the one that does not keep removes them, and all is gone."""
    cache = tmp_path / "cache"
    held = claim(cache, "run-0", keep=True, reuse=True)
    assert not held.reused, "there is nothing to reuse"
    fill(held.objects, 3)
    held.release()
    for number in (1, 2):
        held = claim(cache, f"run-{number}", keep=True, reuse=True)
        assert held.reused
        assert held.objects == cache / "run-0"
        assert len(content(held.objects)) == 3
        held.release()
    held = claim(cache, "run-3", reuse=True)
    assert held.remove_objects().files == 3
    held.release()
    assert tree(tmp_path) == []


@pytest.mark.parametrize("how", ["reuse", "reuse keep"])
def test_killed_run_that_reuses_leaves_its_objects_findable(tmp_path: Path, how: str) -> None:
    """What a run took over is found by the next as if it were the dead one's own; a launcher clears it if not kept."""
    cache = tmp_path / "cache"
    held = claim(cache, "run-1", keep=True)
    fill(held.objects, 4)
    held.release()
    kill_one(cache, "dead-2", objects=5, how=how)  # writes the same four, and one more
    if "keep" in how:
        assert clear_leftovers(cache, "dead-2") == Removed(run_id="dead-2", files=0, bytes=0)
        held = claim(cache, "run-3", reuse=True)
        assert held.reused
        assert len(content(held.objects)) == 5
        held.remove_objects()
        held.release()
    else:
        assert clear_leftovers(cache, "dead-2") == Removed(run_id="dead-2", files=5, bytes=5 * OBJECT_BYTES)
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"layout": Layout.SLAB, "levels": ()}, ["--layout", "slab", "file"]),
        ({"namespaces": ("big|0|0",)}, ["--model", "'big|0|0'", "'m|0|0'"]),
        ({"namespaces": ("m|0|0", "m|1|0"), "object_bytes": 4096}, ["--tensor-parallel", "in 2 parts"]),
        ({"block_tokens": 64, "object_bytes": 32_768}, ["--block-tokens", "64", "16"]),
        ({"levels": (3, 2)}, ["--file-levels", "3,2", "1,1"]),
        ({"levels": ()}, ["--file-levels", "flat", "1,1"]),
        ({"object_bytes": 4096}, ["--model", "4096", "8192"]),
        ({"block_tokens": 64, "namespaces": ("big|0|0",)}, ["--block-tokens", "--model"]),
    ],
)
def test_objects_of_another_format_are_not_reused(tmp_path: Path, other: dict[str, Any], parts: list[str]) -> None:
    """Each parameter that differs is named with its flag and both values; nothing is deleted, nothing changed."""
    held = claim(tmp_path / "cache", "run-1", keep=True)
    fill(held.objects, 3)
    held.release()
    before = content(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        claim(tmp_path / "cache", "run-2", cache_format=dataclasses.replace(FORMAT, **other), reuse=True)
    for part in ("--reuse-cache", str(tmp_path / "cache"), "run-1", *parts):
        assert part in str(caught.value)
    unequal = {"--layout", "--model", "--block-tokens", "--file-levels"} - set(parts)
    if "--tensor-parallel" in parts:
        unequal.discard("--model")
    assert not [flag for flag in unequal if flag in str(caught.value)]
    assert content(tmp_path) == before


def old_marker(cache: Path, run_id: str) -> None:
    """Turn a dead run's marker into one of version 0.1, which knew one layout and kept nothing."""
    document = json.loads((cache / MARKER_NAME).read_text(encoding="utf-8"))
    document = {key: document[key] for key in ("tool", "pid", "host", "created", "created_directories")}
    (cache / MARKER_NAME).write_text(json.dumps(document | {"run_id": run_id}), encoding="utf-8")


def test_leftovers_of_the_first_version_are_cleared(tmp_path: Path) -> None:
    """A marker without a format is of files below two levels of directories; they are cleared, but not reused."""
    cache = tmp_path / "cache"
    kill_one(cache, "dead-1", objects=3)
    old_marker(cache, "dead-1")
    assert leftover_bytes(cache) == 3 * OBJECT_BYTES
    with pytest.raises(ConfigurationError, match="an older version wrote"):
        claim(cache, "run-2", reuse=True)
    assert len(content(cache / "dead-1")) == 3
    held = claim(cache, "run-2")
    assert held.cleared == Removed(run_id="dead-1", files=3, bytes=3 * OBJECT_BYTES)
    held.release()
    assert tree(tmp_path) == []


@pytest.mark.parametrize("levels", [(), (1,), (3, 2), (2, 1, 1)])
def test_leftovers_at_other_levels_are_cleared(tmp_path: Path, levels: tuple[int, ...]) -> None:
    """The marker tells the levels of directories; below them objects go, and whatever else is there stays."""
    cache = tmp_path / "cache"
    cache_format = dataclasses.replace(FORMAT, levels=levels)
    kill_one(cache, "dead-1", objects=30, cache_format=cache_format)
    mine = [f"dead-1/{name}" for name in ("keep.bin", "abc/keep.bin", "ab/keep.bin", "a/keep.bin", "abc/ab/keep.bin")]
    for path in mine:
        (cache / path).parent.mkdir(exist_ok=True)
        (cache / path).write_text("mine", encoding="ascii")
    assert leftover_bytes(cache) == 30 * OBJECT_BYTES
    held = claim(cache, "run-2")
    assert held.cleared == Removed(run_id="dead-1", files=30, bytes=30 * OBJECT_BYTES)
    held.release()
    assert set(content(cache)) == set(mine)


@pytest.mark.parametrize(
    ("layout", "names"),
    [(Layout.SLAB, ["slab", "slab.index"]), (Layout.BUCKET, ["bucket-00000000", "bucket-12345678", "bucket.index"])],
)
def test_leftovers_of_other_layouts_are_cleared(tmp_path: Path, layout: Layout, names: list[str]) -> None:
    """Of a slab and of buckets the files go by their exact names; what only looks like them stays, and so do links."""
    cache = tmp_path / "cache"
    held = claim(cache, "dead-1", cache_format=dataclasses.replace(FORMAT, layout=layout, levels=()))
    for name in names:
        (held.objects / name).write_bytes(bytes(4096))
    mine = ["slab.bak", "slabs", "xslab", "bucket-1", "bucket-123456789", "bucket-0000000a", "bucket.index~", "0" * 32]
    for name in mine:
        (held.objects / name).write_text("mine", encoding="ascii")
    outside = tmp_path / "outside"
    outside.write_text("mine", encoding="ascii")
    mine.append("slab" if layout is Layout.BUCKET else "bucket-00000001")  # the other layout's name
    (held.objects / mine[-1]).write_text("mine", encoding="ascii")
    if layout is Layout.BUCKET:
        (held.objects / "bucket-00000002").symlink_to(outside)
    held.release()
    assert leftover_bytes(cache) == 4096 * len(names)
    assert clear_leftovers(cache, "dead-1") == Removed(run_id="dead-1", files=0, bytes=0), "the lock is gone"
    second = claim(cache, "run-2")
    assert second.cleared == Removed(run_id="dead-1", files=len(names), bytes=4096 * len(names))
    second.release()
    assert outside.exists()
    stayed = {f"dead-1/{name}" for name in mine}
    assert set(content(cache)) == stayed | ({"dead-1/bucket-00000002"} if layout is Layout.BUCKET else set())


def test_reuse_does_not_follow_a_link(tmp_path: Path) -> None:
    """Where the directory of kept objects was replaced by a link there is nothing to reuse, and nothing is deleted."""
    cache = tmp_path / "cache"
    held = claim(cache, "run-1", keep=True)
    fill(held.objects, 3)
    held.release()
    (cache / "run-1").rename(tmp_path / "moved")
    (cache / "run-1").symlink_to(tmp_path / "moved", target_is_directory=True)
    before = content(tmp_path / "moved")
    held = claim(cache, "run-2", reuse=True)
    assert not held.reused
    assert held.objects == cache / "run-2"
    held.release()
    assert content(tmp_path / "moved") == before
    assert len(before) == 3


def test_leftover_bytes_are_what_a_claim_would_clear(tmp_path: Path) -> None:
    """Only what a claim would clear or use is counted: nothing where none is, where it is held, or was to be kept."""
    cache = tmp_path / "cache"
    assert leftover_bytes(cache) == 0
    assert leftover_bytes(tmp_path) == 0
    with holder(cache, "dead-1", objects=9):
        assert leftover_bytes(cache) == 0
        assert leftover_bytes(cache, reuse=True) == 0
    before = tree(tmp_path)
    assert leftover_bytes(cache) == leftover_bytes(cache, reuse=True) == 9 * OBJECT_BYTES
    assert tree(tmp_path) == before
    held = claim(cache, "run-2", keep=True)
    fill(held.objects, 4)
    held.release()
    assert leftover_bytes(cache) == 0
    assert leftover_bytes(cache, reuse=True) == 4 * OBJECT_BYTES
    (cache / MARKER_NAME).write_text("mine", encoding="ascii")
    assert leftover_bytes(cache) == 0


def test_leftover_bytes_are_those_on_storage(tmp_path: Path) -> None:
    """A file that is preallocated, or has holes, counts with what it takes of the file system."""
    held = claim(tmp_path / "cache", "run-1", cache_format=dataclasses.replace(FORMAT, layout=Layout.SLAB, levels=()))
    with (held.objects / "slab").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        file.truncate(1 << 30)
    (held.objects / "slab.index").touch()
    held.release()
    assert leftover_bytes(tmp_path / "cache") == (held.objects / "slab").stat().st_blocks * 512
    assert 1 << 20 <= leftover_bytes(tmp_path / "cache") < 2 << 20


def test_claim_that_fails_leaves_what_was_kept_as_it_was(tmp_path: Path) -> None:
    """A refused claim changes no marker: the next one with the right parameters finds everything."""
    cache = tmp_path / "cache"
    kill_one(cache, "dead-1", objects=4, how="keep")
    (cache / LOCK_NAME).unlink()
    before = content(tmp_path)
    with pytest.raises(ConfigurationError):
        claim(cache, "run-2")
    with pytest.raises(ConfigurationError):
        claim(cache, "run-3", cache_format=dataclasses.replace(FORMAT, block_tokens=32), reuse=True)
    assert content(tmp_path) == before
    held = claim(cache, "run-4", reuse=True)
    assert held.reused
    assert held.remove_objects().files == 4
    held.release()
    assert tree(tmp_path) == []


@pytest.mark.parametrize("keep", [False, True])
def test_run_refused_after_its_claim_leaves_kept_objects_kept(tmp_path: Path, *, keep: bool) -> None:
    """A claim by reuse that is given back before the run begins leaves all, the marker too, as it found it."""
    cache = tmp_path / "cache"
    held = claim(cache, "run-1", keep=True)
    fill(held.objects, 4)
    held.release()
    before = content(cache)
    held = claim(cache, "run-2", keep=keep, reuse=True, begins=False)
    assert held.reused
    held.release()
    held.release()
    assert content(cache) == before
    with pytest.raises(ConfigurationError, match="run-1 was to keep"):
        claim(cache, "run-3")
    assert content(cache) == before


@pytest.mark.parametrize("keep", ["", "keep"])
def test_run_killed_after_its_claim_leaves_kept_objects_kept(tmp_path: Path, keep: str) -> None:
    """A run that is killed between its claim by reuse and its beginning takes nothing from a kept cache."""
    cache = tmp_path / "cache"
    held = claim(cache, "run-1", keep=True)
    fill(held.objects, 4)
    held.release()
    before = content(cache / "run-1")
    kill_one(cache, "dead-2", objects=0, how=f"reuse claimed {keep}")
    assert leftover_bytes(cache) == 0
    assert clear_leftovers(cache, "dead-2") == Removed(run_id="dead-2", files=0, bytes=0)
    with pytest.raises(ConfigurationError, match="dead-2 was to keep"):
        claim(cache, "run-3")
    assert content(cache / "run-1") == before
    kill_one(cache, "dead-4", objects=0, how="reuse")
    assert clear_leftovers(cache, "dead-4") == Removed(run_id="dead-4", files=4, bytes=4 * OBJECT_BYTES)
    assert tree(tmp_path) == []


def test_refused_run_keeps_nothing(tmp_path: Path) -> None:
    """Until it begins a run keeps neither what it made itself nor what an earlier run was not to keep."""
    cache = tmp_path / "cache"
    held = claim(cache, "run-1", keep=True, begins=False)
    fill(held.objects, 2)
    held.release()
    held = claim(cache, "run-2", keep=True, reuse=True, begins=False)
    assert held.reused
    held.release()
    held = claim(cache, "run-3")
    assert held.cleared == Removed(run_id="run-1", files=2, bytes=2 * OBJECT_BYTES)
    held.release()
    assert tree(tmp_path) == []
    kill_one(cache, "dead-4", objects=3, how="keep claimed")
    assert clear_leftovers(cache, "dead-4") == Removed(run_id="dead-4", files=3, bytes=3 * OBJECT_BYTES)
    with pytest.raises(ValueError, match="given back"):
        held.run_begins()


def test_refused_run_hands_on_the_directories_that_were_created(tmp_path: Path) -> None:
    """After a refused reuse the directories that the earlier run had created still go with the last objects."""
    cache = tmp_path / "a" / "cache"
    kill_one(cache, "dead-1", objects=2)
    claim(cache, "run-2", reuse=True, begins=False).release()
    held = claim(cache, "run-3")
    assert held.cleared == Removed(run_id="dead-1", files=2, bytes=2 * OBJECT_BYTES)
    held.release()
    assert tree(tmp_path) == []
