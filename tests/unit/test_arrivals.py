"""Arrival times: a Poisson process against its moments, and spread timestamps against a plain sort."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from statistics import fmean, pvariance

import pytest

from mlpstorage.kvcache.arrivals import at_rate, poisson_s, spread
from mlpstorage.kvcache.traces import TraceRequest

DRAWS = 40_000


def gaps_s(rate_per_s: float, seed: int, number: int = DRAWS) -> list[float]:
    """Distances of the first times of a process, the first from 0."""
    return [after - before for before, after in pairwise([0.0, *islice(poisson_s(rate_per_s, seed), number)])]


def request(number: int, at_s: float, session: int | None = None, turn: int = 0) -> TraceRequest:
    """A request that is told from others by its length."""
    return TraceRequest(
        place=f"line {number + 1}",
        timestamp_s=at_s,
        input_tokens=number + 1,
        output_tokens=1,
        block_ids=None,
        session=number if session is None else session,
        turn=turn,
        after=(),
    )


def every(seconds: float, number: int, many: int = 1) -> list[TraceRequest]:
    """`many` requests at once, `number` times, so far apart."""
    return [request(many * place + one, place * seconds) for place in range(number) for one in range(many)]


# Poisson


@pytest.mark.parametrize(("rate_per_s", "seed"), [(0.5, 1), (20.0, 2), (1_000.0, 3)])
def test_distances_have_the_mean_and_the_variance_of_an_exponential(rate_per_s: float, seed: int) -> None:
    """1 / rate and 1 / rate^2.

    Of 40,000 draws the mean has a relative standard error of 1 / sqrt(40,000) = 0.5 %, the variance, as the fourth
    central moment is 9 / rate^4, one of sqrt(8 / 40,000) = 1.4 %: four of these are allowed, 2 % and 5.7 %.
    """
    drawn = gaps_s(rate_per_s, seed)
    assert fmean(drawn) == pytest.approx(1 / rate_per_s, rel=0.02)
    assert pvariance(drawn) == pytest.approx(1 / rate_per_s**2, rel=0.057)


def test_distances_forget_the_past() -> None:
    """Of an exponential, exp(-1) exceed the mean, and neighbours do not hang together.

    The standard error of the share is sqrt(0.368 x 0.632 / 40,000) = 0.24 %, of the correlation 0.5 %; four of each.
    """
    drawn = gaps_s(10.0, 7)
    above = sum(gap_s > 0.1 for gap_s in drawn) / DRAWS
    assert above == pytest.approx(math.exp(-1), abs=0.0097)
    mean_s, variance = fmean(drawn), pvariance(drawn)
    together = fmean((one - mean_s) * (other - mean_s) for one, other in pairwise(drawn))
    assert abs(together / variance) < 0.02


def test_counts_of_a_second_vary_as_much_as_their_mean() -> None:
    """A Poisson count has a variance equal to its mean; of 2,000 seconds that is right within 4 x sqrt(2 / 2,000)."""
    counts = [0] * 2_000
    for at_s in poisson_s(20.0, 11):
        if at_s >= 2_000:
            break
        counts[int(at_s)] += 1
    assert fmean(counts) == pytest.approx(20.0, rel=0.02)
    assert pvariance(counts) / fmean(counts) == pytest.approx(1.0, abs=0.127)


def test_a_seed_repeats_its_times_exactly() -> None:
    """To the last bit, and another seed has others; times are whole nanoseconds and rise."""
    first, again = (list(islice(poisson_s(50.0, 42), 1_000)) for _ in range(2))
    assert first == again
    assert first[:5] != list(islice(poisson_s(50.0, 43), 5))
    assert all(before <= after for before, after in pairwise(first))
    assert all(round(at_s, 9) == at_s for at_s in first)


def test_twice_the_rate_is_the_same_process_in_half_the_time() -> None:
    """So that two rates of one seed can be compared."""
    slow, fast = (list(islice(poisson_s(rate, 42), 100)) for rate in (10.0, 20.0))
    assert fast == pytest.approx([at_s / 2 for at_s in slow], abs=2e-9)


def test_a_rate_takes_the_place_of_the_times_and_keeps_the_order() -> None:
    """Requests stay as they are but for their time; the trace's end is the end."""
    trace = every(3.0, 20)
    timed = list(at_rate(trace, 5.0, 9))
    assert [one.timestamp_s for one in timed] == list(islice(poisson_s(5.0, 9), 20))
    assert [one.input_tokens for one in timed] == [one.input_tokens for one in trace]
    assert [one.place for one in timed] == [one.place for one in trace]


# Spread


def test_spread_delays_by_less_than_its_length_and_evenly() -> None:
    """Of 20,000 requests in steps of a second the delays lie in [0, 3), with mean 1.5 s and variance 9 / 12.

    Standard errors: 3 / sqrt(12 x 20,000) = 0.0061 s of the mean, sqrt(0.8 / 20,000) = 0.63 % of the variance; four of
    each are allowed.
    """
    trace = every(1.0, 20_000)
    at_s = {one.input_tokens: one.timestamp_s for one in trace}
    spread_out = list(spread(trace, 3.0, 5))
    delays = [one.timestamp_s - at_s[one.input_tokens] for one in spread_out]
    assert min(delays) >= 0
    assert max(delays) < 3.0
    assert fmean(delays) == pytest.approx(1.5, abs=0.0245)
    assert pvariance(delays) == pytest.approx(0.75, rel=0.0253)


def test_spread_plays_every_request_once_and_in_the_order_of_its_new_time() -> None:
    """As a plain sort of the whole trace would; requests themselves are unchanged but for the time."""
    trace = every(2.0, 100, many=7)
    spread_out = list(spread(trace, 5.0, 5))
    assert [one.timestamp_s for one in spread_out] == sorted(one.timestamp_s for one in spread_out)
    assert sorted(one.input_tokens for one in spread_out) == [one.input_tokens for one in trace]
    assert [one.input_tokens for one in spread_out] != [one.input_tokens for one in trace]
    assert len({one.timestamp_s for one in spread_out}) == 700


def test_spread_undoes_rounded_timestamps() -> None:
    """Mooncake's timestamps are multiples of 3 s: 30 requests at once become 10 a second, in no second above 25.

    The count of a second is binomial (30, 1/3): 25 is the mean and 5.8 standard deviations.
    """
    trace = every(3.0, 200, many=30)
    counts = [0] * 603
    for one in spread(trace, 3.0, 1):
        counts[int(one.timestamp_s)] += 1
    assert sum(counts) == 6_000
    assert max(counts) <= 25


def test_spread_keeps_the_order_of_a_session() -> None:
    """Turns come in order, also where a later one drew the shorter delay: it then comes with the earlier one."""
    trace = [request(number, 0.001 * number, session=number % 3, turn=number // 3) for number in range(300)]
    spread_out = list(spread(trace, 10.0, 5))
    for session in range(3):
        mine = [one for one in spread_out if one.session == session]
        assert [one.turn for one in mine] == list(range(100))
    assert len(spread_out) == 300


def test_spread_reads_no_further_than_it_must() -> None:
    """A trace of any length is streamed: when a request comes out, what was read goes one request beyond its time."""
    read: list[float] = []

    def endless() -> Iterator[TraceRequest]:
        number = 0
        while True:
            read.append(float(number))
            yield request(number, float(number))
            number += 1

    out = 0
    for one in islice(spread(endless(), 4.0, 3), 500):
        out += 1
        assert read[-1] - 1 <= one.timestamp_s <= read[-1]
        assert len(read) - out <= 5
    assert out == 500


def test_spread_repeats() -> None:
    """A seed has its delays, another one others."""

    def times(seed: int, trace: Iterable[TraceRequest]) -> list[float]:
        return [one.timestamp_s for one in spread(trace, 3.0, seed)]

    trace = every(1.0, 50)
    assert times(1, trace) == times(1, trace)
    assert times(1, trace) != times(2, trace)


def test_spread_of_an_empty_trace() -> None:
    """Is empty."""
    assert list(spread([], 3.0, 1)) == []
