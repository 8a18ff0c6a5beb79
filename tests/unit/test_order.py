"""The order of operations on one place, and batches that begin later, on virtual time."""

import asyncio
from functools import partial

import pytest

from mlpstorage.kvcache.block_io import Submitted, end_of
from mlpstorage.kvcache.order import Ended, LaterBatch, Order
from mlpstorage.storage.ops import Lane, Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.testing.engine_bench import MS, now_ns, sleep_ms
from mlpstorage.testing.virtual import ModelledIO, run_virtual

READS = [(Op(OpKind.READ, 1),), (Op(OpKind.READ, 2),), (Op(OpKind.READ, 3),)]


def future() -> Ended:
    """Something that has not ended."""
    return asyncio.get_running_loop().create_future()


async def end(one: Ended) -> None:
    """Let it end, and those that listen hear of it."""
    one.set_result(None)
    await asyncio.sleep(0)


# What waits for what


def test_a_read_waits_for_changes_and_a_change_for_both() -> None:
    """Of its own places alone: reads of one place do not wait for one another."""
    order = Order()

    async def play() -> None:
        change, read = future(), future()
        order.changes([1, 2], change)
        order.reads([2, 3], read)
        assert order.before_read([1]) == order.before_read([1, 2, 9]) == {change}
        assert order.before_read([3]) == order.before_read([9]) == set()
        assert order.before_change([3]) == {read}
        assert order.before_change([2]) == order.before_change([1, 3]) == {change, read}
        assert order.before_change([9]) == set()
        assert [order.changing(place) for place in (1, 2, 3)] == [True, True, False]
        assert [order.last_change(place) for place in (1, 2, 3)] == [change, change, None]

    run_virtual(play())


def test_what_has_ended_is_waited_for_by_nobody() -> None:
    """Each of two readers by itself; and nothing is kept of a place at which nothing is to come."""
    order = Order()

    async def play() -> None:
        change, first, second = future(), future(), future()
        order.changes([1], change)
        order.reads([1, 2], first)
        order.reads([2], second)
        await end(first)
        assert (order.before_change([1]), order.before_change([2])) == ({change}, {second})
        await end(change)
        await end(second)
        assert order.before_change([1, 2]) == set()
        assert not order.changing(1)
        assert (order._changes, order._reads) == ({}, {})

    run_virtual(play())


def test_the_latest_change_is_the_one_to_wait_for() -> None:
    """It waits for the one before it; that one's end does not open the place."""
    order = Order()

    async def play() -> None:
        first, second = future(), future()
        order.changes([1], first)
        assert order.before_change([1]) == {first}
        order.changes([1], second)
        assert order.last_change(1) is second
        assert order.before_read([1]) == {second}
        await end(first)
        assert order.before_read([1]) == {second}
        await end(second)
        assert order.before_read([1]) == set()

    run_virtual(play())


def test_a_change_that_is_given_up_has_ended_too() -> None:
    """Cancelled, or ended by an error: nobody waits for it for ever."""
    order = Order()

    async def play() -> None:
        cancelled, failed = future(), future()
        order.changes([1], cancelled)
        order.reads([2], failed)
        cancelled.cancel()
        failed.set_exception(OSError("storage"))
        await asyncio.sleep(0)
        assert order.before_change([1, 2]) == set()
        assert isinstance(failed.exception(), OSError)

    run_virtual(play())


# Batches that begin later


def slow_io() -> ModelledIO:
    """One thread that takes 10 ms a read."""
    return ModelledIO(servers=1, latency_ns={OpKind.READ: 10 * MS}, stored={1, 2, 3})


def refused() -> list[OpDone]:
    """What becomes of operations that cannot begin."""
    return [OpDone(op, 0, 0, 0, None, 0, OperationSkippedError("refused")) for (op,) in READS]


def test_a_batch_begins_when_all_before_it_have_ended() -> None:
    """At 3 and 8 ms; then three reads of 10 ms by one thread end at 38 ms."""
    io = slow_io()

    async def play() -> None:
        waits = {asyncio.ensure_future(asyncio.sleep(after_s)) for after_s in (0.003, 0.008)}
        batch = LaterBatch(set(waits), partial(io.begin, READS, Lane.LOAD), refused)
        done = await batch.finished
        assert now_ns() == 38 * MS
        assert [(one.op.object_id, one.queued_ns) for one in done] == [(number, 8 * MS) for number in (1, 2, 3)]
        assert all(one.error is None for one in done)

    run_virtual(play())


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_it_begins_also_where_what_was_before_it_did_not_end_well(how: str) -> None:
    """An end is an end; what it means is for whoever begins to say."""
    io = slow_io()

    async def play() -> None:
        before = future()
        batch = LaterBatch({before}, partial(io.begin, READS, Lane.LOAD), refused)
        await sleep_ms(1)
        if how == "failed":
            before.set_exception(OSError("storage"))
            assert before.exception() is not None
        else:
            before.cancel()
        assert [one.error for one in await batch.finished] == [None] * 3

    run_virtual(play())


def test_a_batch_that_cannot_begin_any_more_is_refused() -> None:
    """Nothing of it is done; who waits gets what it is told."""
    io = slow_io()
    asked: list[int] = []

    def begin() -> Submitted | None:
        asked.append(now_ns())
        return None

    async def play() -> None:
        batch = LaterBatch({asyncio.ensure_future(asyncio.sleep(0.005))}, begin, refused)
        assert [type(one.error) for one in await batch.finished] == [OperationSkippedError] * 3
        batch.cancel()

    run_virtual(play())
    assert asked == [5 * MS]
    assert io.finished == []


def test_a_batch_that_is_given_up_before_it_began_never_begins() -> None:
    """It still ends when what it waits for has: until then nothing may follow it at its places."""
    io = slow_io()

    async def play() -> None:
        batch = LaterBatch({asyncio.ensure_future(asyncio.sleep(0.005))}, partial(io.begin, READS, Lane.LOAD), refused)
        await sleep_ms(2)
        batch.cancel()
        assert not batch.finished.done()
        assert [type(one.error) for one in await batch.finished] == [OperationSkippedError] * 3
        assert now_ns() == 5 * MS

    run_virtual(play())
    assert io.finished == []


def test_a_batch_that_is_given_up_while_it_runs_loses_what_has_not_begun() -> None:
    """Begun at 5 ms, given up at 8: the first read goes on to 15 ms, the others are skipped."""
    io = slow_io()

    async def play() -> None:
        batch = LaterBatch({asyncio.ensure_future(asyncio.sleep(0.005))}, partial(io.begin, READS, Lane.LOAD), refused)
        await sleep_ms(8)
        batch.cancel()
        done = await batch.finished
        assert now_ns() == 15 * MS
        assert [one.error is None for one in done] == [True, False, False]

    run_virtual(play())


def test_who_waits_for_a_batch_and_is_cancelled_leaves_it_alone() -> None:
    """Waiting as the engine does: the reads go on, and are reported."""
    io = slow_io()

    async def play() -> None:
        batch = LaterBatch({asyncio.ensure_future(asyncio.sleep(0.005))}, partial(io.begin, READS, Lane.LOAD), refused)

        async def wait() -> None:
            await asyncio.wait({batch.finished})

        waiting = asyncio.create_task(wait())
        await sleep_ms(8)
        waiting.cancel()
        assert [one.error for one in await batch.finished] == [None] * 3
        assert waiting.cancelled()

    run_virtual(play())


# Waiting for one end


def test_who_waits_and_is_cancelled_cancels_nothing() -> None:
    """What was waited for goes on, others still hear of its end, and who comes afterwards goes on at once."""

    async def play() -> None:
        work = future()
        impatient, patient = asyncio.create_task(end_of(work)), asyncio.create_task(end_of(work))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.sleep(0)
        assert (impatient.cancelled(), patient.done(), work.done()) == (True, False, False)
        await end(work)
        await patient
        await end_of(work)
        assert not work.cancelled()

    run_virtual(play())


def test_an_end_that_is_a_failure_or_a_cancellation_is_an_end() -> None:
    """Whoever waits is told of no error: that is for those who ask for the result."""

    async def play() -> None:
        failed, cancelled = future(), future()
        waiting = [asyncio.create_task(end_of(one)) for one in (failed, cancelled)]
        await asyncio.sleep(0)
        failed.set_exception(OSError(5, "Input/output error"))
        cancelled.cancel()
        assert await asyncio.gather(*waiting) == [None, None]
        assert isinstance(failed.exception(), OSError)

    run_virtual(play())
