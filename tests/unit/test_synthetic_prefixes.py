"""Prefix structure for traces that bring lengths only."""

from itertools import islice, repeat
from statistics import fmean, median

import pytest

from mlpstorage.kvcache.synthetic import PROFILES, prefixes, with_prefixes
from mlpstorage.kvcache.synthetic.block_ids import shared_block_ids
from mlpstorage.kvcache.synthetic.draws import Lognormal, source

CHAT = PROFILES["chat"]


def lengths_like(median_tokens: float, number: int) -> list[tuple[int, int]]:
    """Lengths of a trace: inputs and outputs, lognormal."""
    draw = source("lengths")
    inputs = Lognormal(median=median_tokens, sigma=1.0, most=30_000)
    outputs = Lognormal(median=200.0, sigma=0.9, most=4_096)
    return [(inputs.tokens(draw), outputs.tokens(draw)) for _ in range(number)]


def test_a_trace_gets_the_shape_of_chats() -> None:
    """Up to 73 % of 20,000 requests go on with a session, and what they add to it is as long as a chat's messages."""
    contexts: dict[int, int] = {}
    messages: list[int] = []
    lengths = lengths_like(2_500.0, 20_000)
    for (input_tokens, output_tokens), (session, turn, _) in zip(lengths, with_prefixes(lengths, 42, 256), strict=True):
        if turn:
            messages.append(input_tokens - contexts[session])
        contexts[session] = input_tokens + output_tokens
    # Of the rest some are short, so that no session is shorter, and some so long that none comes near.
    assert 0.65 < len(messages) / 20_000 < 0.74
    assert 1 <= min(messages) <= max(messages) <= CHAT.message_tokens.most
    # The context is the closest from below, so that a little is added to the message.
    assert median(messages) == pytest.approx(78, rel=0.25)
    assert fmean(messages) == pytest.approx(160, rel=0.25)


def test_a_first_turn_has_the_shared_system_prompt_as_far_as_it_fits() -> None:
    """Long inputs begin with all of it, short ones with a part; the rest is private."""
    system = shared_block_ids("chat", 1_024, 16)
    (_, _, long), (_, _, short) = with_prefixes([(9_000, 1), (700, 1)], 42, 16)
    assert long[:64] == system
    common = [block_id for block_id in short if block_id in system]
    assert tuple(common) == short[: len(common)] == system[: len(common)]
    assert 0 < len(common) < 64
    assert not set(long[64:]) & set(short[len(common) :])


def test_a_profile_of_single_turns_has_no_session_that_goes_on() -> None:
    """The probability is the profile's."""
    found = list(with_prefixes([(5_000, 10)] * 300, 42, 256, PROFILES["batch"]))
    assert [(session, turn) for session, turn, _ in found] == [(number, 0) for number in range(300)]
    shared = 2_560 // 256
    assert len({block_ids[:shared] for _, _, block_ids in found}) == 1
    assert len({block_ids[shared] for _, _, block_ids in found}) == 300


def test_requests_are_taken_one_by_one() -> None:
    """A trace without end can be given: nothing is read ahead, nothing is kept of what was given out."""
    taken: list[int] = []

    def endless() -> "repeat[tuple[int, int]]":
        taken.append(1)
        return repeat((1_500, 20))

    assert len(list(islice(with_prefixes(endless(), 42, 256), 500))) == 500
    assert taken == [1]


def test_open_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for three, only one of the three sessions that were active last goes on."""
    monkeypatch.setattr(prefixes, "MAX_OPEN_SESSIONS", 3)
    lengths = lengths_like(1_500.0, 3_000)
    active: list[int] = []
    went_on = 0
    for session, turn, _ in with_prefixes(lengths, 42, 256):
        if turn:
            assert session in active[-3:]
            active.remove(session)
            went_on += 1
        active.append(session)
    assert went_on > 500


def test_the_choice_of_a_seed_is_the_same_on_every_python() -> None:
    """Recorded once; another seed makes other choices and shares no private block."""
    lengths = [(1_200, 100), (1_500, 100), (1_700, 50), (2_000, 50), (1_320, 10), (3_000, 10), (1_900, 10)]
    found = list(with_prefixes(lengths, 42, 256))
    assert [(session, turn) for session, turn, _ in found] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (1, 1)]
    private = {block_id for _, _, block_ids in found for block_id in block_ids[4:]}
    others = {block_id for _, _, block_ids in with_prefixes(lengths, 43, 256) for block_id in block_ids[4:]}
    assert private
    assert not private & others
