"""The line of prefills and the batch of decodes against simulations that take every step by itself."""

import asyncio
from dataclasses import dataclass
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import GenerationMode
from mlpstorage.kvcache.accelerators import Accelerators
from mlpstorage.testing.virtual import VirtualClock, run_virtual

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=200)

MS = 1_000_000
TICK_NS = 500_000
"""Arrivals and cancellations are whole ticks, or a third of a millisecond off."""

TIMES = st.integers(0, 400).map(lambda ticks: ticks * TICK_NS) | st.integers(0, 200 * MS)


@dataclass(frozen=True, slots=True)
class Job:
    """Who comes when, for how much, and when it is cancelled."""

    arrival_ns: int
    amount: int
    context: int
    cancel_ns: int | None


JOBS = st.lists(
    st.builds(
        Job,
        arrival_ns=TIMES,
        amount=st.integers(1, 40),
        context=st.integers(0, 2000),
        cancel_ns=st.none() | st.none() | TIMES,
    ),
    max_size=12,
)


@dataclass(frozen=True, slots=True)
class Compute:
    """7 ms a token of prefill; steps of 1 ms, 0.25 ms more for a sequence and 0.001 ms for a token of context."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:  # noqa: ARG002 - of the protocol
        """As above."""
        return 0.007 * new_tokens

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """As above."""
        return (1 + 0.25 * batch + 0.001 * context_tokens) / 1000


def played(jobs: list[Job], *, decode: bool) -> tuple[list[int | None], list[int]]:
    """When each job ended, by the product, None where it was cancelled before; and the order in which they came.

    asyncio wakes those of one moment in any order.
    """
    ended: list[int | None] = [None] * len(jobs)
    came: list[int] = []

    async def one(accelerators: Accelerators, number: int, job: Job) -> None:
        clock = VirtualClock()
        await clock.sleep_until(job.arrival_ns)
        came.append(number)
        if decode:
            await accelerators.decode(job.amount + 1, job.context)
        else:
            await accelerators.prefill(job.amount, 0)
        ended[number] = clock.now_ns()

    async def cancel(task: asyncio.Task[None], when_ns: int) -> None:
        await VirtualClock().sleep_until(when_ns)
        task.cancel()

    async def scene() -> None:
        accelerators = Accelerators(Compute(), GenerationMode.REALISTIC, VirtualClock())
        tasks = [asyncio.create_task(one(accelerators, number, job)) for number, job in enumerate(jobs)]
        cancels = [cancel(tasks[number], job.cancel_ns) for number, job in enumerate(jobs) if job.cancel_ns is not None]
        await asyncio.gather(*tasks, *cancels, return_exceptions=True)

    run_virtual(scene())
    return ended, came


@deterministic
@given(jobs=JOBS)
def test_the_line_is_first_come_first_served(jobs: list[Job]) -> None:
    """One after the other in the order of arrival; one who is cancelled takes what it had until then."""
    found, came = played(jobs, decode=False)
    assert [jobs[number].arrival_ns for number in came] == sorted(jobs[number].arrival_ns for number in came)
    free_ns = 0
    for number in came:
        job = jobs[number]
        start_ns = max(job.arrival_ns, free_ns)
        end_ns = start_ns + job.amount * 7 * MS
        if found[number] is not None:
            assert found[number] == end_ns
            free_ns = end_ns
        else:
            # Cancelled before its end, or in the very moment.
            assert job.cancel_ns is not None
            assert job.cancel_ns <= end_ns
            free_ns = max(free_ns, min(job.cancel_ns, end_ns)) if job.cancel_ns > start_ns else free_ns
    for number, job in enumerate(jobs):
        if job.cancel_ns is None:
            assert found[number] is not None


def simulated(jobs: list[Job]) -> list[Fraction | None]:
    """When each job ends, by fractions: from one change to the next, with what is left of each kept apart."""
    ended: list[Fraction | None] = [None] * len(jobs)
    left: dict[int, Fraction] = {}
    now = Fraction(0)
    comes = sorted((job.arrival_ns, number) for number, job in enumerate(jobs))
    goes = sorted((job.cancel_ns, number) for number, job in enumerate(jobs) if job.cancel_ns is not None)
    while comes or left:
        step_ns = Fraction(MS) + len(left) * Fraction(MS, 4)
        step_ns += sum(Fraction(2 * jobs[one].context + jobs[one].amount + 1, 2) for one in left) * 1000
        moments = [now + min(left.values()) * step_ns] if left else []
        moments += [Fraction(queue[0][0]) for queue in (comes, goes) if queue]
        then = max(min(moments), now)
        left = {number: steps - (then - now) / step_ns for number, steps in left.items()}
        now = then
        for number in [one for one, steps in left.items() if steps <= 0]:
            ended[number] = now
            del left[number]
        while goes and goes[0][0] <= now:
            left.pop(goes.pop(0)[1], None)
        while comes and comes[0][0] <= now:
            number = comes.pop(0)[1]
            cancel_ns = jobs[number].cancel_ns
            if cancel_ns is None or cancel_ns > now:
                left[number] = Fraction(jobs[number].amount)
    return ended


@deterministic
@given(jobs=JOBS)
def test_a_batch_moves_on_together(jobs: list[Job]) -> None:
    """Everybody ends when the simulation says, but for the rounding of each change of the batch to a nanosecond."""
    expected = simulated(jobs)
    found, _ = played(jobs, decode=True)
    for job, one, other in zip(jobs, found, expected, strict=True):
        if one is not None and other is not None:
            assert abs(one - other) <= 3 * len(jobs)
        elif one is not None or other is not None:
            # Cancelled in the very moment of its end.
            end_ns = other if one is None else Fraction(one)
            assert end_ns is not None
            assert job.cancel_ns is not None
            assert abs(end_ns - job.cancel_ns) <= 3 * len(jobs)
