"""Virtual time and modelled I/O: the engine, whole, without waiting and without a disk.

`run_virtual` runs a coroutine on an event loop whose time jumps to the next timer as soon as nothing else is ready, so
that hours take no time and every moment is exact to the nanosecond. `ModelledIO` does the engine's operations in
memory, takes a given time for each, and refuses loudly what a store could not do.
"""

import asyncio
import heapq
import itertools
import selectors
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from mlpstorage.measure.clock import NS
from mlpstorage.storage.ops import Chain, Lane, OnDone, Op, OpDone, OperationSkippedError, OpKind

T = TypeVar("T")

TIME_LIMIT_S = 1_000_000
"""Virtual seconds after which a run is given up; floats of loop time are exact to a nanosecond far beyond that."""


class VirtualTimeError(Exception):
    """Time cannot go on: nothing is left that could wake a task, or the limit is reached."""


class _JumpingSelector(selectors.SelectSelector):
    """Reports I/O that is ready; where there is none, moves the time on in the place of waiting."""

    def __init__(self, pass_time: Callable[[float], None]) -> None:
        super().__init__()
        self._pass_time = pass_time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout != 0:
            if timeout is None:
                raise VirtualTimeError("every task waits for something that nothing is left to bring about")
            self._pass_time(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, which begins at 0 and jumps to the next timer when nothing is ready.

    A loop on which every task waits and no timer is set raises `VirtualTimeError`, in the place of waiting for ever.
    Work in other threads is not waited for.

    Args:
        limit_s: Virtual seconds after which `VirtualTimeError` is raised.
    """

    def __init__(self, limit_s: float = TIME_LIMIT_S) -> None:
        self._virtual_ns = 0
        self._limit_ns = round(limit_s * NS)
        super().__init__(_JumpingSelector(self._pass_time))
        # asyncio runs timers that are due within this; its own nanosecond would let one that is due a nanosecond
        # later run now.
        self._clock_resolution = 0.5 / NS

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual_ns / NS

    def now_ns(self) -> int:
        """Virtual nanoseconds since the loop was made."""
        return self._virtual_ns

    def jump(self, time_ns: int) -> None:
        """Let time pass at once, in the middle of whatever runs: a loop that is held up."""
        self._virtual_ns += time_ns

    def _pass_time(self, time_s: float) -> None:
        self._virtual_ns = round((self.time() + time_s) * NS)
        if self._virtual_ns > self._limit_ns:
            raise VirtualTimeError(f"virtual time passed its limit of {self._limit_ns / NS:g} s")


class VirtualClock:
    """The `measure.clock.Clock` of the virtual loop that runs."""

    def now_ns(self) -> int:
        """Virtual nanoseconds since the loop was made."""
        return _virtual_loop().now_ns()

    async def sleep_until(self, when_ns: int) -> None:
        """Return at `when_ns`, or after one turn of the event loop where that is past."""
        await asyncio.sleep(max(when_ns - self.now_ns(), 0) / NS)


def _virtual_loop() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualLoop):
        raise VirtualTimeError("the running event loop is not a VirtualLoop: use run_virtual")
    return loop


def run_virtual(coroutine: Coroutine[Any, Any, T], *, limit_s: float = TIME_LIMIT_S) -> T:
    """Run a coroutine to its end on a new virtual loop that begins at time 0; tasks that are left are cancelled.

    Raises:
        VirtualTimeError: It would wait for ever, or longer than `limit_s` virtual seconds.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s)) as runner:
        return runner.run(coroutine)


class ModelError(Exception):
    """An operation that no store could do, or that a correct engine never asks for."""


@dataclass(slots=True)
class _Batch:
    """Chains that were handed over together and are reported together."""

    done: list[list[OpDone]]
    remaining: int
    queued_ns: int
    on_done: OnDone


@dataclass(frozen=True, slots=True)
class _Item:
    batch: _Batch
    number: int
    chain: Chain


@dataclass(frozen=True, slots=True)
class ModelledBatch:
    """A batch on its way; see `kvcache.block_io.Submitted`."""

    finished: asyncio.Future[list[OpDone]]
    _io: "ModelledIO"
    _batch: _Batch

    def cancel(self) -> None:
        """Give up the chains that were not begun."""
        self._io.cancel(self._batch)


@dataclass(slots=True, kw_only=True)
class ModelledIO:
    """An in-memory I/O engine on virtual time, with the lanes and batches of `storage.pool.IoPool`.

    It is a `storage.ops.IoEngine` that reports in the event loop, and a `play.DrainableIO`.

    Reading, syncing or deleting an object that is not there, writing one that is there, copying out of a slot that
    holds another object, and two operations at once on one object or slot of which one changes it, give a `ModelError`
    in the `OpDone`, as a verified store would; such errors are also kept in `misuses`.

    Attributes:
        latency_ns: Time of each kind of operation; 0 where it is not named, None for one that never ends.
        servers: Operations that run at once, like the threads of a pool; half of them, and at least one, take loads
            first, the others stores. None for as many as are asked for.
        failures: What the n-th operation of a kind that begins (from 1) fails with.
        object_bytes: What a read says it verified.
        payload_ns: What each kind of operation says that its payload took; 0 where it is not named.
        kv_ranks: Objects of a block; they share its arena slot, each in a part of its own.
        on_operations: Called with every batch that is finished.
        stored: Ids of the objects on storage.
        slots: Id of the object in each part of an arena slot that was copied to, by `slot x kv_ranks + part`.
        finished: Every operation that ended, skipped ones included, in the order in which they ended.
        misuses: Errors that only a wrong engine causes.
        most_stored: High-water mark of objects on storage; one that is being written or deleted takes room.
        most_running: High-water mark of operations that ran at once.
    """

    latency_ns: Mapping[OpKind, int | None] = field(default_factory=dict)
    servers: int | None = None
    failures: Mapping[tuple[OpKind, int], Exception] = field(default_factory=dict)
    object_bytes: int = 1
    payload_ns: Mapping[OpKind, int] = field(default_factory=dict)
    kv_ranks: int = 1
    on_operations: Callable[[list[OpDone]], None] | None = None
    stored: set[int] = field(default_factory=set)
    slots: dict[int, int] = field(default_factory=dict)
    finished: list[OpDone] = field(default_factory=list)
    misuses: list[ModelError] = field(default_factory=list)
    most_stored: int = 0
    most_running: int = 0
    _begun: Counter[OpKind] = field(default_factory=Counter)
    _queues: tuple[deque[_Item], deque[_Item]] = field(default_factory=lambda: (deque(), deque()))
    _busy: list[bool] = field(default_factory=list)
    _users: Counter[tuple[str, int, bool]] = field(default_factory=Counter)
    _room: Counter[int] = field(default_factory=Counter)
    _ends: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _outstanding: int = 0
    _closed: bool = False
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """Make the servers; nothing runs yet."""
        self._busy = [False] * (self.servers or 0)
        self._idle.set()

    def start(self) -> None:
        """It takes operations from the start."""

    def submit(self, chains: Sequence[Chain], lane: Lane, on_done: OnDone) -> _Batch:
        """Queue a batch; see `storage.ops.IoEngine`.

        Raises:
            RuntimeError: It is closed.
        """
        if self._closed:
            raise RuntimeError("the modelled I/O is closed")
        items = chains or ((),)
        batch = _Batch([[] for _ in items], len(items), _virtual_loop().now_ns(), on_done)
        self._outstanding += 1
        self._idle.clear()
        self._queues[lane].extend(_Item(batch, number, chain) for number, chain in enumerate(items))
        self._dispatch()
        return batch

    def begin(self, chains: Sequence[Chain], lane: Lane) -> ModelledBatch:
        """Hand over a batch of operations, whose end can be waited for."""
        finished: asyncio.Future[list[OpDone]] = _virtual_loop().create_future()

        def arrived(done: list[OpDone]) -> None:
            if not finished.cancelled():
                finished.set_result(done)

        return ModelledBatch(finished, self, self.submit(chains, lane, arrived))

    async def run(self, chains: Sequence[Chain], lane: Lane) -> list[OpDone]:
        """Do a batch of operations; return when all are finished. A failed one ends its chain."""
        return await self.begin(chains, lane).finished

    def cancel(self, batch: object) -> None:
        """Finish the chains of a batch that have not begun; their operations are reported as skipped."""
        self._cancel(lambda item: item.batch is batch)

    def cancel_queued(self) -> None:
        """Finish every chain that has not begun."""
        self._cancel(lambda _: True)

    def queued_ops(self, lane: Lane) -> int:
        """Operations of a lane that have not begun."""
        return sum(len(item.chain) for item in self._queues[lane])

    def close(self) -> None:
        """Cancel what is queued and take no more. What runs goes on: only virtual time can end it."""
        self._closed = True
        self.cancel_queued()

    async def idle(self) -> None:
        """Return when no operation is queued or running."""
        await self._idle.wait()

    def done_of(self, kind: OpKind) -> list[OpDone]:
        """Operations of a kind that succeeded, in the order in which they ended."""
        return [done for done in self.finished if done.op.kind is kind and done.error is None]

    def _cancel(self, chosen: Callable[[_Item], bool]) -> None:
        items = [item for waiting in self._queues for item in waiting if chosen(item)]
        for waiting in self._queues:
            left = [item for item in waiting if not chosen(item)]
            waiting.clear()
            waiting.extend(left)
        for item in items:
            self._chain_done(item, [self._skipped(op, item.batch.queued_ns, "cancelled") for op in item.chain])

    def _dispatch(self) -> None:
        """Give queued chains to servers that are free."""
        if self.servers is None:
            missing = sum(map(len, self._queues)) - self._busy.count(False)
            self._busy += [False] * max(missing, 0)
        loaders = (len(self._busy) + 1) // 2
        for server, busy in enumerate(self._busy):
            if busy:
                continue
            own = Lane.LOAD if server < loaders else Lane.STORE
            queue = self._queues[own] or self._queues[1 - own]
            if not queue:
                continue
            self._busy[server] = True
            self.most_running = max(self.most_running, sum(self._busy))
            self._begin(server, queue.popleft(), 0, [])

    def _begin(self, server: int, item: _Item, place: int, done: list[OpDone]) -> None:
        """Begin the chain's operation at `place`, or end the chain."""
        if place == len(item.chain):
            self._busy[server] = False
            self._chain_done(item, done)
            self._dispatch()
            return
        loop = _virtual_loop()
        op, start_ns = item.chain[place], loop.now_ns()
        self._begun[op.kind] += 1
        error = self.failures.get((op.kind, self._begun[op.kind])) or self._enter(op)
        latency_ns = self.latency_ns.get(op.kind, 0)
        if latency_ns is not None:
            end_ns = start_ns + latency_ns
            end: Callable[[], None] = partial(self._end, server, item, place, done, start_ns, error)
            heapq.heappush(self._ends, (end_ns, next(self._numbers), end))
            loop.call_at(end_ns / NS, self._end_next)

    def _end_next(self) -> None:
        """End the operation whose turn it is; of those that end at once, the one that began first."""
        _, _, end = heapq.heappop(self._ends)
        end()

    def _end(
        self, server: int, item: _Item, place: int, done: list[OpDone], start_ns: int, error: Exception | None
    ) -> None:
        op = item.chain[place]
        if error is None:
            self._leave(op)
        stores = op.kind in {OpKind.READ, OpKind.WRITE}
        one = OpDone(
            op,
            item.batch.queued_ns,
            start_ns,
            _virtual_loop().now_ns(),
            True if stores and error is None else None,
            self.object_bytes if op.kind is OpKind.READ and error is None else 0,
            error,
            payload_ns=self.payload_ns.get(op.kind, 0),
        )
        self.finished.append(one)
        done.append(one)
        if error is not None:
            rest = item.chain[place + 1 :]
            done += [self._skipped(later, item.batch.queued_ns, "one before it failed") for later in rest]
            place = len(item.chain) - 1
        self._begin(server, item, place + 1, done)

    def _enter(self, op: Op) -> ModelError | None:
        """Check that an operation can be done, and take what it needs; None where it can."""
        problem = self._problem(op)
        if problem is not None:
            error = ModelError(f"{op.kind.name} of {op.object_id}: {problem}")
            self.misuses.append(error)
            return error
        self._users[self._claim(op)] += 1
        if op.kind is OpKind.WRITE:
            self._room[op.object_id] += 1
            self.most_stored = max(self.most_stored, len(self.stored) + self._room.total())
        elif op.kind is OpKind.COPY_IN:
            self.slots.pop(self._place(op), None)
        return None

    def _problem(self, op: Op) -> str | None:
        place, key, changes = self._claim(op)
        if self._users[place, key, True] or (changes and self._users[place, key, False]):
            return "another operation works on it"
        match op.kind:
            case OpKind.READ | OpKind.DELETE | OpKind.SYNC if op.object_id not in self.stored:
                return "it is not there"
            case OpKind.WRITE if op.object_id in self.stored:
                return "it is there already"
            case OpKind.COPY_OUT if self.slots.get(self._place(op)) != op.object_id:
                return f"slot {op.slot} holds {self.slots.get(self._place(op))}"
        return None

    def _leave(self, op: Op) -> None:
        """Give back what an operation needed and let its effect show."""
        self._users[self._claim(op)] -= 1
        match op.kind:
            case OpKind.WRITE:
                self._room[op.object_id] -= 1
                self.stored.add(op.object_id)
            case OpKind.DELETE:
                self.stored.remove(op.object_id)
            case OpKind.COPY_IN:
                self.slots[self._place(op)] = op.object_id

    def _place(self, op: Op) -> int:
        """Number of the part of the slot that holds the object."""
        return op.slot * self.kv_ranks + op.object_id % self.kv_ranks

    def _claim(self, op: Op) -> tuple[str, int, bool]:
        """The object or part of a slot that an operation works on, and whether it changes it."""
        if op.kind in {OpKind.COPY_IN, OpKind.COPY_OUT}:
            return "slot", self._place(op), op.kind is OpKind.COPY_IN
        return "object", op.object_id, op.kind not in {OpKind.READ, OpKind.SYNC}

    def _skipped(self, op: Op, queued_ns: int, why: str) -> OpDone:
        now_ns = _virtual_loop().now_ns()
        error = OperationSkippedError(f"{op.kind.name} skipped: {why}")
        one = OpDone(op, queued_ns, now_ns, now_ns, None, 0, error)
        self.finished.append(one)
        return one

    def _chain_done(self, item: _Item, done: list[OpDone]) -> None:
        batch = item.batch
        batch.done[item.number] = done
        batch.remaining -= 1
        if batch.remaining:
            return
        operations = [one for chain in batch.done for one in chain]
        if self.on_operations is not None:
            self.on_operations(operations)
        self._outstanding -= 1
        if not self._outstanding:
            self._idle.set()
        batch.on_done(operations)
