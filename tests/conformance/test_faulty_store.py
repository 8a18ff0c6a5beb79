"""The store that fails on purpose is a verified fake, and the suite has teeth.

Without faults the wrapper passes the suite like the store below it. With each fault exactly those tests of the suite
fail that ask for what the fault takes away, and every other one passes.
"""

import errno
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.base import BlockStore, ShortObjectError, aligned_memory
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.conformance import BlockStoreSuite
from mlpstorage.testing.faults import Fault, FaultKind, FaultyStore, Gate, StoreCall
from mlpstorage.testing.memory_store import MemoryStore
from mlpstorage.testing.suite_hooks import WAIT_S

LARGEST_BYTES = 1 << 21


class TestFaultyStoreWithoutFaults(BlockStoreSuite):
    """The wrapper changes nothing."""

    largest_bytes = LARGEST_BYTES

    def make_store(self, place: Path, keys: ObjectKeys, object_bytes: int, objects: int) -> BlockStore:
        """See `StoreHooks.make_store`."""
        del objects
        return FaultyStore(FileStore(place, keys, object_bytes))


SUITE = """
import threading
from mlpstorage.storage.file_store import FileStore
from mlpstorage.testing.conformance import BlockStoreSuite
from mlpstorage.testing.faults import Fault, FaultKind, FaultyStore, Gate, StoreCall

def opened_late():
    gate = Gate()
    def work():
        gate.wait_arrived(1, 600)
        gate.open()
    threading.Thread(target=work, daemon=True).start()
    return gate

class TestFaulty(BlockStoreSuite):
    largest_bytes = {largest_bytes}

    def make_store(self, place, keys, object_bytes, objects):
        fault = Fault(call=StoreCall.{call}, kind=FaultKind.{kind}{more})
        return FaultyStore(FileStore(place, keys, object_bytes), [fault])
"""

REPORTER = """
import pathlib

OUTCOMES = pathlib.Path(__file__).with_name("outcomes")

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        with OUTCOMES.open("a", encoding="utf-8") as file:
            print(report.location[2].rpartition(".")[2].partition("[")[0], report.outcome, file=file)
"""

ALL = {name for name in dir(BlockStoreSuite) if name.startswith("test_")}

DO_NOT_APPLY = {
    # The wrapper has no descriptors.
    "test_descriptors_flag",
    "test_direct_flag",
    "test_killed_in_the_middle_of_a_write",
    "test_killed_while_it_replaces_an_object",
    "test_reader_keeps_a_deleted_object",
    "test_unfinished_write",
    "test_write_that_fails_half_way",
    # A file system has no fixed number of places.
    "test_fixed_room",
    "test_full_store_beside_threads",
}

WRITE_NOTHING = {"test_empty_place"}
READ_NOTHING = {
    "test_capacity",
    "test_data_is_where_it_belongs",
    "test_exists",
    "test_foreign_things_are_left_alone",
    "test_listing_of_an_open_store",
}
DO_NOT_READ_BACK = READ_NOTHING | {"test_empty_place", "test_what_is_told_of_a_transfer"}
"""Tests that hold whatever a read gives; those of `READ_NOTHING` would not even notice that it fails."""

ASK_WHETHER_GONE = {
    "test_batches_through_an_engine",
    "test_delete",
    "test_deleted_by_another_process",
    "test_empty_place",
    "test_listing_leaves_out_what_is_truncated",
    "test_listing_leaves_out_what_lost_its_stamps",
    "test_object_ids",
    "test_other_namespace_finds_nothing",
    "test_reader_during_delete",
    "test_reopened",
    "test_shared_between_processes",
    "test_shared_between_stores",
    "test_two_namespaces",
}
"""Tests that ask in every way, `exists`, `read` and `delete`, whether an object is not there."""

DELETE_AND_NO_MORE = {
    "test_capacity",
    "test_foreign_things_are_left_alone",
    "test_readers_beside_writers",
    "test_room_after_reopening",
    "test_what_is_told_of_a_transfer",
}
"""Tests that delete, and do not look whether it came to pass."""

DELETE_AND_LOOK = {
    "test_delete_gives_room_back",
    "test_listing_of_an_open_store",
    "test_missing_object",
    "test_threads_with_objects_of_their_own",
}

REPLACE_AND_READ = {
    "test_killed_while_it_writes",
    "test_overwrite",
    "test_reader_during_overwrite",
    "test_reopened",
    "test_threads_with_objects_of_their_own",
    "test_writers_of_one_object",
}
"""Tests that replace an object and read it through the same store. Those through an engine are right with any version
of the right object: that one differs from another is known to nobody but the suite."""

READ_ONE_OF_SEVERAL = {
    "test_batches_through_an_engine",
    "test_delete",
    "test_delete_gives_room_back",
    "test_deleted_by_another_process",
    "test_killed_while_it_writes",
    "test_listing_leaves_out_what_is_truncated",
    "test_listing_leaves_out_what_lost_its_stamps",
    "test_object_ids",
    "test_overwrite",
    "test_page_cache",
    "test_processes_share_their_objects",
    "test_readers_beside_writers",
    "test_reopened",
    "test_room_after_reopening",
    "test_shared_between_stores",
    "test_size",
    "test_sync",
    "test_threads_with_objects_of_their_own",
    "test_truncated_object",
    "test_two_namespaces",
}
"""Tests that read an object of which the same store has written another one too."""

LIST = {
    "test_delete",
    "test_deleted_by_another_process",
    "test_empty_place",
    "test_foreign_things_are_left_alone",
    "test_killed_while_it_writes",
    "test_listing_leaves_out_what_is_truncated",
    "test_listing_leaves_out_what_lost_its_stamps",
    "test_listing_of_an_open_store",
    "test_other_namespace_finds_nothing",
    "test_overwrite",
    "test_reopened",
    "test_room_after_reopening",
    "test_shared_between_stores",
    "test_threads_with_objects_of_their_own",
    "test_two_namespaces",
    "test_writers_of_one_object",
    "test_written_by_two_processes_at_once",
}

SYNC = {"test_batches_through_an_engine", "test_data_is_where_it_belongs", "test_page_cache", "test_sync"}

CASES = {
    ("READ", "EIO"): ALL - READ_NOTHING,
    ("READ", "SHORT_READ"): ALL - READ_NOTHING - {"test_empty_place"},
    ("READ", "PARTIAL_READ"): ALL - DO_NOT_READ_BACK,
    ("READ", "FLIPPED_BYTE"): ALL - DO_NOT_READ_BACK,
    ("READ", "STALE_READ"): REPLACE_AND_READ,
    ("READ", "SWAPPED_OBJECT"): READ_ONE_OF_SEVERAL,
    ("WRITE", "EIO"): ALL - WRITE_NOTHING,
    ("WRITE", "ENOSPC"): ALL - WRITE_NOTHING,
    ("WRITE", "LOST"): ALL - WRITE_NOTHING,
    # A listing looks at first and last pages: it leaves out what is torn, and does not see one byte that is wrong.
    ("WRITE", "TORN_WRITE"): ALL - DO_NOT_READ_BACK
    | {"test_data_is_where_it_belongs", "test_foreign_things_are_left_alone", "test_listing_of_an_open_store"},
    ("WRITE", "FLIPPED_BYTE"): ALL - DO_NOT_READ_BACK | {"test_data_is_where_it_belongs"},
    ("DELETE", "EIO"): ASK_WHETHER_GONE | DELETE_AND_NO_MORE | DELETE_AND_LOOK,
    ("DELETE", "LOST"): ASK_WHETHER_GONE | DELETE_AND_LOOK,
    ("SYNC", "EIO"): SYNC,
    # Whether something is on stable storage shows only when the power fails.
    ("SYNC", "LOST"): set(),
    ("EXISTS", "EIO"): ASK_WHETHER_GONE
    | {
        "test_delete_gives_room_back",
        "test_exists",
        "test_processes_share_their_objects",
        "test_threads_with_objects_of_their_own",
    },
    ("LISTING", "EIO"): LIST,
}


def run_suite(directory: Path, call: str, kind: str, more: str = "", timeout_s: int = 120) -> dict[str, set[str]]:
    """Names of the suite's tests by outcome (passed, failed, skipped), of a store with a fault."""
    file = directory / "test_faulty.py"
    file.write_text(SUITE.format(largest_bytes=LARGEST_BYTES, call=call, kind=kind, more=more), encoding="utf-8")
    directory.joinpath("conftest.py").write_text(REPORTER, encoding="utf-8")
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={timeout_s}", "--tb=line"]
    argv += [f"--rootdir={directory}", f"--basetemp={directory / 'tmp'}", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    outcomes: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for line in directory.joinpath("outcomes").read_text(encoding="utf-8").splitlines():
        name, outcome = line.split()
        outcomes[outcome].add(name)
    assert outcomes["passed"] | outcomes["failed"] | outcomes["skipped"] == ALL
    assert outcomes["skipped"] - outcomes["passed"] - outcomes["failed"] == DO_NOT_APPLY
    return outcomes


@pytest.mark.parametrize(("call", "kind"), CASES, ids=map("-".join, CASES))
def test_fault_makes_the_expected_tests_fail(tmp_path: Path, call: str, kind: str) -> None:
    """With a fault in each call of a kind, the tests that depend on it fail, and no others."""
    outcomes = run_suite(tmp_path, call, kind)
    expected = CASES[call, kind] - DO_NOT_APPLY
    assert sorted(outcomes["failed"]) == sorted(expected)
    assert outcomes["passed"] - outcomes["failed"] == ALL - DO_NOT_APPLY - expected


def test_latency_makes_no_test_fail(tmp_path: Path) -> None:
    """Calls that wait for a while are right all the same."""
    outcomes = run_suite(tmp_path, "WRITE", "WAIT", ", gate=opened_late()")
    assert outcomes["failed"] == set()
    assert outcomes["passed"] == ALL - DO_NOT_APPLY


def test_hang_is_ended_by_the_time_limit(tmp_path: Path) -> None:
    """A call that never returns fails the test that waits for it, by pytest's time limit, and no other."""
    outcomes = run_suite(tmp_path, "SYNC", "WAIT", ", object_id=1, nth=2, gate=Gate()", timeout_s=30)
    assert outcomes["failed"] == {"test_sync"}


def test_one_call_of_one_object() -> None:
    """A fault can be that of one call, for one object: the others of both are left alone."""
    keys, fault = ObjectKeys("conformance|0|full"), Fault(call=StoreCall.READ, kind=FaultKind.EIO, object_id=2, nth=2)
    store = FaultyStore(MemoryStore(keys, PAGE_BYTES), [fault])
    memory = aligned_memory(store.stored_bytes)
    for object_id in (1, 2):
        store.write(object_id, memory)
    for object_id in (1, 2, 1):
        store.read(object_id, memory)
    assert store.injected == []
    with pytest.raises(OSError, match="injected") as caught:
        store.read(2, memory)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "object 2")
    assert store.injected == [fault]
    for object_id in (1, 2):
        store.read(object_id, memory)
    assert store.injected == [fault]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (Fault(call=StoreCall.READ, kind=FaultKind.FLIPPED_BYTE, at_bytes=5000), b"2" * 5000 + b"\xcd" + b"2" * 11383),
        (Fault(call=StoreCall.WRITE, kind=FaultKind.FLIPPED_BYTE, at_bytes=0), b"\xcd" + b"2" * 16383),
        (Fault(call=StoreCall.READ, kind=FaultKind.PARTIAL_READ), b"2" * 8192 + b"." * 8192),
        (Fault(call=StoreCall.WRITE, kind=FaultKind.TORN_WRITE), b"2" * 8192 + bytes(8192)),
        (Fault(call=StoreCall.READ, kind=FaultKind.STALE_READ), b"1" * 16384),
        (Fault(call=StoreCall.WRITE, kind=FaultKind.LOST, nth=4), b"1" * 16384),
        (Fault(call=StoreCall.READ, kind=FaultKind.SWAPPED_OBJECT), b"b" * 16384),
        (Fault(call=StoreCall.READ, kind=FaultKind.SWAPPED_OBJECT, other_id=7), b"a" * 16384),
    ],
    ids=lambda value: f"{value.call}-{value.kind}" if isinstance(value, Fault) else "",
)
def test_what_is_read(fault: Fault, found: bytes) -> None:
    """Each fault changes exactly what its description says, and the store says that it was injected."""
    store = FaultyStore(MemoryStore(ObjectKeys("conformance|0|full"), 4 * PAGE_BYTES), [fault])
    memory = aligned_memory(store.stored_bytes)
    for object_id, letter in ((7, b"a"), (1, b"1"), (8, b"b"), (1, b"2")):
        memory[:] = letter * store.stored_bytes
        store.write(object_id, memory)
    memory[:] = b"." * store.stored_bytes
    store.read(1, memory)
    assert bytes(memory) == found
    assert fault in store.injected
    store.heal()
    store.write(1, memory)
    memory[:] = bytes(store.stored_bytes)
    store.read(1, memory)
    assert bytes(memory) == found


def test_short_read_is_told() -> None:
    """A short read gives the first half of the object, and the error of one that is truncated."""
    store = FaultyStore(MemoryStore(ObjectKeys("conformance|0|full"), 4 * PAGE_BYTES))
    store.inject(Fault(call=StoreCall.READ, kind=FaultKind.SHORT_READ))
    memory = aligned_memory(store.stored_bytes)
    memory[:] = b"1" * store.stored_bytes
    store.write(1, memory)
    memory[:] = bytes(store.stored_bytes)
    with pytest.raises(ShortObjectError):
        store.read(1, memory)
    assert bytes(memory) == b"1" * 8192 + bytes(8192)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"call": StoreCall.READ, "kind": FaultKind.TORN_WRITE}, "torn-write does not occur in read"),
        ({"call": StoreCall.LISTING, "kind": FaultKind.LOST}, "lost does not occur in listing"),
        ({"call": StoreCall.READ, "kind": FaultKind.WAIT}, "wait needs a gate"),
        ({"call": StoreCall.READ, "kind": FaultKind.EIO, "gate": Gate()}, "eio has no gate"),
    ],
)
def test_impossible_faults_are_refused(fault: dict[str, Any], problem: str) -> None:
    """A fault that no call could show is an error of the test, told when it is made."""
    with pytest.raises(ValueError, match=problem):
        Fault(**fault)


def test_gate() -> None:
    """Calls wait at a gate until it is opened, are counted as they come, and pass an open one at once."""
    passed: list[int] = []
    with Gate() as gate:

        def go(number: int) -> None:
            gate.pass_through()
            passed.append(number)

        threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        gate.wait_arrived(2, WAIT_S)
        assert passed == []
        with pytest.raises(TimeoutError, match="2 calls came to the gate"):
            gate.wait_arrived(3, 0)
    for thread in threads:
        thread.join(WAIT_S)
    gate.pass_through()
    assert (sorted(passed), gate.arrived) == ([0, 1], 3)
