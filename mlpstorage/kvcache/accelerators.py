"""The modelled accelerators of a rank: who computes when, and waiting for it on the rank's clock.

All users of a rank share one engine. A prefill takes the accelerators whole, so prefills wait for one another; decodes
run together as one batch. The two do not slow each other down, as where they have accelerators of their own
(disaggregated serving).
"""

import asyncio
import heapq
from collections import deque
from dataclasses import dataclass, field

from mlpstorage.config import GenerationMode
from mlpstorage.measure.clock import NS, Clock
from mlpstorage.plan.compute import ComputeModel

WAITED_PART = {GenerationMode.NONE: 0.0, GenerationMode.FAST: 0.1, GenerationMode.REALISTIC: 1.0}
"""Part of the modelled compute and think time that is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """What was really waited for a prefill: for those before it, and for itself."""

    queue_ns: int
    compute_ns: int


AT_ONCE = Prefilled(queue_ns=0, compute_ns=0)


class Accelerators:
    """One engine for all users of a rank.

    Args:
        compute: How long things take.
        mode: How much of it is waited for.
        clock: The rank's clock.
    """

    def __init__(self, compute: ComputeModel, mode: GenerationMode, clock: Clock) -> None:
        self._compute = compute
        self._part = WAITED_PART[mode]
        self._clock = clock
        self._line = _Line(clock)
        self._batch = _DecodeBatch(compute, self._part, clock)

    def prefill_ns(self, new_tokens: int, cached_tokens: int) -> int | None:
        """Time of a prefill alone, whatever the mode waits for; None where it is not modelled."""
        time_s = self._compute.prefill_s(new_tokens, cached_tokens)
        return None if time_s is None else round(time_s * NS)

    async def prefill(self, new_tokens: int, cached_tokens: int) -> Prefilled:
        """Compute `new_tokens` that follow `cached_tokens`, once all that came before have been computed.

        One that is cancelled frees the accelerators at once.
        """
        time_s = self._compute.prefill_s(new_tokens, cached_tokens) or 0.0
        time_ns = round(time_s * self._part * NS)
        return await self._line.take(time_ns) if time_ns else AT_ONCE

    async def decode(self, output_tokens: int, context_tokens: int) -> None:
        """Generate the `output_tokens - 1` tokens after the first, in one batch with all others that decode.

        `context_tokens` come before them. A step's time follows from the number of sequences and the sum of their
        contexts, each counted as its mean over the decode, `context_tokens + output_tokens / 2`; it changes when a
        sequence joins or leaves, also in the middle of a step.
        """
        if output_tokens > 1 and self._part and self._compute.decode_step_s(1, context_tokens):
            await self._batch.run(output_tokens - 1, 2 * context_tokens + output_tokens)


class _Line:
    """First come, first served, one at a time; no time is lost between two.

    A turn begins when the last one was due to end, however late the loop noticed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._taken = False
        self._free_ns = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, time_ns: int) -> Prefilled:
        """Wait for one's turn, and `time_ns` longer."""
        arrival_ns = self._clock.now_ns()
        if self._taken:
            await self._turn()
        self._taken = True
        start_ns = max(arrival_ns, self._free_ns)
        self._free_ns = start_ns + time_ns
        try:
            await self._clock.sleep_until(self._free_ns)
        except asyncio.CancelledError:
            self._free_ns = max(start_ns, min(self._free_ns, self._clock.now_ns()))
            raise
        finally:
            self._next()
        return Prefilled(queue_ns=start_ns - arrival_ns, compute_ns=self._clock.now_ns() - start_ns)

    async def _turn(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # Its turn had come in the same moment.
                self._next()
            raise

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False


@dataclass(slots=True, order=True)
class _Sequence:
    """A sequence that decodes. It ends when the batch has done `end_step` steps."""

    end_step: float
    number: int
    twice_context: int = field(compare=False)
    ended: asyncio.Future[None] = field(compare=False)


class _DecodeBatch:
    """All sequences that decode, moved on together.

    `_steps` counts the batch's steps; a sequence that joins at step g and needs k ends at g + k. Between two changes of
    the batch a step's time is constant, so that nothing happens in between: one timer is set, for the next end.
    """

    def __init__(self, compute: ComputeModel, part: float, clock: Clock) -> None:
        self._compute = compute
        self._part = part
        self._clock = clock
        self._ends: list[_Sequence] = []
        self._size = 0
        self._twice_contexts = 0
        self._steps = 0.0
        self._since_ns = 0
        self._step_ns = 0.0
        self._joined = 0
        self._timer: asyncio.Task[None] | None = None

    async def run(self, steps: int, twice_context: int) -> None:
        """Stay in the batch for so many steps."""
        self._advance()
        self._joined += 1
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sequence = _Sequence(self._steps + steps, self._joined, twice_context, ended)
        heapq.heappush(self._ends, sequence)
        self._change(1, twice_context)
        self._set_timer()
        try:
            await ended
        except asyncio.CancelledError:
            if ended.cancelled():
                self._advance()
                self._change(-1, -twice_context)
                self._set_timer()
            raise

    def _change(self, sequences: int, twice_contexts: int) -> None:
        self._size += sequences
        self._twice_contexts += twice_contexts
        if self._size:
            step_s = self._compute.decode_step_s(self._size, self._twice_contexts / 2) or 0.0
            self._step_ns = step_s * self._part * NS

    def _advance(self) -> None:
        """Bring the count of steps up to now; sequences end at their own moments, however late it is."""
        now_ns = self._clock.now_ns()
        while (end_ns := self._next_end_ns()) is not None and end_ns <= now_ns:
            self._steps, self._since_ns = self._ends[0].end_step, end_ns
            while self._ends and self._ends[0].end_step <= self._steps:
                sequence = heapq.heappop(self._ends)
                if not sequence.ended.done():
                    sequence.ended.set_result(None)
                    self._change(-1, -sequence.twice_context)
        if self._size:
            self._steps += (now_ns - self._since_ns) / self._step_ns
        else:
            self._steps = 0.0
        self._since_ns = now_ns

    def _next_end_ns(self) -> int | None:
        while self._ends and self._ends[0].ended.done():
            heapq.heappop(self._ends)
        if not self._ends:
            return None
        return self._since_ns + round((self._ends[0].end_step - self._steps) * self._step_ns)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        end_ns = self._next_end_ns()
        self._timer = None if end_ns is None else asyncio.create_task(self._wait(end_ns))

    async def _wait(self, end_ns: int) -> None:
        next_ns: int | None = end_ns
        while next_ns is not None:
            await self._clock.sleep_until(next_ns)
            self._advance()
            next_ns = self._next_end_ns()
