"""Who may use a prefix of a bucket, what a dead run's leftovers are, and what is never deleted."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mlpstorage.config import Layout
from mlpstorage.errors import AccessError, ConfigurationError, RunError
from mlpstorage.storage.claim import CacheFormat, Claim, Removed
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.object_claim import ObjectPrefix, clear_prefix
from mlpstorage.storage.object_client import connect

if TYPE_CHECKING:
    from tests.swift import RawClient, S3Server

FORMAT = CacheFormat(layout=Layout.OBJECT, namespaces=("tiny-1b|0|0",), object_bytes=4096, block_tokens=16, levels=())
NAMES = [f"{number:032x}" for number in range(4)]
"""What objects are called; any 32 hex digits."""

_HOLDER = """
import sys
from mlpstorage.config import Layout
from mlpstorage.storage.claim import CacheFormat
from mlpstorage.storage.location import parse_location
from mlpstorage.storage.object_claim import ObjectPrefix

where, run_id, keep, reuse, begins = sys.argv[1:]
cache_format = CacheFormat(
    layout=Layout.OBJECT, namespaces=("tiny-1b|0|0",), object_bytes=4096, block_tokens=16, levels=()
)
claim = ObjectPrefix.claim(
    parse_location(where), run_id, format=cache_format, keep=keep == "keep", reuse=reuse == "reuse"
)
if begins == "begins":
    claim.run_begins()
print(claim.objects, flush=True)
sys.stdin.read()
"""

Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def raw(s3_server: "S3Server") -> "RawClient":
    """A client that shares no code with the claim."""
    return s3_server.raw


@pytest.fixture
def place(s3_bucket: str) -> S3Location:
    """A prefix of a new bucket."""
    return S3Location(s3_bucket, "kv")


@pytest.fixture
def hold(place: S3Location) -> Iterator[Hold]:
    """Starts processes that claim the place and hold it."""
    started: list[subprocess.Popen[str]] = []

    def hold_one(run_id: str, keep: str = "-", reuse: str = "-", begins: str = "begins") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HOLDER, str(place), run_id, keep, reuse, begins]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline().startswith(str(place))
        return process

    yield hold_one
    for process in started:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    """End a process as a crash does, and wait until it is gone."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def put_objects(raw: "RawClient", objects: S3Location, size_bytes: int = 100) -> None:
    """Put some objects where a store would."""
    for name in NAMES:
        raw.put(objects.bucket, f"{objects.prefix}/{name}", bytes(size_bytes))


def marker_of(raw: "RawClient", place: S3Location) -> dict[str, object]:
    """The marker, as it is in the bucket."""
    document: dict[str, object] = json.loads(raw.get(place.bucket, f"{place.prefix}/.mlpstorage.json"))
    return document


def change_marker(raw: "RawClient", place: S3Location, changes: Mapping[str, object]) -> None:
    """Have the marker say something else."""
    document = {**marker_of(raw, place), **changes}
    raw.put(place.bucket, f"{place.prefix}/.mlpstorage.json", json.dumps(document).encode())


def test_a_claim_marks_the_place_and_leaves_nothing(place: S3Location, raw: "RawClient") -> None:
    """The marker says who holds the place; after the release the bucket is as it was."""
    claim = ObjectPrefix.claim(place, "run-1", format=FORMAT)
    contract: Claim = claim
    assert (contract.place, contract.cleared, contract.reused) == (str(place), None, False)
    assert claim.objects == place / "run-1"
    assert list(raw.sizes(place.bucket)) == ["kv/.mlpstorage.json"]
    marker = marker_of(raw, place)
    assert (marker["tool"], marker["run_id"], marker["objects"]) == ("mlpstorage", "run-1", "run-1")
    assert (marker["pid"], marker["host"]) == (os.getpid(), socket.gethostname())
    assert (marker["keep"], marker["released"]) == (False, False)
    put_objects(raw, claim.objects)
    assert claim.remove_objects() == Removed(run_id="run-1", files=4, bytes=400)
    claim.release()
    claim.release()
    assert raw.sizes(place.bucket) == {}
    with pytest.raises(ValueError, match="given back"):
        claim.remove_objects()


def test_the_whole_bucket_can_be_claimed(s3_bucket: str, raw: "RawClient") -> None:
    """Without a prefix the marker lies at the top of the bucket."""
    claim = ObjectPrefix.claim(S3Location(s3_bucket, ""), "run-1", format=FORMAT)
    assert list(raw.sizes(s3_bucket)) == [".mlpstorage.json"]
    claim.release()
    assert raw.sizes(s3_bucket) == {}


def test_a_second_run_is_refused(place: S3Location, raw: "RawClient", hold: Hold) -> None:
    """While the first run's process lives nobody else gets the place, whatever they ask for."""
    process = hold("run-1")
    put_objects(raw, place / "run-1")
    before = raw.sizes(place.bucket)
    for reuse in (False, True):
        with pytest.raises(ConfigurationError, match=f"in use by run run-1 .process {process.pid} on "):
            ObjectPrefix.claim(place, "run-2", format=FORMAT, reuse=reuse)
    assert clear_prefix(place, "run-1") is None
    assert raw.sizes(place.bucket) == before


def test_places_beside_each_other_do_not_meet(place: S3Location) -> None:
    """Two runs hold two prefixes of a bucket, one of which begins as the other's name does."""
    first = ObjectPrefix.claim(place, "run-1", format=FORMAT)
    second = ObjectPrefix.claim(S3Location(place.bucket, "kv-2"), "run-1", format=FORMAT)
    second.release()
    first.release()


def test_a_killed_run_is_cleared(place: S3Location, raw: "RawClient", hold: Hold) -> None:
    """The next claim deletes what looks like an object of the dead run, tells how much, and leaves all else."""
    kill(hold("run-1"))
    put_objects(raw, place / "run-1")
    foreign = {
        f"kv/run-1/{NAMES[0]}0": 1,
        f"kv/run-1/{NAMES[0].upper().replace('0', 'A')}": 2,
        f"kv/run-1/deeper/{NAMES[0]}": 3,
        "kv/run-1/notes.txt": 4,
        f"kv/{NAMES[0]}": 5,
        f"kv/run-11/{NAMES[0]}": 6,
        f"run-1/{NAMES[0]}": 7,
    }
    for key, size_bytes in foreign.items():
        raw.put(place.bucket, key, bytes(size_bytes))
    claim = ObjectPrefix.claim(place, "run-2", format=FORMAT)
    assert (claim.cleared, claim.reused) == (Removed(run_id="run-1", files=4, bytes=400), False)
    assert claim.objects == place / "run-2"
    claim.release()
    assert raw.sizes(place.bucket) == foreign


def test_a_killed_run_can_be_reused(place: S3Location, raw: "RawClient", hold: Hold) -> None:
    """With `reuse` the dead run's objects stay where they are and become the new run's."""
    kill(hold("run-1"))
    put_objects(raw, place / "run-1")
    claim = ObjectPrefix.claim(place, "run-2", format=FORMAT, reuse=True)
    assert (claim.cleared, claim.reused, claim.objects) == (None, True, place / "run-1")
    assert claim.remove_objects() == Removed(run_id="run-2", files=4, bytes=400)
    claim.release()
    assert raw.sizes(place.bucket) == {}


def test_reuse_of_nothing_begins_afresh(place: S3Location) -> None:
    """With `reuse` an empty place is taken as without."""
    claim = ObjectPrefix.claim(place, "run-1", format=FORMAT, reuse=True)
    assert (claim.reused, claim.objects) == (False, place / "run-1")
    claim.release()


def test_kept_objects_outlive_their_run(place: S3Location, raw: "RawClient") -> None:
    """Objects that are to be kept stay after the release; only a claim that reuses them gets the place."""
    first = ObjectPrefix.claim(place, "run-1", format=FORMAT, keep=True)
    first.run_begins()
    put_objects(raw, first.objects)
    first.release()
    assert marker_of(raw, place)["released"] is True
    before = raw.sizes(place.bucket)
    with pytest.raises(ConfigurationError, match="run-1 was to keep"):
        ObjectPrefix.claim(place, "run-2", format=FORMAT)
    assert clear_prefix(place, "run-1") == Removed(run_id="run-1", files=0, bytes=0)
    assert raw.sizes(place.bucket) == before
    second = ObjectPrefix.claim(place, "run-2", format=FORMAT, keep=True, reuse=True)
    second.run_begins()
    assert (second.reused, second.objects) == (True, first.objects)
    second.release()
    third = ObjectPrefix.claim(place, "run-3", format=FORMAT, reuse=True)
    assert (third.reused, third.objects) == (True, first.objects)
    third.remove_objects()
    third.release()
    assert raw.sizes(place.bucket) == {}


def test_a_killed_run_that_was_to_keep(place: S3Location, raw: "RawClient", hold: Hold) -> None:
    """What was to be kept is kept, also when the run is killed."""
    kill(hold("run-1", "keep"))
    put_objects(raw, place / "run-1")
    with pytest.raises(ConfigurationError, match="run-1 was to keep"):
        ObjectPrefix.claim(place, "run-2", format=FORMAT)
    claim = ObjectPrefix.claim(place, "run-2", format=FORMAT, reuse=True)
    assert claim.reused
    claim.release()
    assert len(raw.sizes(place.bucket)) == 1 + len(NAMES)


def test_a_kept_cache_without_objects_bars_nobody(place: S3Location, hold: Hold) -> None:
    """A run that was to keep its objects and had none yet is cleared as any other."""
    kill(hold("run-1", "keep"))
    claim = ObjectPrefix.claim(place, "run-2", format=FORMAT)
    assert claim.cleared == Removed(run_id="run-1", files=0, bytes=0)
    claim.release()


def test_objects_of_another_format_are_not_reused(place: S3Location, raw: "RawClient") -> None:
    """Where something differs the claim is refused, the difference told, and nothing deleted."""
    first = ObjectPrefix.claim(place, "run-1", format=FORMAT, keep=True)
    first.run_begins()
    put_objects(raw, first.objects)
    first.release()
    before = raw.sizes(place.bucket)
    with pytest.raises(ConfigurationError, match="--block-tokens is 32 here and was 16 there"):
        ObjectPrefix.claim(place, "run-2", format=replace(FORMAT, block_tokens=32), reuse=True)
    assert raw.sizes(place.bucket) == before


def test_a_run_of_another_host(place: S3Location, raw: "RawClient", hold: Hold) -> None:
    """Whether a process elsewhere lives cannot be told: refused, with what to delete. Its launcher may clear it."""
    kill(hold("run-1"))
    put_objects(raw, place / "run-1")
    change_marker(raw, place, {"host": "elsewhere", "pid": 4711})
    before = raw.sizes(place.bucket)
    with pytest.raises(ConfigurationError, match="known to be dead") as refused:
        ObjectPrefix.claim(place, "run-2", format=FORMAT)
    for named in ("run-1", "4711", "elsewhere", f"{place}/run-1", f"{place}/.mlpstorage.json"):
        assert named in str(refused.value)
    assert raw.sizes(place.bucket) == before
    assert clear_prefix(place, "run-1") == Removed(run_id="run-1", files=4, bytes=400)
    assert raw.sizes(place.bucket) == {}


def test_what_another_host_gave_back(place: S3Location, raw: "RawClient") -> None:
    """A place that was given back is free for every host; what is left there is cleared."""
    first = ObjectPrefix.claim(place, "run-1", format=FORMAT)
    put_objects(raw, first.objects)
    first.release()
    change_marker(raw, place, {"host": "elsewhere"})
    second = ObjectPrefix.claim(place, "run-2", format=FORMAT)
    assert second.cleared == Removed(run_id="run-1", files=4, bytes=400)
    second.release()
    assert raw.sizes(place.bucket) == {}


def test_clearing_after_a_killed_run(place: S3Location, raw: "RawClient", hold: Hold) -> None:
    """The launcher clears the run that it started, and no other's."""
    kill(hold("run-1"))
    put_objects(raw, place / "run-1")
    before = raw.sizes(place.bucket)
    assert clear_prefix(place, "run-2") == Removed(run_id="run-2", files=0, bytes=0)
    assert raw.sizes(place.bucket) == before
    assert clear_prefix(place, "run-1") == Removed(run_id="run-1", files=4, bytes=400)
    assert raw.sizes(place.bucket) == {}
    assert clear_prefix(place, "run-1") == Removed(run_id="run-1", files=0, bytes=0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"tool": "other"}',
        b'{"tool": "mlpstorage", "run_id": "run-1"}',
        b"\xff" * 10,
        b" " * ((1 << 20) + 1),
    ],
)
def test_a_marker_that_is_not_ours(place: S3Location, raw: "RawClient", content: bytes) -> None:
    """An object of the marker's name that no run wrote bars the place, and stays."""
    raw.put(place.bucket, "kv/.mlpstorage.json", content)
    with pytest.raises(ConfigurationError, match="not a marker"):
        ObjectPrefix.claim(place, "run-1", format=FORMAT)
    assert raw.get(place.bucket, "kv/.mlpstorage.json") == content


@pytest.mark.parametrize("name", ["objects", "leftovers", "run_id"])
def test_a_marker_cannot_point_elsewhere(place: S3Location, raw: "RawClient", hold: Hold, name: str) -> None:
    """A marker whose names lead out of the prefix is none of ours."""
    kill(hold("run-1"))
    raw.put(place.bucket, f"other/{NAMES[0]}", b"1")
    change_marker(raw, place, {name: ["../other"] if name == "leftovers" else "../other"})
    with pytest.raises(ConfigurationError, match="not a marker"):
        ObjectPrefix.claim(place, "run-2", format=FORMAT)
    assert raw.sizes(place.bucket, "other") == {f"other/{NAMES[0]}": 1}


def test_something_of_the_runs_name(place: S3Location, raw: "RawClient") -> None:
    """Objects that are there already below the run's name bar the place, and the marker is not written."""
    raw.put(place.bucket, f"kv/run-1/{NAMES[0]}", b"1")
    with pytest.raises(ConfigurationError, match="kv/run-1 is there already"):
        ObjectPrefix.claim(place, "run-1", format=FORMAT)
    assert list(raw.sizes(place.bucket)) == [f"kv/run-1/{NAMES[0]}"]


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "a b"])
def test_names_of_runs(place: S3Location, run_id: str) -> None:
    """A run's name must be one that names a single level."""
    with pytest.raises(ConfigurationError, match="run id"):
        ObjectPrefix.claim(place, run_id, format=FORMAT)


@pytest.mark.parametrize("left", ["nothing", "a dead run"])
def test_of_runs_at_the_same_moment_one_wins(place: S3Location, raw: "RawClient", hold: Hold, left: str) -> None:
    """Six claims at once: one gets the place, the others are told so, on an empty place and on a dead run's."""
    if left == "a dead run":
        kill(hold("run-0"))
        put_objects(raw, place / "run-0")
    start = threading.Barrier(6)

    def claim(number: int) -> ObjectPrefix | ConfigurationError:
        start.wait()
        try:
            return ObjectPrefix.claim(place, f"run-{number}", format=FORMAT)
        except ConfigurationError as error:
            return error

    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(claim, range(1, 7)))
    winners = [result for result in results if isinstance(result, ObjectPrefix)]
    assert len(winners) == 1
    assert all(
        "taken at the same moment" in str(one) or "in use by" in str(one) for one in results if one not in winners
    )
    assert marker_of(raw, place)["run_id"] == winners[0].objects.prefix.removeprefix("kv/")
    winners[0].release()
    assert raw.sizes(place.bucket) == {}


def test_a_claim_that_dies_while_it_clears(
    place: S3Location, raw: "RawClient", hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be cleared is remembered, and cleared by the next claim."""
    kill(hold("run-1"))
    put_objects(raw, place / "run-1")

    def fail(*_arguments: object) -> None:
        raise OSError(5, "delete failed")

    with monkeypatch.context() as broken:
        broken.setattr("mlpstorage.storage.object_client.ObjectClient.delete_all", fail)
        with pytest.raises(ConfigurationError, match="delete failed"):
            ObjectPrefix.claim(place, "run-2", format=FORMAT)
    assert len(raw.sizes(place.bucket)) == 1 + len(NAMES)
    claim = ObjectPrefix.claim(place, "run-3", format=FORMAT)
    assert claim.cleared == Removed(run_id="run-2", files=4, bytes=400)
    claim.release()
    assert raw.sizes(place.bucket) == {}


def test_a_marker_that_became_anothers_stays(place: S3Location, raw: "RawClient") -> None:
    """Where someone deleted the marker and another run claimed the place, the first run's release leaves it."""
    first = ObjectPrefix.claim(place, "run-1", format=FORMAT)
    raw.delete(place.bucket, "kv/.mlpstorage.json")
    second = ObjectPrefix.claim(place, "run-2", format=FORMAT)
    with pytest.raises(ConfigurationError, match="meanwhile taken from this run by run run-2"):
        first.run_begins()
    first.release()
    assert marker_of(raw, place)["run_id"] == "run-2"
    second.release()
    assert raw.sizes(place.bucket) == {}


def test_wrong_credentials(place: S3Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal of the server is an access error."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-s3cr3t")
    with pytest.raises(AccessError, match="AWS_SECRET_ACCESS_KEY"):
        ObjectPrefix.claim(place, "run-1", format=FORMAT)


def test_no_such_bucket(place: S3Location) -> None:
    """A bucket that is not there is named."""
    with pytest.raises(ConfigurationError, match=f"s3://{place.bucket}-not/kv: .*there is no such bucket"):
        ObjectPrefix.claim(S3Location(f"{place.bucket}-not", "kv"), "run-1", format=FORMAT)


def test_no_server(s3_server: "S3Server", place: S3Location) -> None:
    """A server that is not there is told soon."""
    with s3_server.stopped(), pytest.raises(ConfigurationError, match=r"2 tries in .*: Connection refused"):
        ObjectPrefix.claim(place, "run-1", format=FORMAT)


def test_a_server_that_is_gone_at_the_end(
    s3_server: "S3Server", place: S3Location, raw: "RawClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be removed because the server went away fails the run, and is still there when it is back."""
    monkeypatch.setattr("mlpstorage.storage.object_claim.connect", partial(connect, limit_s=1.0))
    claim = ObjectPrefix.claim(place, "run-1", format=FORMAT)
    put_objects(raw, claim.objects)
    with s3_server.stopped():
        with pytest.raises(RunError, match="list failed after"):
            claim.remove_objects()
        with pytest.raises(RunError, match="get failed after 2 tries"):
            claim.release()
        with pytest.raises(RunError, match="get failed after 2 tries"):
            clear_prefix(place, "run-1")
    assert len(raw.sizes(place.bucket)) == 1 + len(NAMES)


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_refused_after_its_claim_leaves_kept_objects_kept(
    place: S3Location, raw: "RawClient", *, keep: bool
) -> None:
    """A claim by reuse that is given back before the run begins leaves objects and marker as it found them."""
    first = ObjectPrefix.claim(place, "run-1", format=FORMAT, keep=True)
    first.run_begins()
    put_objects(raw, first.objects)
    first.release()
    before, marker = raw.sizes(place.bucket), marker_of(raw, place)
    second = ObjectPrefix.claim(place, "run-2", format=FORMAT, keep=keep, reuse=True)
    assert second.reused
    second.release()
    assert (raw.sizes(place.bucket), marker_of(raw, place)) == (before, marker)
    with pytest.raises(ConfigurationError, match="run-1 was to keep"):
        ObjectPrefix.claim(place, "run-3", format=FORMAT)
    assert raw.sizes(place.bucket) == before


def test_a_run_killed_after_its_claim_leaves_kept_objects_kept(place: S3Location, raw: "RawClient", hold: Hold) -> None:
    """A run that is killed between its claim by reuse and its beginning takes nothing; one that began is cleared."""
    kill(hold("run-1", "keep"))
    put_objects(raw, place / "run-1")
    kill(hold("run-2", "-", "reuse", "-"))
    assert clear_prefix(place, "run-2") == Removed(run_id="run-2", files=0, bytes=0)
    with pytest.raises(ConfigurationError, match="run-2 was to keep"):
        ObjectPrefix.claim(place, "run-3", format=FORMAT)
    assert len(raw.sizes(place.bucket)) == 1 + len(NAMES)
    kill(hold("run-4", "-", "reuse"))
    assert clear_prefix(place, "run-4") == Removed(run_id="run-4", files=4, bytes=400)
    assert raw.sizes(place.bucket) == {}


def test_a_refused_run_keeps_nothing(place: S3Location, raw: "RawClient") -> None:
    """Until it begins a run keeps neither what it made itself nor what an earlier run was not to keep."""
    first = ObjectPrefix.claim(place, "run-1", format=FORMAT, keep=True)
    put_objects(raw, first.objects)
    first.release()
    ObjectPrefix.claim(place, "run-2", format=FORMAT, keep=True, reuse=True).release()
    third = ObjectPrefix.claim(place, "run-3", format=FORMAT)
    assert third.cleared == Removed(run_id="run-1", files=4, bytes=400)
    third.release()
    assert raw.sizes(place.bucket) == {}
    with pytest.raises(ValueError, match="given back"):
        third.run_begins()
