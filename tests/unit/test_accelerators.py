"""Who computes when, on virtual time: schedules worked by hand, to the nanosecond."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlpstorage.config import GenerationMode
from mlpstorage.kvcache.accelerators import AT_ONCE, Accelerators, Prefilled
from mlpstorage.measure.clock import NS
from mlpstorage.plan.compute import ComputeModel, ConstantCompute
from mlpstorage.testing.virtual import VirtualClock, VirtualLoop, run_virtual

MS = 1_000_000
SECOND = NS

NOTHING = ConstantCompute(prefill_tokens_per_s=None, decode_tokens_per_s=None)
RATES = ConstantCompute(prefill_tokens_per_s=1000, decode_tokens_per_s=10)
"""A millisecond a token of prefill, 100 ms one of decode in any company."""


@dataclass(frozen=True, slots=True)
class LinearCompute:
    """A step of 10 ms, and of 1 ms more for each sequence and 1 ms for each 100 tokens of context."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """A millisecond a new token, and a tenth for a cached one."""
        return new_tokens / 1000 + cached_tokens / 10_000

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """As above."""
        return 0.010 + 0.001 * batch + 0.00001 * context_tokens


@dataclass(slots=True)
class Stage:
    """Accelerators and what became of those who used them, by name."""

    compute: ComputeModel = RATES
    mode: GenerationMode = GenerationMode.REALISTIC
    clock: VirtualClock = field(default_factory=VirtualClock)
    ended_ns: dict[str, int] = field(default_factory=dict)
    prefilled: dict[str, Prefilled] = field(default_factory=dict)
    accelerators: Accelerators = field(init=False)

    def __post_init__(self) -> None:
        """Nothing runs yet."""
        self.accelerators = Accelerators(self.compute, self.mode, self.clock)

    async def prefill(self, name: str, arrival_ms: float, tokens: int, cached: int = 0) -> None:
        """Arrive, and compute."""
        await self.clock.sleep_until(round(arrival_ms * MS))
        self.prefilled[name] = await self.accelerators.prefill(tokens, cached)
        self.ended_ns[name] = self.clock.now_ns()

    async def decode(self, name: str, arrival_ms: float, output: int, context: int) -> None:
        """Arrive, and decode."""
        await self.clock.sleep_until(round(arrival_ms * MS))
        await self.accelerators.decode(output, context)
        self.ended_ns[name] = self.clock.now_ns()


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """All at once, in their order."""
    await asyncio.gather(*coroutines)


async def cancelled(coroutine: Coroutine[Any, Any, None], at_ms: float) -> None:
    """Cancelled at a moment."""
    task = asyncio.create_task(coroutine)
    await VirtualClock().sleep_until(round(at_ms * MS))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# The line of prefills


def test_prefills_wait_for_one_another() -> None:
    """Three of 100, 50 and 200 ms that arrive at 0, 30 and 400: the second waits, the third finds nobody."""

    async def scene() -> Stage:
        stage = Stage()
        await together(stage.prefill("a", 0, 100), stage.prefill("b", 30, 50), stage.prefill("c", 400, 200))
        return stage

    stage = run_virtual(scene())
    assert stage.ended_ns == {"a": 100 * MS, "b": 150 * MS, "c": 600 * MS}
    assert stage.prefilled == {
        "a": Prefilled(queue_ns=0, compute_ns=100 * MS),
        "b": Prefilled(queue_ns=70 * MS, compute_ns=50 * MS),
        "c": Prefilled(queue_ns=0, compute_ns=200 * MS),
    }


def test_the_first_to_come_is_the_first_to_be_served() -> None:
    """A hundred at once, the long ones first and the short ones last: each ends after all before it."""

    async def scene() -> Stage:
        stage = Stage()
        await together(*(stage.prefill(str(number), 0, 100 - number) for number in range(100)))
        return stage

    ended = run_virtual(scene()).ended_ns
    assert list(ended) == [str(number) for number in range(100)]
    assert list(ended.values()) == [sum(100 - one for one in range(number + 1)) * MS for number in range(100)]


def test_a_line_does_not_drift() -> None:
    """10,000 prefills of a third of a millisecond, each 333,333 ns: the last ends at 3.33333 s, not later."""

    async def scene() -> Stage:
        stage = Stage(ConstantCompute(prefill_tokens_per_s=3000, decode_tokens_per_s=None))
        await together(*(stage.prefill(str(number), 0, 1) for number in range(10_000)))
        return stage

    assert run_virtual(scene()).ended_ns["9999"] == 10_000 * 333_333


def test_a_loop_that_is_held_up_costs_the_line_no_time() -> None:
    """Held from 50 to 250 ms, in which a's turn ended at 100: b's began then, and it ends at 300, not at 450."""

    async def scene() -> Stage:
        stage = Stage()

        async def hold_up() -> None:
            await stage.clock.sleep_until(50 * MS)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.jump(200 * MS)

        await together(stage.prefill("a", 0, 100), stage.prefill("b", 10, 200), hold_up())
        return stage

    stage = run_virtual(scene())
    assert stage.ended_ns == {"a": 250 * MS, "b": 300 * MS}
    assert stage.prefilled["a"] == Prefilled(queue_ns=0, compute_ns=250 * MS)
    assert stage.prefilled["b"] == Prefilled(queue_ns=90 * MS, compute_ns=200 * MS)


@pytest.mark.parametrize(
    ("who", "at_ms", "ended_ms"),
    [
        # Its rest is not computed: the others follow at once.
        ("a", 40, {"b": 90, "c": 120}),
        # One that waits leaves the line.
        ("b", 40, {"a": 100, "c": 130}),
        ("c", 40, {"a": 100, "b": 150}),
        # In the very moment in which its turn comes.
        ("b", 100, {"a": 100, "c": 130}),
        ("b", 120, {"a": 100, "c": 150}),
    ],
)
def test_one_who_is_cancelled_leaves_the_line(who: str, at_ms: float, ended_ms: dict[str, float]) -> None:
    """100, 50 and 30 ms, at 0, 1 and 2; nobody behind is held up, and a fourth finds the line as it should be."""

    async def scene() -> Stage:
        stage = Stage()
        work = {
            "a": stage.prefill("a", 0, 100),
            "b": stage.prefill("b", 1, 50),
            "c": stage.prefill("c", 2, 30),
        }
        await together(
            *(cancelled(one, at_ms) if name == who else one for name, one in work.items()), stage.prefill("d", 200, 10)
        )
        return stage

    expected = {name: time * MS for name, time in ended_ms.items()} | {"d": 210 * MS}
    assert run_virtual(scene()).ended_ns == expected


def test_cached_tokens_count_as_the_model_says() -> None:
    """100 new tokens after 1,000 cached ones: 100 + 100 ms."""

    async def scene() -> Stage:
        stage = Stage(LinearCompute())
        await stage.prefill("a", 0, 100, 1000)
        return stage

    assert run_virtual(scene()).ended_ns == {"a": 200 * MS}


# The batch of decodes


def test_a_sequence_alone_takes_its_steps() -> None:
    """11 tokens are ten steps after the first; 100 + 11 / 2 tokens on average: 10 x (10 + 1 + 1.055) ms."""

    async def scene() -> Stage:
        stage = Stage(LinearCompute())
        await stage.decode("a", 0, 11, 100)
        return stage

    assert run_virtual(scene()).ended_ns == {"a": 120_550_000}


def test_sequences_slow_each_other_down_while_they_are_together() -> None:
    """Steps of 12 ms alone and 14 with two, 100 tokens of context each on average.

    a, of 21 steps, is alone for 10, until 120 ms. b joins with 5, which take 70 ms; a's last 6 take 72 alone.
    """

    async def scene() -> Stage:
        stage = Stage(LinearCompute())
        await together(stage.decode("a", 0, 22, 89), stage.decode("b", 120, 6, 97))
        return stage

    assert run_virtual(scene()).ended_ns == {"b": 190 * MS, "a": 262 * MS}


def test_a_sequence_may_join_in_the_middle_of_a_step() -> None:
    """Five steps of a take 15 ms each. b comes at 22.5, after one and a half, and does one, of 20 ms; a has 2.5 left.

    Each has 400 tokens of context on average: 10 + 1 + 4 ms, and 10 + 2 + 8.
    """

    async def scene() -> Stage:
        stage = Stage(LinearCompute())
        await together(stage.decode("a", 0, 6, 397), stage.decode("b", 22.5, 2, 399))
        return stage

    assert run_virtual(scene()).ended_ns == {"b": 42_500_000, "a": 80 * MS}


def test_those_who_end_together_end_at_once() -> None:
    """Three alike, from the same moment on: 4 steps of 10 + 3 + 3 x 1 ms."""

    async def scene() -> Stage:
        stage = Stage(LinearCompute())
        await together(*(stage.decode(name, 5, 4, 98) for name in "abc"))
        return stage

    assert run_virtual(scene()).ended_ns == dict.fromkeys("abc", 5 * MS + 3 * 16 * MS)


def test_one_who_is_cancelled_leaves_the_batch() -> None:
    """Eleven steps of a: two with b, of 10 + 2 + 2 ms, in 28 ms; then b goes, and the other nine take 12 ms each."""

    async def scene() -> Stage:
        stage = Stage(LinearCompute())
        await together(stage.decode("a", 0, 12, 94), cancelled(stage.decode("b", 0, 100, 50), 28))
        return stage

    assert run_virtual(scene()).ended_ns == {"a": 136 * MS}


def test_the_last_one_who_is_cancelled_leaves_an_empty_batch() -> None:
    """Nothing wakes for it any more, and the next begins anew: one step of 12 ms."""

    async def scene() -> Stage:
        stage = Stage(LinearCompute())
        await cancelled(stage.decode("a", 0, 1000, 50), 7)
        assert len(asyncio.all_tasks()) <= 2  # this one, and the timer's on its way out
        await stage.clock.sleep_until(5 * SECOND)
        await stage.decode("b", 0, 2, 99)
        return stage

    assert run_virtual(scene()).ended_ns == {"b": 5 * SECOND + 12 * MS}


def test_a_loop_that_is_held_up_does_not_slow_the_batch_down() -> None:
    """The step of a and b's first take 14 ms, b's second 12: both were over long before the loop woke at 100.

    c comes then and finds nobody: its step takes 12 ms.
    """

    async def scene() -> Stage:
        stage = Stage(LinearCompute())

        async def hold_up() -> None:
            await stage.clock.sleep_until(1 * MS)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.jump(99 * MS)
            await stage.decode("c", 0, 2, 99)

        await together(stage.decode("a", 0, 2, 99), stage.decode("b", 0, 3, 98), hold_up())
        return stage

    assert run_virtual(scene()).ended_ns == {"a": 100 * MS, "b": 100 * MS, "c": 112 * MS}


def test_a_constant_rate_is_for_each_request() -> None:
    """Ten sequences at once: 9 steps of 100 ms each, as for one."""

    async def scene() -> Stage:
        stage = Stage()
        await together(*(stage.decode(str(number), 0, 10, 5) for number in range(10)))
        return stage

    assert set(run_virtual(scene()).ended_ns.values()) == {900 * MS}


def test_prefill_and_decode_do_not_slow_each_other_down() -> None:
    """Both from the same moment on."""

    async def scene() -> Stage:
        stage = Stage()
        await together(stage.prefill("p", 0, 500), stage.decode("d", 0, 6, 5))
        return stage

    assert run_virtual(scene()).ended_ns == {"p": 500 * MS, "d": 500 * MS}


# Modes, and what is not modelled


@pytest.mark.parametrize(
    ("mode", "prefill_ms", "decode_ms"),
    [(GenerationMode.REALISTIC, 1000, 900), (GenerationMode.FAST, 100, 90), (GenerationMode.NONE, 0, 0)],
)
def test_a_mode_waits_for_its_part(mode: GenerationMode, prefill_ms: int, decode_ms: int) -> None:
    """A second of prefill, nine steps of 100 ms; the full time of a prefill is known in every mode."""

    async def scene() -> Stage:
        stage = Stage(mode=mode)
        await together(stage.prefill("p", 0, 1000), stage.decode("d", 0, 10, 5))
        assert stage.accelerators.prefill_ns(1000, 7) == SECOND
        return stage

    stage = run_virtual(scene())
    assert stage.ended_ns == {"p": prefill_ms * MS, "d": decode_ms * MS}
    assert stage.prefilled["p"] == Prefilled(queue_ns=0, compute_ns=prefill_ms * MS)


@pytest.mark.parametrize(
    ("compute", "mode"), [(NOTHING, GenerationMode.REALISTIC), (RATES, GenerationMode.NONE)], ids=["nothing", "none"]
)
def test_where_nothing_is_waited_for_the_loop_is_not_asked(compute: ComputeModel, mode: GenerationMode) -> None:
    """The coroutine ends at its first step, without another task between."""

    async def scene() -> None:
        accelerators = Accelerators(compute, mode, VirtualClock())
        prefill = accelerators.prefill(1000, 0)
        with pytest.raises(StopIteration) as ended:
            prefill.send(None)
        assert ended.value.value is AT_ONCE
        with pytest.raises(StopIteration):
            accelerators.decode(1000, 10).send(None)

    run_virtual(scene())


def test_the_first_token_is_the_prefills() -> None:
    """An answer of one token, or of none, decodes nothing."""

    async def scene() -> Stage:
        stage = Stage()
        await together(stage.decode("one", 0, 1, 5), stage.decode("none", 0, 0, 5))
        return stage

    assert run_virtual(scene()).ended_ns == {"one": 0, "none": 0}


def test_time_that_is_not_modelled_is_none() -> None:
    """Not 0: nothing was saved by not computing it."""
    accelerators = Accelerators(NOTHING, GenerationMode.REALISTIC, VirtualClock())
    assert accelerators.prefill_ns(1000, 0) is None
