"""What ranks play of a trace and of synthetic users: times, shares, lengths, and the digest of it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise, takewhile
from pathlib import Path
from statistics import fmean

import pytest

from mlpstorage.config import Arrivals, Decisions, Placement, TraceFormat
from mlpstorage.errors import ConfigurationError, MissingFileError
from mlpstorage.kvcache.arrivals import poisson_s
from mlpstorage.kvcache.played import build_workload, with_settled_load
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.synthetic import Mix
from mlpstorage.kvcache.traces import Trace, open_trace
from mlpstorage.kvcache.workload import (
    ClosedLoop,
    OpenLoop,
    SessionLoop,
    TracePlay,
    trace_workload,
    user_arrivals,
    user_workload,
)
from mlpstorage.spec.kvcache import KVCacheSpec
from tests.trace_files import agentic, burstgpt, mooncake

OPEN = TracePlay(arrivals=Arrivals.OPEN, block_tokens=512)
SESSION = TracePlay(arrivals=Arrivals.SESSION, block_tokens=64)


@pytest.fixture
def chat(tmp_path: Path) -> Trace:
    """Eight requests, one a second from second 5 on; each has two full blocks and a partial one."""
    requests = [(5_000 + 1_000 * n, 2 * 512 + 10 + n, [0, 10 * n + 1, 10 * n + 2]) for n in range(8)]
    return open_trace(mooncake(tmp_path / "chat.jsonl", requests))


@pytest.fixture
def agents(tmp_path: Path) -> Trace:
    """Three sessions of three, two and one requests, with pauses of 2 s, 4 s and 8 s; times interleave."""
    return open_trace(
        agentic(
            tmp_path / "agents",
            [
                [(0.0, None, 128, 5, [1, 2]), (10.0, 2.0, 192, 6, [1, 2, 3]), (30.0, 4.0, 256, 7, [1, 2, 3, 4])],
                [(1.0, None, 64, 5, [1]), (20.0, 8.0, 130, 6, [1, 2])],
                [(2.0, None, 70, 9, [1])],
            ],
        )
    )


@pytest.fixture
def lengths(tmp_path: Path) -> Trace:
    """Two hundred requests without block ids, of growing length, ten a second."""
    return open_trace(burstgpt(tmp_path / "b.csv", [(number / 10, 300 + 17 * number, 50) for number in range(200)]))


def played(trace: Trace, play: TracePlay, rank: int = 0, ranks: int = 1) -> list[Request]:
    """The requests of an open loop."""
    loop = trace_workload(trace, play, rank=rank, ranks=ranks)
    assert isinstance(loop, OpenLoop)
    return list(loop.requests())


def sessions(trace: Trace, play: TracePlay, rank: int = 0, ranks: int = 1) -> SessionLoop:
    """A loop of sessions."""
    loop = trace_workload(trace, play, rank=rank, ranks=ranks)
    assert isinstance(loop, SessionLoop)
    return loop


def digest(trace: Trace, play: TracePlay, rank: int = 0, ranks: int = 1) -> str:
    """The digest of what is played."""
    return trace_workload(trace, play, rank=rank, ranks=ranks).digest


# A trace in an open loop


def test_times_count_from_the_first_request(chat: Trace) -> None:
    """And are multiplied; the partial last block has no id."""
    for time_scale in (1.0, 0.1, 3.0):
        requests = played(chat, replace(OPEN, time_scale=time_scale))
        assert [one.arrival_s for one in requests] == pytest.approx([n * time_scale for n in range(8)])
        assert [one.prompt_tokens for one in requests] == [1_034 + n for n in range(8)]
        assert [one.block_ids for one in requests] == [(0, 10 * n + 1) for n in range(8)]
        assert {one.think_s for one in requests} == {0.0}


def test_a_loop_can_be_opened_again(chat: Trace) -> None:
    """Each opening gives all requests from the first on."""
    loop = trace_workload(chat, OPEN, rank=0, ranks=1)
    assert isinstance(loop, OpenLoop)
    assert list(loop.requests()) == list(loop.requests())
    assert len(list(loop.requests())) == 8


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_a_trace_and_its_clock(chat: Trace, ranks: int) -> None:
    """Together every request once, each at the time that it has for one rank alone."""
    shares = [played(chat, OPEN, rank, ranks) for rank in range(ranks)]
    assert all(shares)
    together = sorted((one for share in shares for one in share), key=lambda one: one.prompt_tokens)
    assert together == played(chat, OPEN)


def test_ranks_share_a_rate(chat: Trace) -> None:
    """The times of all ranks together are one Poisson process at the whole rate, from which each takes its requests."""
    play = replace(OPEN, request_rate_per_s=50.0, seed=9)
    expected = list(islice(poisson_s(50.0, 9), 8))
    assert [one.arrival_s for one in played(chat, play)] == expected
    shares = [played(chat, play, rank, 3) for rank in range(3)]
    arrivals_s = {one.prompt_tokens - 1_034: one.arrival_s for share in shares for one in share}
    assert [arrivals_s[number] for number in range(8)] == expected


def test_spread_is_in_the_traces_seconds(chat: Trace) -> None:
    """Delays below 4 s of the trace are below 0.4 s at a tenth of its time; the order may change."""
    plain = {one.prompt_tokens: one.arrival_s or 0.0 for one in played(chat, replace(OPEN, time_scale=0.1))}
    spread_out = played(chat, replace(OPEN, time_scale=0.1, spread_s=4.0))
    assert sorted(one.prompt_tokens for one in spread_out) == sorted(plain)
    first, *others = (one.arrival_s or 0.0 for one in spread_out)
    assert first == 0.0
    assert others == sorted(others)
    for one in spread_out:
        # The first request to come, itself delayed, is the origin.
        assert -0.4 < (one.arrival_s or 0.0) - plain[one.prompt_tokens] < 0.4


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_first_requests_are_those_of_all_ranks_together(chat: Trace, ranks: int) -> None:
    """Five of the trace, not of each rank."""
    play = replace(OPEN, max_requests=5)
    found = [one.prompt_tokens for rank in range(ranks) for one in played(chat, play, rank, ranks)]
    assert sorted(found) == [1_034 + n for n in range(5)]


def test_a_rank_without_a_request_is_refused(chat: Trace) -> None:
    """With what to change; a rank that plays nothing would make an empty run."""
    with pytest.raises(ConfigurationError, match=r"nothing left for rank 2 of 3.*--num-processes.*--max-requests"):
        trace_workload(chat, replace(OPEN, max_requests=2), rank=2, ranks=3)
    assert len(played(chat, replace(OPEN, max_requests=2), 1, 3)) == 1


def test_sessions_stay_on_their_rank(agents: Trace) -> None:
    """In an open loop the requests of a session all go to one rank, at the times of the trace."""
    play = TracePlay(arrivals=Arrivals.OPEN, block_tokens=64)
    shares = [played(agents, play, rank, 2) for rank in range(2)]
    assert [[(one.user, one.turn, one.arrival_s) for one in share] for share in shares] == [
        [(0, 0, 0.0), (2, 0, 2.0), (0, 1, 10.0), (0, 2, 30.0)],
        [(1, 0, 1.0), (1, 1, 20.0)],
    ]


@pytest.mark.parametrize("block_tokens", [511, 256, 1, 768])
def test_blocks_are_not_made_smaller(chat: Trace, block_tokens: int) -> None:
    """Nor of other sizes than multiples: an id says nothing of its parts."""
    with pytest.raises(ConfigurationError, match=f"--block-tokens {block_tokens} is .*blocks of 512 tokens.*multiple"):
        trace_workload(chat, replace(OPEN, block_tokens=block_tokens), rank=0, ranks=1)


def test_blocks_can_be_grouped(chat: Trace) -> None:
    """Two blocks of 512 are one of 1,024, with the id of the second."""
    requests = played(chat, replace(OPEN, block_tokens=1_024))
    assert [one.block_ids for one in requests] == [(10 * n + 1,) for n in range(8)]


# A trace without ids


@pytest.mark.parametrize("block_tokens", [16, 256])
def test_a_trace_without_ids_gets_prefixes_and_keeps_its_lengths(lengths: Trace, block_tokens: int) -> None:
    """Lengths and times are the trace's; ids are those of full blocks, and later prompts begin like earlier ones."""
    requests = played(lengths, replace(OPEN, block_tokens=block_tokens))
    assert [(one.prompt_tokens, one.output_tokens) for one in requests] == [(300 + 17 * n, 50) for n in range(200)]
    assert [one.arrival_s for one in requests] == pytest.approx([n / 10 for n in range(200)])
    assert [len(one.block_ids) for one in requests] == [one.prompt_tokens // block_tokens for one in requests]
    turns: dict[int, list[Request]] = {}
    for one in requests:
        turns.setdefault(one.user, []).append(one)
    assert len(turns) < 200
    for held in turns.values():
        assert [one.turn for one in held] == list(range(len(held)))
        for earlier, later in pairwise(held):
            assert later.block_ids[: len(earlier.block_ids)] == earlier.block_ids


def test_made_up_sessions_are_the_same_for_all_ranks(lengths: Trace) -> None:
    """A session's requests go to one rank, and all together are those of one rank alone."""
    play = replace(OPEN, block_tokens=256)
    shares = [played(lengths, play, rank, 3) for rank in range(3)]
    users = [{one.user for one in share} for share in shares]
    assert sum(map(len, users)) == len(set.union(*users))
    together = sorted((one for share in shares for one in share), key=lambda one: one.prompt_tokens)
    assert together == played(lengths, play)


@pytest.mark.parametrize("arrivals", [Arrivals.OPEN, Arrivals.CLOSED])
def test_the_seed_makes_the_prefixes(lengths: Trace, arrivals: Arrivals) -> None:
    """Another seed makes other ones."""
    play = TracePlay(arrivals=arrivals, block_tokens=256)
    assert digest(lengths, play) == digest(lengths, replace(play, seed=0))
    assert digest(lengths, play) != digest(lengths, replace(play, seed=1))


# Sessions


def test_sessions_have_their_starts_and_pauses(agents: Trace) -> None:
    """Both in the trace's seconds, multiplied: the pauses are the think times that the trace tells."""
    for time_scale in (1.0, 0.5):
        found = list(sessions(agents, replace(SESSION, time_scale=time_scale)).sessions())
        assert [session.start_s for session in found] == [0.0, time_scale, 2 * time_scale]
        waits = [[[(one.turn, one.pause_s) for one in after] for _, after in session.steps] for session in found]
        assert waits == [
            [[], [(0, 2.0 * time_scale)], [(1, 4.0 * time_scale)]],
            [[], [(0, 8.0 * time_scale)]],
            [[]],
        ]
        assert [[request.prompt_tokens for request, _ in session.steps] for session in found] == [
            [128, 192, 256],
            [64, 130],
            [70],
        ]


def test_sessions_are_shared_by_ranks(agents: Trace) -> None:
    """Every second one, with its start by the clock of all."""
    shares = [list(sessions(agents, SESSION, rank, 2).sessions()) for rank in range(2)]
    assert [[session.start_s for session in share] for share in shares] == [[0.0, 2.0], [1.0]]


@pytest.mark.parametrize(("most", "kept"), [(1, [1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (99, [3, 2, 1])])
def test_the_first_requests_in_time_are_played_of_sessions(agents: Trace, most: int, kept: list[int]) -> None:
    """The same that an open loop plays: of each session its beginning, none of what comes later in the trace."""
    found = list(sessions(agents, replace(SESSION, max_requests=most)).sessions())
    assert [len(session.steps) for session in found] == kept
    opened = played(agents, TracePlay(arrivals=Arrivals.OPEN, block_tokens=64, max_requests=most))
    assert Counter((one.user, one.turn) for one in opened) == Counter(
        (request.user, request.turn) for session in found for request, _ in session.steps
    )


def test_sessions_by_users_are_the_same_one_after_the_other(agents: Trace) -> None:
    """In a closed loop the users of a rank take them."""
    loop = sessions(agents, replace(SESSION, arrivals=Arrivals.CLOSED, users=2))
    assert loop.users == 2
    assert [len(session.steps) for session in loop.sessions()] == [3, 2, 1]
    assert sessions(agents, SESSION).users is None


@pytest.mark.parametrize("name", ["chat", "lengths"])
def test_pauses_that_no_trace_tells_are_not_made_up(name: str, request: pytest.FixtureRequest) -> None:
    """`--arrivals session` is for traces that tell them; the message names the format and the flags that go."""
    trace: Trace = request.getfixturevalue(name)
    with pytest.raises(ConfigurationError, match=rf"--arrivals session: format {trace.format} .*open or closed"):
        trace_workload(trace, replace(OPEN, arrivals=Arrivals.SESSION), rank=0, ranks=1)


@pytest.mark.parametrize(("ranks", "most"), [(1, None), (3, None), (1, 5), (2, 5)])
def test_a_closed_loop_of_single_requests_plays_each_once(chat: Trace, ranks: int, most: int | None) -> None:
    """Where a trace tells no pauses every request is a session of its own."""
    play = replace(OPEN, arrivals=Arrivals.CLOSED, users=4, max_requests=most)
    found = [session for rank in range(ranks) for session in sessions(chat, play, rank, ranks).sessions()]
    assert [len(session.steps) for session in found] == [1] * (most or 8)
    tokens = [request.prompt_tokens for session in found for request, _ in session.steps]
    assert sorted(tokens) == [1_034 + n for n in range(most or 8)]


def test_a_closed_loop_of_a_trace_without_ids_plays_each_once(lengths: Trace) -> None:
    """And its prompts are those of the open loop."""
    play = replace(OPEN, arrivals=Arrivals.CLOSED, block_tokens=256)
    found = [request for session in sessions(lengths, play).sessions() for request, _ in session.steps]
    opened = played(lengths, replace(OPEN, block_tokens=256))
    assert [(one.user, one.turn, one.block_ids) for one in found] == [
        (one.user, one.turn, one.block_ids) for one in opened
    ]


# Digests


def test_equal_plays_have_equal_digests(chat: Trace, agents: Trace) -> None:
    """Read again, and from a copy elsewhere; what does not change the play does not change the digest."""
    assert digest(chat, OPEN) == digest(chat, OPEN)
    assert digest(chat, OPEN) == digest(chat, replace(OPEN, seed=7)), "nothing of it is random"
    assert digest(chat, OPEN) == digest(chat, replace(OPEN, users=7)), "there are no users in an open loop"
    assert digest(chat, OPEN) == digest(chat, replace(OPEN, max_requests=8)), "it has no more"
    copy = chat.path.with_name("copy.jsonl")
    copy.write_bytes(chat.path.read_bytes())
    assert digest(open_trace(copy), OPEN) == digest(chat, OPEN)
    assert digest(agents, SESSION) == digest(agents, SESSION)


def rewritten(trace: Trace, change: Callable[[str], str]) -> Trace:
    """The trace with another text."""
    path = trace.path.with_name("changed.jsonl")
    text = trace.path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    return open_trace(path)


@pytest.mark.parametrize(
    "change",
    [
        {"block_tokens": 1_024},
        {"time_scale": 0.5},
        {"spread_s": 0.001},
        {"request_rate_per_s": 1.0},
        {"max_requests": 7},
        {"arrivals": Arrivals.CLOSED},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_play_has_another_digest(chat: Trace, change: dict[str, object]) -> None:
    """Whatever differs in what is played, or when."""
    assert digest(chat, replace(OPEN, **change)) != digest(chat, OPEN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"timestamp": 7000', '"timestamp": 7001'),
        ('"input_length": 1036', '"input_length": 1037'),
        ('"hash_ids": [0, 21, 22]', '"hash_ids": [0, 29, 22]'),
        ('"output_length": 10', '"output_length": 11'),
    ],
)
def test_another_request_has_another_digest(chat: Trace, old: str, new: str) -> None:
    """Each field of one of its lines, in an open and in a closed loop; the third line is the one that changes."""
    other = rewritten(chat, lambda text: text.replace(old, new, 1))
    assert digest(other, OPEN) != digest(chat, OPEN)
    closed = replace(OPEN, arrivals=Arrivals.CLOSED)
    assert digest(other, closed) != digest(chat, closed)


def test_a_partial_block_that_is_never_stored_changes_nothing(chat: Trace) -> None:
    """Its id is not played."""
    other = rewritten(chat, lambda text: text.replace("[0, 21, 22]", "[0, 21, 99]"))
    assert digest(other, OPEN) == digest(chat, OPEN)


def test_pauses_and_users_are_in_the_digest_of_sessions(agents: Trace) -> None:
    """A pause of one session, and the time scale; the number of users is not: it changes who plays, not what."""
    path = agents.path / "conversation_001.json"
    before = digest(agents, SESSION)
    path.write_text(path.read_text().replace('"think_time": 8.0', '"think_time": 8.5'))
    assert digest(agents, SESSION) != before
    assert digest(agents, SESSION) != digest(agents, replace(SESSION, time_scale=0.5))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_have_digests_of_their_shares(chat: Trace, rank: int) -> None:
    """Which differ from each other and from that of the whole."""
    assert digest(chat, OPEN, rank, 2) not in {digest(chat, OPEN, 1 - rank, 2), digest(chat, OPEN)}


def test_a_broken_line_shows_before_anything_runs(chat: Trace) -> None:
    """The trace is read whole for the digest."""
    other = rewritten(chat, lambda text: text.replace('"hash_ids": [0, 71, 72]', '"hash_ids": []'))
    with pytest.raises(ConfigurationError, match="line 8"):
        trace_workload(other, OPEN, rank=0, ranks=1)
    assert len(played(other, replace(OPEN, max_requests=7))) == 7


# Synthetic users


def test_users_of_a_closed_loop_have_no_arrival_times() -> None:
    """Their requests have pauses, and each user has a stream of their own."""
    loop = user_workload(Mix(), 3, 42, 256)
    assert isinstance(loop, ClosedLoop)
    firsts = [list(islice(user(), 4)) for user in loop.users]
    assert [{one.user for one in stream} for stream in firsts] == [{0}, {1}, {2}]
    assert {one.arrival_s for stream in firsts for one in stream} == {None}
    assert all(one.think_s > 0 for stream in firsts for one in stream)


def test_users_at_a_rate_ask_in_turn() -> None:
    """One request of each user after the other, the same as in a closed loop, at the times of a Poisson process."""
    loop = user_arrivals(Mix(), 3, 42, 256, rate_per_s=20.0)
    asked = list(islice(loop.requests(), 12))
    assert [one.user for one in asked] == [0, 1, 2] * 4
    assert [one.arrival_s for one in asked] == list(islice(poisson_s(20.0, 42), 12))
    assert {one.think_s for one in asked} == {0.0}
    closed = user_workload(Mix(), 3, 42, 256)
    for user in range(3):
        mine = [one.block_ids for one in asked if one.user == user]
        assert mine == [one.block_ids for one in islice(closed.users[user](), 4)]


@pytest.mark.parametrize("rate_per_s", [None, 10.0])
def test_digest_of_users_is_of_all_that_shapes_them(rate_per_s: float | None) -> None:
    """Equal for equal users, another for another number, seed, block size, mix, or single turns."""

    def of(
        mix: Mix | None = None, users: int = 4, seed: int = 1, block_tokens: int = 64, *, multi_turn: bool = True
    ) -> str:
        mix = mix or Mix()
        if rate_per_s is None:
            return user_workload(mix, users, seed, block_tokens, multi_turn=multi_turn).digest
        return user_arrivals(mix, users, seed, block_tokens, rate_per_s=rate_per_s, multi_turn=multi_turn).digest

    digests = [
        of(),
        of(users=5),
        of(seed=2),
        of(block_tokens=128),
        of(Mix(weights={"rag": 1})),
        of(Mix(weights={"chat": 1, "rag": 1})),
        of(Mix(weights={"rag": 1}, rag_num_docs=11)),
        of(multi_turn=False),
    ]
    assert len(set(digests)) == len(digests)
    assert of() == digests[0]
    assert of(Mix(weights={"chat": 5.0})) == digests[0], "one profile whatever its weight"


def test_digests_tell_a_rate_from_another_and_from_none() -> None:
    """The arrival times are part of what is played."""
    closed = user_workload(Mix(), 4, 1, 64).digest
    assert len({closed, *(user_arrivals(Mix(), 4, 1, 64, rate_per_s=rate).digest for rate in (1.0, 2.0))}) == 3


# From a spec


def test_a_settled_load_of_users_is_a_closed_loop() -> None:
    """256 tokens a block, decisions by what is complete; a rate makes it open; what is given stays."""
    settled = with_settled_load(KVCacheSpec(), 1)
    assert (settled.arrivals, settled.block_tokens, settled.decisions, settled.trace_format) == (
        Arrivals.CLOSED,
        256,
        Decisions.COMPLETION,
        None,
    )
    assert with_settled_load(KVCacheSpec(request_rate=5), 1).arrivals is Arrivals.OPEN
    assert with_settled_load(KVCacheSpec(decisions=Decisions.ARRIVAL, block_tokens=16), 1).block_tokens == 16
    assert with_settled_load(KVCacheSpec(decisions=Decisions.ARRIVAL), 1).decisions is Decisions.ARRIVAL


def test_a_settled_load_of_a_trace_follows_from_the_trace(chat: Trace, agents: Trace, lengths: Trace) -> None:
    """Its format, its blocks, and sessions where it tells pauses."""
    found = [with_settled_load(KVCacheSpec(trace=trace.path), 1) for trace in (chat, agents, lengths)]
    assert [(one.trace_format, one.block_tokens, one.arrivals) for one in found] == [
        (TraceFormat.MOONCAKE, 512, Arrivals.OPEN),
        (TraceFormat.AGENTIC, 64, Arrivals.SESSION),
        (TraceFormat.BURSTGPT, 256, Arrivals.OPEN),
    ]
    at_rate = with_settled_load(KVCacheSpec(trace=agents.path, request_rate=3, block_tokens=128), 1)
    assert (at_rate.arrivals, at_rate.block_tokens) == (Arrivals.OPEN, 128)


@pytest.mark.parametrize(
    ("values", "ranks", "decisions"),
    [
        ({"max_requests": 3}, 1, Decisions.ARRIVAL),
        ({"max_requests": 3, "request_rate": 2}, 1, Decisions.ARRIVAL),
        ({}, 1, Decisions.COMPLETION),
        ({"max_requests": 3}, 2, Decisions.COMPLETION),
        ({"max_requests": 3, "arrivals": "closed"}, 1, Decisions.COMPLETION),
        ({"max_requests": 3, "load_timeout": 1}, 1, Decisions.COMPLETION),
        ({"max_requests": 3, "decisions": "completion"}, 1, Decisions.COMPLETION),
    ],
)
def test_runs_that_can_repeat_decide_at_arrival(
    chat: Trace, values: dict[str, object], ranks: int, decisions: Decisions
) -> None:
    """An open loop with an end and one rank, without policies that decide by time; unless it is told otherwise."""
    spec = KVCacheSpec.model_validate({"trace": chat.path} | values)
    assert with_settled_load(spec, ranks).decisions is decisions


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """By its path."""
    with pytest.raises(MissingFileError, match=r"none\.jsonl"):
        with_settled_load(KVCacheSpec(trace=tmp_path / "none.jsonl"), 1)


def test_a_workload_is_that_of_its_spec(chat: Trace, agents: Trace) -> None:
    """Every parameter arrives: the digest is that of the play which is built by hand."""
    spec = with_settled_load(
        KVCacheSpec(trace=chat.path, time_scale=0.5, spread_arrivals=2, max_requests=6, seed=3, block_tokens=1024), 2
    )
    play = TracePlay(arrivals=Arrivals.OPEN, block_tokens=1_024, time_scale=0.5, spread_s=2.0, max_requests=6, seed=3)
    assert build_workload(spec, 1, 2).digest == digest(chat, play, 1, 2)
    spec = with_settled_load(KVCacheSpec(trace=agents.path, arrivals=Arrivals.CLOSED, num_users=2), 1)
    built = build_workload(spec, 0, 1)
    assert isinstance(built, SessionLoop)
    assert (built.users, built.digest) == (2, digest(agents, replace(SESSION, arrivals=Arrivals.CLOSED)))


def test_users_of_a_rank_are_those_of_its_seed() -> None:
    """Rank r has seed + r; the profiles, single turns and documents are those of the spec."""
    spec = with_settled_load(KVCacheSpec(workload={"rag": 1.0}, rag_num_docs=3, num_users=4, block_tokens=64), 2)
    mix = Mix(weights={"rag": 1.0}, rag_num_docs=3)
    assert build_workload(spec, 1, 2).digest == user_workload(mix, 4, 43, 64).digest
    switched = with_settled_load(KVCacheSpec(enable_rag=True, rag_num_docs=3, num_users=4, block_tokens=64), 2)
    assert build_workload(switched, 1, 2).digest == build_workload(spec, 1, 2).digest
    single = with_settled_load(KVCacheSpec(disable_multi_turn=True, num_users=4), 1)
    assert build_workload(single, 0, 1).digest == user_workload(Mix(), 4, 42, 256, multi_turn=False).digest


def test_ranks_of_users_share_a_rate() -> None:
    """Each has its part of it, and other times: together they ask 100 times a second, within four standard errors."""
    spec = with_settled_load(KVCacheSpec(request_rate=100, num_users=2, block_tokens=4096), 4)
    ends_s = []
    for rank in range(4):
        loop = build_workload(spec, rank, 4)
        assert isinstance(loop, OpenLoop)
        *_, last = islice(loop.requests(), 1_000)
        assert last.arrival_s is not None
        ends_s.append(last.arrival_s)
    assert len(set(ends_s)) == 4
    # 1,000 requests at 25 a second take 40 s; the mean of four has a standard error of 40 / sqrt(4,000) s.
    assert fmean(ends_s) == pytest.approx(40.0, abs=2.6)


# Placement


def test_requests_are_dealt_one_after_the_other(chat: Trace) -> None:
    """In the order of their arrival, whatever their session."""
    play = replace(OPEN, placement=Placement.ROUND_ROBIN)
    shares = [[one.arrival_s for one in played(chat, play, rank, 3)] for rank in range(3)]
    assert shares == [[0.0, 3.0, 6.0], [1.0, 4.0, 7.0], [2.0, 5.0]]


def test_equal_prefixes_meet(tmp_path: Path) -> None:
    """The first 1,024 tokens decide, here two blocks; not what comes behind, nor when or in which session."""
    heads = [[0, 100 + number % 7] for number in range(70)]
    rows = [(number, 2048, [*head, 1_000 + number, 2_000 + number]) for number, head in enumerate(heads)]
    trace = open_trace(mooncake(tmp_path / "t.jsonl", rows))
    play = replace(OPEN, placement=Placement.PREFIX)
    shares = [{one.block_ids[1] for one in played(trace, play, rank, 2)} for rank in range(2)]
    assert sorted(map(len, shares)) in ([2, 5], [3, 4], [1, 6])
    assert len(shares[0] | shares[1]) == 7
    # A prompt that is shorter goes by its last full block, and one without any by its session.
    short = [(number, 600, [0, 5]) for number in range(4)] + [(10 + number, 100, [7]) for number in range(4)]
    trace = open_trace(mooncake(tmp_path / "short.jsonl", short))
    shares_of_short = [played(trace, play, rank, 2) for rank in range(2)]
    assert sorted(sum(one.prompt_tokens == 600 for one in share) for share in shares_of_short) == [0, 4]
    assert [sum(one.prompt_tokens == 100 for one in share) for share in shares_of_short] == [2, 2]


@pytest.mark.parametrize("placement", Placement)
def test_a_session_that_waits_for_its_answers_stays_whole(agents: Trace, placement: Placement) -> None:
    """It is dealt, or goes where its first request goes."""
    play = replace(SESSION, placement=placement)
    found = []
    for rank in range(2):
        try:
            found.append([len(one.steps) for one in sessions(agents, play, rank, 2).sessions()])
        except ConfigurationError:
            found.append([])  # nothing is left for it
    assert sorted(length for share in found for length in share) == [1, 2, 3]
    if placement is not Placement.PREFIX:
        assert found == [[3, 1], [2]]


def test_a_digest_tells_the_placement_where_there_are_several_ranks(chat: Trace) -> None:
    """One rank plays the same however requests are placed; of several each has its own share, and says how."""
    plays = [replace(OPEN, placement=placement) for placement in (Placement.SESSION, Placement.ROUND_ROBIN)]
    alone, dealt_alone = (trace_workload(chat, play, rank=0, ranks=1).digest for play in plays)
    assert alone == dealt_alone
    # In this trace every request is a session, so that both deal them alike.
    assert played(chat, plays[0], 1, 2) == played(chat, plays[1], 1, 2)
    assert (
        trace_workload(chat, plays[0], rank=1, ranks=2).digest != trace_workload(chat, plays[1], rank=1, ranks=2).digest
    )


def test_synthetic_users_of_an_open_loop_can_be_dealt() -> None:
    """Two ranks together serve what the users of both ask, one request after the other."""

    def share(rank: int, placement: Placement) -> list[Request]:
        spec = KVCacheSpec(
            request_rate=8, num_users=3, block_tokens=256, arrivals=Arrivals.OPEN, placement=placement, seed=9
        )
        loop = build_workload(spec, rank, 2)
        assert isinstance(loop, OpenLoop)
        return list(takewhile(lambda one: (one.arrival_s or 0.0) < 30, loop.requests()))

    own = [share(rank, Placement.SESSION) for rank in range(2)]
    asked = sorted((*own[0], *own[1]), key=lambda one: one.arrival_s or 0.0)
    assert len(asked) > 100
    assert [share(rank, Placement.ROUND_ROBIN) for rank in range(2)] == [asked[0::2], asked[1::2]]
