"""Shares of ranks over random traces: all ranks together play each request exactly once, however it is played."""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import Arrivals, Placement
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.traces import Trace, open_trace
from mlpstorage.kvcache.workload import OpenLoop, TracePlay, trace_workload
from tests.trace_files import agentic, burstgpt, mooncake

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=80)

LENGTHS = st.lists(st.integers(1, 3_000), min_size=1, max_size=30)
CONVERSATIONS = st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=6), min_size=1, max_size=8)
PLAYS = st.builds(
    TracePlay,
    arrivals=st.sampled_from([Arrivals.OPEN, Arrivals.CLOSED]),
    block_tokens=st.just(512),
    time_scale=st.floats(0.01, 10),
    max_requests=st.none() | st.integers(1, 40),
    seed=st.integers(0, 5),
    placement=st.sampled_from(Placement),
)
TIMES = st.sampled_from([{}, {"spread_s": 2.5}, {"request_rate_per_s": 3.0}])


def shares(trace: Trace, play: TracePlay, ranks: int) -> list[list[Request]]:
    """What each rank plays; nothing where the rank is refused for that reason."""
    found: list[list[Request]] = []
    for rank in range(ranks):
        try:
            loop = trace_workload(trace, play, rank=rank, ranks=ranks)
        except ConfigurationError as error:
            if f"nothing left for rank {rank} of {ranks}" not in str(error):
                raise
            found.append([])
            continue
        if isinstance(loop, OpenLoop):
            found.append(list(loop.requests()))
        else:
            found.append([request for session in loop.sessions() for request, _ in session.steps])
    return found


def check(trace: Trace, play: TracePlay, ranks: int, planned: int) -> None:
    """All ranks together play what one alone plays, the right number, and each request where it is placed."""
    together = shares(trace, play, ranks)
    (alone,) = shares(trace, play, 1)
    assert Counter(one for share in together for one in share) == Counter(alone)
    assert len(alone) == min(planned, play.max_requests or planned)
    if play.arrivals is not Arrivals.OPEN:
        return
    match play.placement:
        case Placement.SESSION:
            sessions = [{one.user for one in share} for share in together]
            assert sum(map(len, sessions)) == len(set.union(*sessions))
        case Placement.ROUND_ROBIN:
            assert together == [alone[rank::ranks] for rank in range(ranks)]
        case _:
            most = max(1024 // play.block_tokens, 1)
            beginnings = [{one.block_ids[:most] for one in share if len(one.block_ids) >= most} for share in together]
            assert sum(map(len, beginnings)) == len(set.union(*beginnings))


@deterministic
@given(lengths=LENGTHS, play=PLAYS, times=TIMES, ranks=st.integers(1, 5))
def test_ranks_share_a_trace_with_ids(lengths: list[int], play: TracePlay, times: dict[str, float], ranks: int) -> None:
    """Lines in the order of time, several at once."""
    if play.arrivals is Arrivals.OPEN:
        play = replace(play, **times)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as place:
        rows = [(1_000 * (n // 2), tokens, range(n, n + -(-tokens // 512))) for n, tokens in enumerate(lengths)]
        check(open_trace(mooncake(Path(place) / "t.jsonl", rows)), play, ranks, len(lengths))


@deterministic
@given(lengths=LENGTHS, play=PLAYS, times=TIMES, ranks=st.integers(1, 5))
def test_ranks_share_a_trace_without_ids(
    lengths: list[int], play: TracePlay, times: dict[str, float], ranks: int
) -> None:
    """The made-up sessions are those of all ranks."""
    if play.arrivals is Arrivals.OPEN:
        play = replace(play, **times)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as place:
        rows = [(number / 2, tokens, 5) for number, tokens in enumerate(lengths)]
        check(open_trace(burstgpt(Path(place) / "t.csv", rows)), play, ranks, len(lengths))


@deterministic
@given(
    conversations=CONVERSATIONS,
    play=PLAYS,
    times=TIMES,
    ranks=st.integers(1, 4),
    arrivals=st.sampled_from(Arrivals),
)
def test_ranks_share_sessions(
    conversations: list[list[int]], play: TracePlay, times: dict[str, float], ranks: int, arrivals: Arrivals
) -> None:
    """Whole conversations, or their beginnings; prompts grow, so that each begins with the one before."""
    play = replace(play, arrivals=arrivals, block_tokens=64)
    if arrivals is Arrivals.OPEN:
        play = replace(play, **times)  # type: ignore[arg-type]
    documents = []
    for news in conversations:
        tokens, steps = 0, []
        for number, new in enumerate(news):
            tokens += new
            steps.append((3.0 * number, 1.0 if number else None, tokens, 7, range(tokens // 64)))
        documents.append(steps)
    with tempfile.TemporaryDirectory() as place:
        trace = open_trace(agentic(Path(place) / "agents", documents))
        check(trace, play, ranks, sum(map(len, conversations)))
