"""Synthetic chat users: the shape of their sessions, their block ids, and that a seed repeats them."""

import re
from itertools import groupby, islice, pairwise
from statistics import fmean

import pytest

from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.sessions import CHAT, ChatProfile, shared_block_ids, user_requests
from mlpstorage.kvcache.workload import session_workload

SMALL_CONTEXT = ChatProfile(
    system_prompt_tokens=100,
    message_max_tokens=200,
    answer_max_tokens=300,
    mean_turns=1_000.0,
    max_context_tokens=2_000,
)
"""Sessions that always run into their context's end."""


def first(
    number: int,
    *,
    profile: ChatProfile = CHAT,
    seed: int = 42,
    user: int = 0,
    block_tokens: int = 256,
    multi_turn: bool = True,
) -> list[Request]:
    """The first requests of one user."""
    requests = list(islice(user_requests(profile, seed, user, block_tokens, multi_turn=multi_turn), number))
    assert len(requests) == number
    return requests


def sessions(requests: list[Request]) -> list[list[Request]]:
    """The requests cut where a session begins; the last session, cut short, is left out."""
    starts = 0

    def session_of(request: Request) -> int:
        nonlocal starts
        starts += request.turn == 0
        return starts

    return [list(group) for _, group in groupby(requests, key=session_of)][:-1]


def test_turns_of_a_session_count_from_zero_and_the_context_grows() -> None:
    """A prompt is the last prompt, its answer, and a new message of at least one token."""
    found = sessions(first(500))
    assert len(found) > 50
    for session in found:
        assert [request.turn for request in session] == list(range(len(session)))
        assert session[0].prompt_tokens > CHAT.system_prompt_tokens
        for last, this in pairwise(session):
            assert this.prompt_tokens > last.prompt_tokens + last.output_tokens


def test_the_blocks_of_a_turn_are_the_first_blocks_of_the_next() -> None:
    """What one turn stored the next one finds: prefixes are stable, and every full block has one id of its own."""
    several = [session for session in sessions(first(500)) if len(session) > 1]
    assert several
    for session in several:
        for last, this in pairwise(session):
            assert this.block_ids[: len(last.block_ids)] == last.block_ids
    for session in several:
        for request in session:
            assert len(request.block_ids) == len(set(request.block_ids)) == request.prompt_tokens // 256
            assert all(0 <= block_id < 1 << 64 for block_id in request.block_ids)


@pytest.mark.parametrize(("block_tokens", "shared"), [(256, 4), (512, 2), (384, 2), (1_024, 1), (2_048, 0)])
def test_only_the_system_prompt_is_shared(block_tokens: int, shared: int) -> None:
    """Users, ranks (by their seeds) and sessions have those blocks in common that lie wholly in the system prompt."""
    chains = [
        session[-1].block_ids
        for seed, user in ((42, 0), (42, 1), (43, 0))
        for session in sessions(first(40, seed=seed, user=user, block_tokens=block_tokens))
    ]
    assert len(chains) > 10
    common = shared_block_ids(1_024, block_tokens)
    assert len(common) == shared
    assert all(chain[:shared] == common for chain in chains)
    private = [block_id for chain in chains for block_id in chain[shared:]]
    assert private
    assert len(set(private)) == len(private)
    assert not set(private) & set(common)


def test_another_block_size_has_other_ids() -> None:
    """Blocks of different sizes hold different tokens, so they never share an id, not even in the system prompt."""
    ids = [set(first(1, block_tokens=block_tokens)[0].block_ids) for block_tokens in (128, 256, 512)]
    assert all(ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_without_multi_turn_every_request_is_a_new_session() -> None:
    """Each prompt is the system prompt and one message; only the system prompt's blocks come again."""
    requests = first(200, multi_turn=False)
    assert {request.turn for request in requests} == {0}
    longest = CHAT.system_prompt_tokens + CHAT.message_max_tokens
    assert all(CHAT.system_prompt_tokens < request.prompt_tokens <= longest for request in requests)
    private = [block_id for request in requests for block_id in request.block_ids[4:]]
    assert private
    assert len(set(private)) == len(private)


def test_no_turn_exceeds_the_context() -> None:
    """A session ends before a prompt and its answer would be longer than the context, and a new one begins."""
    found = sessions(first(300, profile=SMALL_CONTEXT, block_tokens=16))
    assert len(found) > 10
    for session in found:
        assert session[-1].prompt_tokens + session[-1].output_tokens <= 2_000
    assert max(len(session) for session in found) > 3


def test_a_profile_without_room_for_one_turn_is_refused() -> None:
    """Such a user would never send a request."""
    with pytest.raises(ValueError, match="a first turn of 9216 tokens exceeds max_context_tokens 8192"):
        ChatProfile(max_context_tokens=8_192)


def test_the_default_profile_keeps_to_its_stated_means() -> None:
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
    assert fmean(request.output_tokens for request in requests) == pytest.approx(340, rel=0.04)
    assert len(requests) / found == pytest.approx(1 / 0.27, rel=0.03)
    assert fmean(request.think_s for request in requests) == pytest.approx(10.0, rel=0.02)
    assert all(1 <= tokens <= CHAT.message_max_tokens for tokens in messages)
    assert all(1 <= request.output_tokens <= CHAT.answer_max_tokens for request in requests)


def test_73_percent_of_sessions_have_more_than_one_turn() -> None:
    """The share that was measured on ShareGPT and that the mean number of turns stands for."""
    found = [session for user in range(100) for session in sessions(first(150, user=user))]
    assert len(found) > 3_000
    assert fmean(len(session) > 1 for session in found) == pytest.approx(0.73, abs=0.03)


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
        (1, 2_085, 120, 2.538206),
        (0, 1_070, 572, 23.596712),
        (1, 1_809, 81, 7.868367),
    ]


def test_block_ids_are_hashes_of_their_place() -> None:
    """The digits are those of `printf 'shared 256 0' | b2sum -l 64` and of `private 256 42 0 0 4`, little-endian."""
    ids = first(1)[0].block_ids
    assert ids[0] == int.from_bytes(bytes.fromhex("cec1c513336e30df"), "little")
    assert ids[4] == int.from_bytes(bytes.fromhex("4ca8a326142734d8"), "little")


def test_the_workload_has_one_endless_stream_per_user() -> None:
    """Users are numbered from 0, and a stream opened again begins anew."""
    workload = session_workload(CHAT, 3, 42, 256)
    assert workload.block_tokens == 256
    assert [next(user()).user for user in workload.users] == [0, 1, 2]
    assert list(islice(workload.users[1](), 30)) == list(islice(workload.users[1](), 30)) == first(30, user=1)


def test_the_workload_can_be_single_turn() -> None:
    """The switch reaches the users."""
    workload = session_workload(CHAT, 2, 42, 256, multi_turn=False)
    assert list(islice(workload.users[0](), 30)) == first(30, multi_turn=False)


def test_equal_parameters_give_equal_digests_and_others_do_not() -> None:
    """Whatever changes what is played changes the digest."""
    digest = session_workload(CHAT, 20, 42, 256).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert session_workload(ChatProfile(), 20, 42, 256).digest == digest
    others = {
        session_workload(CHAT, 20, 43, 256).digest,
        session_workload(CHAT, 19, 42, 256).digest,
        session_workload(CHAT, 20, 42, 512).digest,
        session_workload(CHAT, 20, 42, 256, multi_turn=False).digest,
        session_workload(ChatProfile(think_mean_s=5.0), 20, 42, 256).digest,
        session_workload(SMALL_CONTEXT, 20, 42, 256).digest,
    }
    assert len(others | {digest}) == 7
