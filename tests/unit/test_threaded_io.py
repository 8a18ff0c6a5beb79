"""The engine's I/O over an I/O engine: batches that can be waited for and given up, and nothing goes uncounted."""

import asyncio

import pytest

from mlpstorage.kvcache.threaded_io import ThreadedIO
from mlpstorage.measure.clock import NS
from mlpstorage.storage.ops import Lane, Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.testing.engine_bench import MS, now_ns, sleep_ms
from mlpstorage.testing.virtual import ModelledIO, run_virtual


def reads(*object_ids: int) -> list[tuple[Op]]:
    """A chain each."""
    return [(Op(OpKind.READ, object_id),) for object_id in object_ids]


def slow_engine() -> ModelledIO:
    """One thread that takes 10 ms a read of any of ten objects."""
    return ModelledIO(servers=1, latency_ns={OpKind.READ: 10 * MS}, stored=set(range(10)))


def test_a_batch_is_waited_for_and_counted_once() -> None:
    """Two reads of 10 ms after each other; it is idle before and after, and not in between."""
    counted: list[OpDone] = []
    io = ThreadedIO(slow_engine(), counted.extend)

    async def play() -> list[OpDone]:
        await io.idle()
        running = asyncio.create_task(io.run(reads(1, 2), Lane.LOAD))
        await sleep_ms(1)
        await io.idle()
        assert now_ns() == 20 * MS
        return await running

    done = run_virtual(play())
    assert [one.op.object_id for one in done] == [1, 2]
    assert counted == done


def test_a_batch_that_is_given_up_loses_what_has_not_begun_and_no_other_batch() -> None:
    """Of three reads the first has begun; the other batch, queued behind, is read whole and sooner."""
    counted: list[OpDone] = []
    io = ThreadedIO(slow_engine(), counted.extend)

    async def play() -> None:
        batch = io.begin(reads(1, 2, 3), Lane.LOAD)
        other = io.begin(reads(4, 5), Lane.LOAD)
        await sleep_ms(5)
        batch.cancel()
        done = await batch.finished
        assert now_ns() == 10 * MS
        assert [one.error is None for one in done] == [True, False, False]
        assert isinstance(done[1].error, OperationSkippedError)
        assert all(one.error is None for one in await other.finished)
        assert now_ns() == 30 * MS
        batch.cancel()

    run_virtual(play())
    assert len(counted) == 5


def test_what_nobody_waits_for_any_more_is_counted() -> None:
    """The one that waited is cancelled at 5 ms; the read ends at 10 ms, is counted, and only then is it idle."""
    counted: list[OpDone] = []
    io = ThreadedIO(slow_engine(), counted.extend)

    async def play() -> None:
        waiting = asyncio.create_task(io.run(reads(1), Lane.LOAD))
        await sleep_ms(5)
        waiting.cancel()
        await io.idle()
        assert now_ns() == 10 * MS
        assert waiting.cancelled()

    run_virtual(play())
    assert [one.op.object_id for one in counted] == [1]


def test_a_closed_engine_refuses_and_leaves_it_idle() -> None:
    """The error is the caller's; nothing is outstanding."""
    engine = slow_engine()
    io = ThreadedIO(engine, lambda _: None)

    async def play() -> None:
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            io.begin(reads(1), Lane.LOAD)
        await io.idle()

    run_virtual(play(), limit_s=1 / NS)
