"""The conformance suite of I/O engines: what `storage.ops.IoEngine` promises, as tests that an author subclasses.

    class TestMyEngine(IoEngineSuite):
        def make_rig(self, directory, depth):
            store = FaultyStore(FileStore(directory / "objects", KEYS, STORED_BYTES))
            payload = Payload(KEYS, STORED_BYTES)
            return StoreRig(store, lambda: MyEngine(store, payload, depth), verified_bytes=STORED_BYTES)

A rig is an engine with what a test needs to have in hand (see `testing.io_rig`). `StoreRig` is for engines that move
bytes by the store's `read` and `write`; for others (the modelled engine of `testing.virtual`, or one that takes
descriptors) the author writes one. Nothing sleeps, and nothing is said of how long anything takes. Needs pytest, which
is no dependency of the package; its explanations of what failed need `pytest.register_assert_rewrite` of this module
and of `testing.io_rig` in a conftest.py.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from mlpstorage.storage.ops import Lane, Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.testing.io_rig import WAIT_S, Batch, EngineRig

DEPTH = 4
"""Operations under way at once in most tests."""

STORED_BYTES = 8192
"""Suggested size of objects on storage; small, as their number matters here."""

MakeRig = Callable[..., EngineRig]


class IoEngineSuite:
    """All tests of an I/O engine.

    Attributes:
        both_lanes: Whether neither lane waits for the end of the other; False for an engine of strict priority.
    """

    both_lanes: ClassVar[bool] = True

    def make_rig(self, directory: Path, depth: int) -> EngineRig:
        """A rig over an empty store, with an engine that has up to `depth` operations under way.

        Args:
            directory: A directory of its own, which exists.
            depth: Operations under way at once, at most.
        """
        raise NotImplementedError

    @pytest.fixture
    def new_rig(self, tmp_path: Path) -> Iterator[MakeRig]:
        """Makes rigs, which are closed when the test ends."""
        rigs: list[EngineRig] = []

        def make(depth: int = DEPTH) -> EngineRig:
            directory = tmp_path / str(len(rigs))
            directory.mkdir()
            rigs.append(self.make_rig(directory, depth))
            return rigs[-1]

        yield make
        for rig in rigs:
            rig.close()

    @pytest.fixture
    def rig(self, new_rig: MakeRig) -> EngineRig:
        """A rig of the usual depth."""
        return new_rig()

    @pytest.mark.parametrize("depth", [1, 2, 8])
    def test_batches(self, new_rig: MakeRig, depth: int) -> None:
        """What a batch writes the next one reads and the third deletes; each is reported once, in its chains' order."""
        rig, ids = new_rig(depth), range(20)
        for kind, lane in ((OpKind.WRITE, Lane.STORE), (OpKind.READ, Lane.LOAD), (OpKind.DELETE, Lane.STORE)):
            batch = rig.submit(each(kind, ids), lane)
            done = rig.result(batch)
            assert [one.op for one in done] == [Op(kind, object_id) for object_id in ids]
            assert [one.error for one in done] == [None] * len(ids)
            assert {one.verified_bytes for one in done} == {rig.verified_bytes if kind is OpKind.READ else 0}
            assert {one.retries for one in done} == {0}
            if kind is not OpKind.DELETE:
                assert {one.direct for one in done} == {rig.moves_directly}
            assert len(batch.reports) == 1
        gone = rig.result(rig.submit(each(OpKind.READ, ids), Lane.LOAD))
        assert all(rig.is_missing(one.error) for one in gone)

    def test_empty_batch(self, rig: EngineRig) -> None:
        """A batch without chains, and chains without operations, are reported like any other."""
        assert rig.result(rig.submit([], Lane.LOAD)) == []
        assert rig.result(rig.submit([(), ()], Lane.STORE)) == []
        mixed = rig.result(rig.submit([(), (Op(OpKind.WRITE, 1),), ()], Lane.STORE))
        assert [(one.op, one.error) for one in mixed] == [(Op(OpKind.WRITE, 1), None)]

    def test_chain_is_done_in_order(self, rig: EngineRig) -> None:
        """Each operation of a chain begins when the one before it has ended, and finds what that left."""
        kinds = (OpKind.WRITE, OpKind.SYNC, OpKind.READ, OpKind.DELETE, OpKind.WRITE, OpKind.READ)
        chains = [[Op(kind, object_id) for kind in kinds] for object_id in range(2 * DEPTH)]
        done = rig.result(rig.submit(chains, Lane.STORE))
        assert [one.error for one in done] == [None] * len(done)
        for first in range(0, len(done), len(kinds)):
            chain = done[first : first + len(kinds)]
            assert [one.op.kind for one in chain] == list(kinds)
            assert all(one.end_ns <= later.start_ns for one, later in itertools.pairwise(chain))

    def test_times(self, rig: EngineRig) -> None:
        """Operations are queued, begin and end in this order, between the batch's submission and its report."""
        before_ns = rig.now_ns()
        batch = rig.submit(each(OpKind.WRITE, range(3 * DEPTH)), Lane.STORE)
        submitted_ns = rig.now_ns()
        done = rig.result(batch)
        after_ns = rig.now_ns()
        assert len({one.queued_ns for one in done}) == 1
        assert before_ns <= done[0].queued_ns <= submitted_ns
        for one in done:
            assert one.queued_ns <= one.start_ns <= one.end_ns <= after_ns
            assert one.payload_ns >= 0

    def test_failure_ends_its_chain_alone(self, rig: EngineRig) -> None:
        """What follows a failed operation in its chain is skipped, and has no effect; other chains are done."""
        rig.result(rig.submit(each(OpKind.WRITE, [1, 2]), Lane.STORE))
        rig.fail(OpKind.READ, 1)
        chains = [
            (Op(OpKind.READ, 1), Op(OpKind.DELETE, 1), Op(OpKind.WRITE, 5)),
            (Op(OpKind.READ, 2), Op(OpKind.DELETE, 2), Op(OpKind.WRITE, 6)),
            (Op(OpKind.DELETE, 99), Op(OpKind.WRITE, 7)),
        ]
        done = rig.result(rig.submit(chains, Lane.LOAD))
        assert [one.op for one in done] == [op for chain in chains for op in chain]
        assert rig.is_failure(done[0].error)
        assert rig.is_missing(done[6].error)
        skipped = [isinstance(one.error, OperationSkippedError) for one in done]
        assert skipped == [False, True, True, False, False, False, False, True]
        assert [one.error for one in done[3:6]] == [None] * 3
        assert {one.verified_bytes for one in done} <= {0, rig.verified_bytes}
        assert [one.verified_bytes for one in (done[0], done[1], done[6])] == [0, 0, 0]
        rig.release()
        read = rig.result(rig.submit(each(OpKind.READ, [1, 2, 5, 6, 7]), Lane.LOAD))
        assert [rig.is_missing(one.error) for one in read] == [False, True, True, False, True]
        assert [one.error for one in read if not rig.is_missing(one.error)] == [None, None]

    @pytest.mark.parametrize("kind", [OpKind.READ, OpKind.WRITE, OpKind.DELETE, OpKind.SYNC])
    def test_failure_is_told_of_the_operation(self, rig: EngineRig, kind: OpKind) -> None:
        """Of many operations the one that fails is told with its error; the engine goes on as before."""
        ids, bad = range(2 * DEPTH), 3
        if kind is not OpKind.WRITE:
            rig.result(rig.submit(each(OpKind.WRITE, ids), Lane.STORE))
        rig.fail(kind, bad)
        done = rig.result(rig.submit(each(kind, ids), Lane.STORE))
        assert [rig.is_failure(one.error) for one in done] == [object_id == bad for object_id in ids]
        assert [one.error for one in done if one.op.object_id != bad] == [None] * (len(ids) - 1)
        rig.release()
        again = rig.result(rig.submit([(Op(kind, bad),)], Lane.STORE))
        assert again[0].error is None

    @pytest.mark.parametrize("depth", [1, 3])
    def test_depth_is_kept(self, new_rig: MakeRig, depth: int) -> None:
        """As many operations are under way as the depth says, and the rest waits and is counted."""
        rig, ids = new_rig(depth), range(4 * depth)
        rig.result(rig.submit(each(OpKind.WRITE, ids), Lane.STORE))
        rig.hold(OpKind.READ)
        batch = rig.submit(each(OpKind.READ, ids), Lane.LOAD)
        rig.wait_held(depth)
        assert (rig.engine.queued_ops(Lane.LOAD), rig.engine.queued_ops(Lane.STORE)) == (3 * depth, 0)
        assert not batch.is_done
        rig.release()
        done = rig.result(batch)
        assert [one.error for one in done] == [None] * len(ids)
        assert rig.engine.queued_ops(Lane.LOAD) == 0
        assert most_at_once(done) <= depth

    def test_queue_is_counted_by_lane(self, rig: EngineRig) -> None:
        """`queued_ops` counts the operations of chains that were not begun, each in its lane."""
        self._fill(rig)
        loads = rig.submit([(Op(OpKind.READ, 1), Op(OpKind.READ, 2))] * 3, Lane.LOAD)
        stores = rig.submit([(Op(OpKind.WRITE, 100 + number),) for number in range(5)], Lane.STORE)
        assert (rig.engine.queued_ops(Lane.LOAD), rig.engine.queued_ops(Lane.STORE)) == (6, 5)
        rig.release()
        assert [one.error for one in rig.result(loads) + rig.result(stores)] == [None] * 11
        assert (rig.engine.queued_ops(Lane.LOAD), rig.engine.queued_ops(Lane.STORE)) == (0, 0)

    def _fill(self, rig: EngineRig) -> Batch:
        """Have as many reads held as the depth allows, of objects 0 and up."""
        ids = range(DEPTH)
        written = rig.result(rig.submit(each(OpKind.WRITE, ids), Lane.STORE))
        assert [one.error for one in written] == [None] * DEPTH
        rig.hold(OpKind.READ)
        batch = rig.submit(each(OpKind.READ, ids), Lane.LOAD)
        rig.wait_held(DEPTH)
        return batch

    def test_cancelled_batch(self, rig: EngineRig) -> None:
        """A batch that was not begun is reported when it is cancelled, as skipped; others are left alone."""
        running = self._fill(rig)
        first = rig.submit([(Op(OpKind.WRITE, 50), Op(OpKind.READ, 50)), (Op(OpKind.WRITE, 51),)], Lane.STORE)
        second = rig.submit([(Op(OpKind.WRITE, 60),)], Lane.STORE)
        rig.cancel(first)
        done = rig.result(first)
        assert [one.op for one in done] == [Op(OpKind.WRITE, 50), Op(OpKind.READ, 50), Op(OpKind.WRITE, 51)]
        assert all(isinstance(one.error, OperationSkippedError) for one in done)
        assert all(one.queued_ns <= one.start_ns <= one.end_ns for one in done)
        assert not running.is_done
        assert not second.is_done
        assert rig.engine.queued_ops(Lane.STORE) == 1
        rig.release()
        assert [one.error for one in rig.result(running) + rig.result(second)] == [None] * (DEPTH + 1)
        assert [len(batch.reports) for batch in (running, first, second)] == [1, 1, 1]
        gone = rig.result(rig.submit(each(OpKind.READ, [50, 51]), Lane.LOAD))
        assert all(rig.is_missing(one.error) for one in gone)

    def test_cancelled_while_under_way(self, rig: EngineRig) -> None:
        """Of a batch that is cancelled in the middle what had begun is done, and the whole is reported once."""
        ids = range(2 * DEPTH)
        rig.result(rig.submit(each(OpKind.WRITE, ids), Lane.STORE))
        rig.hold(OpKind.READ)
        batch = rig.submit([(Op(OpKind.READ, one), Op(OpKind.DELETE, one)) for one in ids], Lane.LOAD)
        rig.wait_held(DEPTH)
        rig.cancel(batch)
        assert not batch.is_done
        assert rig.engine.queued_ops(Lane.LOAD) == 0
        rig.release()
        done = rig.result(batch)
        assert [one.op.object_id for one in done] == [one for one in ids for _ in range(2)]
        assert [one.error for one in done[: 2 * DEPTH]] == [None] * (2 * DEPTH)
        assert all(isinstance(one.error, OperationSkippedError) for one in done[2 * DEPTH :])
        rig.cancel(batch)
        assert len(batch.reports) == 1
        left = rig.result(rig.submit(each(OpKind.READ, ids), Lane.LOAD))
        assert [rig.is_missing(one.error) for one in left] == [True] * DEPTH + [False] * DEPTH

    def test_all_that_is_queued_is_cancelled(self, rig: EngineRig) -> None:
        """Giving up the queue reports all of it, of both lanes, as skipped; what runs goes on, and so does the rest."""
        running = self._fill(rig)
        loads = rig.submit(each(OpKind.READ, [1, 2]), Lane.LOAD)
        stores = rig.submit(each(OpKind.WRITE, [50, 51]), Lane.STORE)
        rig.cancel_queued()
        done = rig.result(loads) + rig.result(stores)
        assert [type(one.error) for one in done] == [OperationSkippedError] * 4
        assert not running.is_done
        assert (rig.engine.queued_ops(Lane.LOAD), rig.engine.queued_ops(Lane.STORE)) == (0, 0)
        rig.cancel_queued()
        rig.release()
        assert [one.error for one in rig.result(running)] == [None] * DEPTH
        again = rig.result(rig.submit(each(OpKind.WRITE, [50]), Lane.STORE))
        assert again[0].error is None
        assert [len(batch.reports) for batch in (running, loads, stores)] == [1, 1, 1]

    @pytest.mark.parametrize("first", list(Lane))
    def test_both_lanes_go_on(self, rig: EngineRig, first: Lane) -> None:
        """However long the queue of one lane is, the next operations to begin are of both."""
        if not self.both_lanes:
            pytest.skip("the engine takes one lane before the other")
        running, other, many = self._fill(rig), Lane(1 - first), 20 * DEPTH
        batches = [running, rig.submit(_of_lane(first, many), first), rig.submit(_of_lane(other, many), other)]
        rig.step(OpKind.READ, OpKind.WRITE)
        rig.wait_held(DEPTH)
        begun = [many - rig.engine.queued_ops(lane) for lane in Lane]
        assert sum(begun) == DEPTH
        assert min(begun) >= 1
        rig.release()
        assert [one.error for batch in batches for one in rig.result(batch)] == [None] * (DEPTH + 2 * many)

    def test_report_may_hand_over_more(self, rig: EngineRig) -> None:
        """Who is told of a batch may submit another at once."""
        second: list[Batch] = []
        first = rig.submit(
            each(OpKind.WRITE, [1]),
            Lane.STORE,
            then=lambda: second.append(rig.submit(each(OpKind.READ, [1]), Lane.LOAD)),
        )
        assert rig.result(first)[0].error is None
        assert rig.result(second[0])[0].error is None

    def test_close_while_at_work(self, rig: EngineRig) -> None:
        """Closing reports what is queued as skipped, lets what runs come to its end, and takes no more."""
        running = self._fill(rig)
        queued = rig.submit(each(OpKind.WRITE, range(50, 60)), Lane.STORE)
        wait_closed = rig.begin_close()
        skipped = rig.result(queued)
        assert [type(one.error) for one in skipped] == [OperationSkippedError] * 10
        assert not running.is_done
        rig.release()
        assert [one.error for one in rig.result(running)] == [None] * DEPTH
        wait_closed()
        rig.engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            rig.submit(each(OpKind.READ, [1]), Lane.LOAD)
        assert [len(batch.reports) for batch in (running, queued)] == [1, 1]

    def test_close_without_work(self, new_rig: MakeRig) -> None:
        """An engine that did nothing, or has done all, can be closed, and again."""
        idle, used = new_rig(), new_rig()
        used.result(used.submit(each(OpKind.WRITE, range(5)), Lane.STORE))
        for rig in (idle, used):
            rig.begin_close()()
            rig.engine.close()

    def test_copies(self, rig: EngineRig) -> None:
        """A payload that was copied into a slot comes out of it; as another object's it is an error."""
        if not rig.slots:
            pytest.skip("the rig has no DRAM arena")
        done = rig.result(rig.submit([(Op(OpKind.COPY_IN, one, slot=one),) for one in range(2)], Lane.STORE))
        assert [one.error for one in done] == [None, None]
        out = [(Op(OpKind.COPY_OUT, 0, slot=0),), (Op(OpKind.COPY_OUT, 1, slot=1),), (Op(OpKind.COPY_OUT, 0, slot=1),)]
        done = rig.result(rig.submit(out, Lane.LOAD))
        assert [one.error is None for one in done] == [True, True, False]
        assert not isinstance(done[2].error, OperationSkippedError)
        assert {(one.verified_bytes, one.direct) for one in done} == {(0, None)}

    def test_many_threads(self, rig: EngineRig) -> None:
        """Batches of several threads, some cancelled, are each reported once and in full; what was done is there."""
        if not rig.threaded:
            pytest.skip("the engine is for one thread")
        batches: list[list[Batch]] = [[] for _ in range(DEPTH)]

        def work(number: int) -> None:
            for turn in range(40):
                ids = range(1000 * number + 3 * turn, 1000 * number + 3 * turn + 3)
                batches[number].append(rig.submit(each(OpKind.WRITE, ids), Lane(turn % 2)))
                if not turn % 10:
                    rig.cancel(batches[number][-1])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(DEPTH)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        flat = [batch for of_thread in batches for batch in of_thread]
        results = [rig.result(batch) for batch in flat]
        assert len(results) == 40 * DEPTH
        assert {len(result) for result in results} == {3}
        assert {type(one.error) for result in results for one in result} <= {OperationSkippedError, type(None)}
        written = [one.op.object_id for result in results for one in result if one.error is None]
        assert len(written) >= 3 * 36 * DEPTH
        read = rig.result(rig.submit(each(OpKind.READ, written), Lane.LOAD))
        assert [one.error for one in read] == [None] * len(written)
        assert {len(batch.reports) for batch in flat} == {1}


def each(kind: OpKind, object_ids: Sequence[int]) -> list[tuple[Op]]:
    """One chain an object."""
    return [(Op(kind, object_id),) for object_id in object_ids]


def most_at_once(done: Sequence[OpDone]) -> int:
    """How many operations were under way at the same time, at most."""
    # An end comes before a beginning of the same moment.
    edges = sorted([(one.start_ns, 1) for one in done] + [(one.end_ns, -1) for one in done])
    running = most = 0
    for _, change in edges:
        running += change
        most = max(most, running)
    return most


def _of_lane(lane: Lane, operations: int) -> list[tuple[Op]]:
    """Reads of objects that `_fill` wrote, or writes of new ones."""
    if lane is Lane.LOAD:
        return [(Op(OpKind.READ, number % DEPTH),) for number in range(operations)]
    return each(OpKind.WRITE, range(1000, 1000 + operations))
