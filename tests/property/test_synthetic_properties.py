"""Prefixes of synthetic requests, over random mixes, seeds, block sizes and lengths."""

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import WORKLOADS
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.synthetic import PROFILES, Mix, user_requests, with_prefixes

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=100)

MIXES = st.builds(
    Mix,
    weights=st.dictionaries(st.sampled_from(WORKLOADS), st.floats(0.01, 100), min_size=1),
    rag_num_docs=st.integers(1, 50),
)
BLOCK_TOKENS = st.integers(1, 64).map(lambda sixteenths: 16 * sixteenths)
LENGTHS = st.lists(st.tuples(st.integers(1, 6_000), st.integers(0, 800)), max_size=150)


def first(mix: Mix, seed: int, user: int, block_tokens: int, *, multi_turn: bool = True) -> list[Request]:
    """The first twelve requests of a user."""
    return list(islice(user_requests(mix, seed, user, block_tokens, multi_turn=multi_turn), 12))


@deterministic
@given(mix=MIXES, seed=st.integers(0, 1 << 62), user=st.integers(0, 99), block_tokens=BLOCK_TOKENS, turns=st.booleans())
def test_a_later_prompt_of_a_session_begins_with_all_full_blocks_of_the_earlier_ones(
    mix: Mix, seed: int, user: int, block_tokens: int, *, turns: bool
) -> None:
    """Ids are one for each full block, 64 bits, without repetition; a session's prompts are prefixes of each other."""
    last: Request | None = None
    for request in first(mix, seed, user, block_tokens, multi_turn=turns):
        ids = request.block_ids
        assert len(ids) == len(set(ids)) == request.prompt_tokens // block_tokens
        assert all(0 <= block_id < 1 << 64 for block_id in ids)
        if last is not None and last.session == request.session:
            assert turns
            assert request.turn == last.turn + 1
            assert request.prompt_tokens > last.prompt_tokens + last.output_tokens
            assert ids[: len(last.block_ids)] == last.block_ids
        else:
            assert request.turn == 0
            assert request.session == (0 if last is None else last.session + 1)
        last = request


@deterministic
@given(
    mix=MIXES,
    one=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    other=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    block_tokens=BLOCK_TOKENS,
)
def test_users_and_seeds_share_beginnings_and_nothing_else(
    mix: Mix, one: tuple[int, int], other: tuple[int, int], block_tokens: int
) -> None:
    """What two prompts of different users have in common is a run at their beginning, within what profiles share."""
    if one == other:
        return
    most = max(shared_tokens(name) for name in mix.weights)
    for mine in first(mix, *one, block_tokens):
        for theirs in first(mix, *other, block_tokens):
            pairs = zip(mine.block_ids, theirs.block_ids, strict=False)
            run = next((place for place, (left, right) in enumerate(pairs) if left != right), None)
            if run is None:
                run = min(len(mine.block_ids), len(theirs.block_ids))
            assert len(set(mine.block_ids) & set(theirs.block_ids)) == run
            assert run * block_tokens <= most


def shared_tokens(name: str) -> int:
    """The most tokens that sessions of a profile can share."""
    profile = PROFILES[name]
    documents = profile.documents
    return profile.system_prompt_tokens + (documents.per_request * documents.document_tokens.most if documents else 0)


@deterministic
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 1 << 62),
    block_tokens=st.sampled_from((1, 16, 256)),
    name=st.sampled_from(WORKLOADS),
)
def test_a_trace_keeps_its_lengths_and_its_sessions_are_chains(
    lengths: list[tuple[int, int]], seed: int, block_tokens: int, name: str
) -> None:
    """One answer for each request, in order; a turn begins with its session's last prompt, which is shorter.

    Blocks of different sessions are different behind the system prompt.
    """
    found = list(with_prefixes(iter(lengths), seed, block_tokens, PROFILES[name]))
    assert found == list(with_prefixes(lengths, seed, block_tokens, PROFILES[name]))
    last: dict[int, tuple[int, int, tuple[int, ...]]] = {}
    owners: dict[int, int] = {}
    for (input_tokens, output_tokens), (session, turn, ids) in zip(lengths, found, strict=True):
        assert len(ids) == len(set(ids)) == input_tokens // block_tokens
        if session in last:
            last_turn, context_tokens, last_ids = last[session]
            assert turn == last_turn + 1
            assert context_tokens < input_tokens
            assert ids[: len(last_ids)] == last_ids
        else:
            assert turn == 0
            assert session == len(last)
        last[session] = turn, input_tokens + output_tokens, ids
        for block_id in ids[PROFILES[name].system_prompt_tokens // block_tokens :]:
            assert owners.setdefault(block_id, session) == session
