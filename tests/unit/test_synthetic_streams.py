"""Synthetic users: the shape of their sessions, their block ids, mixes, and that a seed repeats them."""

import re
from collections import Counter
from itertools import groupby, islice, pairwise
from statistics import fmean, median

import pytest

from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.synthetic import PROFILES, Mix, user_requests
from mlpstorage.kvcache.synthetic.block_ids import shared_block_ids

CHAT = PROFILES["chat"]
ALL = tuple(PROFILES)


def only(name: str, *, rag_num_docs: int = 10) -> Mix:
    """Users of one profile."""
    return Mix(weights={name: 1.0}, rag_num_docs=rag_num_docs)


def first(
    number: int,
    *,
    mix: Mix | None = None,
    seed: int = 42,
    user: int = 0,
    block_tokens: int = 256,
    multi_turn: bool = True,
) -> list[Request]:
    """The first requests of one user."""
    stream = user_requests(mix or Mix(), seed, user, block_tokens, multi_turn=multi_turn)
    requests = list(islice(stream, number))
    assert len(requests) == number
    return requests


def sessions(requests: list[Request]) -> list[list[Request]]:
    """The requests by session; the last session, cut short, is left out."""
    return [list(group) for _, group in groupby(requests, key=lambda request: request.session)][:-1]


@pytest.mark.parametrize("name", ALL)
def test_sessions_and_turns_count_from_zero_and_the_context_grows(name: str) -> None:
    """A prompt is the last prompt, its answer, and a new message of at least one token."""
    found = sessions(first(800, mix=only(name)))
    assert len(found) > 10
    assert [session[0].session for session in found] == list(range(len(found)))
    for session in found:
        assert [request.turn for request in session] == list(range(len(session)))
        assert session[0].prompt_tokens > PROFILES[name].system_prompt_tokens
        for last, this in pairwise(session):
            assert this.prompt_tokens > last.prompt_tokens + last.output_tokens


@pytest.mark.parametrize(("block_tokens", "shared"), [(256, 4), (512, 2), (384, 2), (1_024, 1), (2_048, 0)])
def test_only_the_system_prompt_is_shared(block_tokens: int, shared: int) -> None:
    """Users, ranks (by their seeds) and sessions have those blocks in common that lie wholly in the system prompt."""
    chains = [
        session[-1].block_ids
        for seed, user in ((42, 0), (42, 1), (43, 0))
        for session in sessions(first(40, seed=seed, user=user, block_tokens=block_tokens))
    ]
    assert len(chains) > 10
    common = shared_block_ids("chat", 1_024, block_tokens)
    assert len(common) == shared
    assert all(chain[:shared] == common for chain in chains)
    private = [block_id for chain in chains for block_id in chain[shared:]]
    assert private
    assert len(set(private)) == len(private)
    assert not set(private) & set(common)


def test_two_profiles_share_no_block() -> None:
    """Other system prompts, other documents: equal seeds and users do not make them the same."""
    ids = [{block_id for request in first(60, mix=only(name)) for block_id in request.block_ids} for name in PROFILES]
    assert all(len(held) > 20 for held in ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


@pytest.mark.parametrize("name", ALL)
def test_another_block_size_has_other_ids(name: str) -> None:
    """Blocks of different sizes hold different tokens, so they never share an id, not even in the system prompt."""
    ids = [set(first(1, mix=only(name), block_tokens=block_tokens)[0].block_ids) for block_tokens in (128, 256, 512)]
    assert all(ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


@pytest.mark.parametrize("name", ALL)
def test_without_multi_turn_every_request_is_a_new_session(name: str) -> None:
    """The sessions are numbered on, each has one turn, and no prompt begins with the private text of another."""
    requests = first(100, mix=only(name), multi_turn=False)
    assert [request.session for request in requests] == list(range(100))
    assert {request.turn for request in requests} == {0}
    if name != "rag":
        beginning = PROFILES[name].system_prompt_tokens // 256
        private = [block_id for request in requests for block_id in request.block_ids[beginning:]]
        assert private
        assert len(set(private)) == len(private)


def test_no_turn_exceeds_the_context() -> None:
    """A session ends before a prompt and its answer would be longer than the context, and a new one begins."""
    found = sessions(first(2_000, mix=only("coding-agent")))
    ends = [session[-1].prompt_tokens + session[-1].output_tokens for session in found]
    assert len(ends) > 30
    assert max(ends) <= 200_000
    assert sum(end > 180_000 for end in ends) > len(ends) / 5


def test_chats_keep_to_their_stated_means() -> None:
    """Over 15,000 sessions: messages of 160 and answers of 340 tokens (less the caps), 3.7 turns, 10 s of thought.

    The tolerances are four standard errors, and 2 % more for the caps where there is one.
    """
    requests: list[Request] = []
    for user in range(200):
        requests += first(350, user=user)
    found = sum(request.turn == 0 for request in requests)
    assert found > 15_000
    messages = [request.prompt_tokens - CHAT.system_prompt_tokens for request in requests if request.turn == 0]
    assert fmean(messages) == pytest.approx(160, rel=0.08)
    assert median(messages) == pytest.approx(78, rel=0.04)
    assert fmean(request.output_tokens for request in requests) == pytest.approx(340, rel=0.04)
    assert len(requests) / found == pytest.approx(1 / 0.27, rel=0.03)
    assert fmean(request.think_s for request in requests) == pytest.approx(10.0, rel=0.02)
    assert all(1 <= tokens <= CHAT.message_tokens.most for tokens in messages)
    assert all(1 <= request.output_tokens <= CHAT.answer_tokens.most for request in requests)


def test_73_percent_of_chats_have_more_than_one_turn() -> None:
    """The share that was measured on ShareGPT and that the mean number of turns stands for."""
    found = [session for user in range(100) for session in sessions(first(150, user=user))]
    assert len(found) > 3_000
    assert fmean(len(session) > 1 for session in found) == pytest.approx(0.73, abs=0.03)


def test_agents_pause_for_tools_and_now_and_then_for_a_person() -> None:
    """Pauses between turns have the published quartiles: 6, 10 and 30 s; one in seven waits for a person."""
    requests = [request for user in range(20) for request in first(300, mix=only("coding-agent"), user=user)]
    pauses = sorted(request.think_s for request in requests if request.turn)
    assert len(pauses) > 5_000
    quartiles = [pauses[len(pauses) * part // 4] for part in (1, 2, 3)]
    assert quartiles == [pytest.approx(6, abs=2), pytest.approx(10, abs=2), pytest.approx(30, abs=6)]
    assert fmean(pause > 60 for pause in pauses) == pytest.approx(0.144, abs=0.03)
    between = [request.think_s for request in requests if request.session and not request.turn]
    assert median(between) == pytest.approx(182, rel=0.4)


def test_a_batch_user_never_waits() -> None:
    """The next item is sent when the last one is done."""
    assert {request.think_s for request in first(50, mix=only("batch"))} == {0.0}


def test_users_do_not_start_all_at_once() -> None:
    """The first request comes after a random part of a think time: 5 s in the mean, all different, one in ten early."""
    starts = [first(1, user=user)[0].think_s for user in range(2_000)]
    assert fmean(starts) == pytest.approx(5.0, rel=0.12)
    assert len(set(starts)) > 1_990
    assert sum(start < 0.3 for start in starts) > 100


def test_closed_loop_requests_have_no_arrival() -> None:
    """When a request arrives is decided by the answer before it."""
    assert {(request.arrival_s, request.user) for request in first(20, user=7)} == {(None, 7)}


def test_a_seed_repeats_the_stream_and_another_one_does_not() -> None:
    """The same seed and user send the same requests; another seed, or another user, other ones."""
    assert first(50) == first(50)
    for others in (first(50, seed=43), first(50, user=1)):
        assert [request.prompt_tokens for request in others] != [request.prompt_tokens for request in first(50)]


def test_the_stream_of_a_seed_is_the_same_on_every_python() -> None:
    """Recorded once: a change of these numbers changes every user's workload, and is one for the change log."""
    assert [(request.turn, request.prompt_tokens, request.output_tokens, request.think_s) for request in first(4)] == [
        (0, 1_364, 322, 0.422735),
        (0, 1_423, 120, 6.64333),
        (1, 1_589, 572, 1.798202),
        (2, 2_328, 81, 3.549057),
    ]


def test_block_ids_are_hashes_of_their_place() -> None:
    """A digest holds the ids of eight places, 64 bits each, little-endian.

    The digits are of `printf 'system prompt of chat 256 0' | b2sum` (the first 16), and of
    `printf 'session 42 0 0 of chat 256 0' | b2sum` (the fifth 16).
    """
    ids = first(1)[0].block_ids
    assert ids[0] == int.from_bytes(bytes.fromhex("5ee2c07827a203ff"), "little")
    assert ids[4] == int.from_bytes(bytes.fromhex("95cea06b8b70b916"), "little")


def test_a_mix_has_its_shares_of_the_sessions() -> None:
    """Of 2,000 sessions, half are chats, three in ten RAG, and the rest batch items, within four standard errors."""
    mix = Mix(weights={"rag": 3, "batch": 2, "chat": 5})
    counts: Counter[int] = Counter()
    lengths = {shared_block_ids(name, 512, 256)[:1]: name for name in ("chat", "rag", "batch")}
    found: Counter[str] = Counter()
    for user in range(20):
        for request in user_requests(mix, 42, user, 256):
            if request.session == 100:
                break
            counts[request.session] += 1
            if request.turn == 0:
                found[lengths[request.block_ids[:1]]] += 1
    assert found.total() == 2_000
    assert found["chat"] / 2_000 == pytest.approx(0.5, abs=0.045)
    assert found["rag"] / 2_000 == pytest.approx(0.3, abs=0.041)
    assert found["batch"] / 2_000 == pytest.approx(0.2, abs=0.036)


def test_one_profile_alone_is_the_same_in_every_mix() -> None:
    """Its weight and the number of documents that it does not use change nothing."""
    for mix in (Mix(weights={"chat": 1.0}), Mix(weights={"chat": 0.3}, rag_num_docs=500)):
        assert first(50, mix=mix) == first(50)
        assert str(mix) == str(Mix())


def test_the_order_of_a_mix_does_not_matter() -> None:
    """The file may name its profiles in any order, and weights count relative to their sum."""
    one, other = Mix(weights={"chat": 1, "rag": 1}), Mix(weights={"rag": 2, "chat": 2})
    assert first(50, mix=one) == first(50, mix=other)
    assert str(one) == str(other) == "chat 0.500000, rag 0.500000, 10 documents"


@pytest.mark.parametrize(
    ("weights", "rag_num_docs", "message"),
    [
        ({}, 10, "at least one profile"),
        ({"chess": 1.0}, 10, "no profile is called 'chess': give some of chat, coding-agent, document-qa, rag, batch"),
        ({"chat": 0.0}, 10, "the weight of chat must be a number above 0, not 0.0"),
        ({"chat": float("nan")}, 10, "the weight of chat must be a number above 0, not nan"),
        ({"chat": float("inf")}, 10, "the weight of chat must be a number above 0, not inf"),
        ({"rag": 1.0}, 0, "rag_num_docs must be 1 or more, not 0"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(weights: dict[str, float], rag_num_docs: int, message: str) -> None:
    """Where it is made, with what is wrong."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Mix(weights=weights, rag_num_docs=rag_num_docs)
