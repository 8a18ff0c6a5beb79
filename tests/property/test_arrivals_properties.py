"""Spread arrivals over random traces."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.kvcache.arrivals import spread
from mlpstorage.kvcache.traces import TraceRequest

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=200)

STEPS = st.lists(st.tuples(st.sampled_from([0.0, 0.0, 0.5, 3.0, 100.0]), st.integers(0, 4)), max_size=60)
"""How much later than the last a request comes, and its session."""


@deterministic
@given(steps=STEPS, spread_s=st.floats(0.001, 50), seed=st.integers(0, 1 << 62))
def test_a_spread_trace_is_the_trace_later_in_order_and_with_its_sessions(
    steps: list[tuple[float, int]], spread_s: float, seed: int
) -> None:
    """Every request once, delayed by 0 to the spread, times rising, turns of a session in order."""
    at_s, trace = 0.0, []
    turns: Counter[int] = Counter()
    for number, (later_s, session) in enumerate(steps):
        at_s += later_s
        trace.append(
            TraceRequest(
                place=f"line {number}",
                timestamp_s=at_s,
                input_tokens=1,
                output_tokens=0,
                block_ids=(number,),
                session=session,
                turn=turns[session],
                after=(),
            )
        )
        turns[session] += 1
    out = list(spread(iter(trace), spread_s, seed))
    assert Counter(one.place for one in out) == Counter(one.place for one in trace)
    assert [one.timestamp_s for one in out] == sorted(one.timestamp_s for one in out)
    before = {one.place: one for one in trace}
    for one in out:
        # Times are rounded to a nanosecond.
        assert -1e-9 <= one.timestamp_s - before[one.place].timestamp_s <= spread_s + 1e-9
        assert one.block_ids == before[one.place].block_ids
    for session in turns:
        assert [one.turn for one in out if one.session == session] == list(range(turns[session]))
