"""The prefix index: cases worked by hand, and the published counts of the agentic conversations."""

import json
from pathlib import Path

import pytest

from mlpstorage.config import TouchOrder
from mlpstorage.kvcache.index import Findable, LruSet, in_touch_order, leading_run

AGENTIC = Path(__file__).resolve().parents[3] / "shared" / "traces" / "agentic"


def held(capacity_blocks: int | None, *block_ids: int) -> LruSet:
    """A set that holds the given ids, oldest first."""
    lru = LruSet(capacity_blocks)
    for block_id in block_ids:
        lru.insert(block_id)
    return lru


def eviction_order(lru: LruSet) -> list[int]:
    """The ids of a full set, in the order in which new ids push them out."""
    order: list[int] = []
    for new_id in range(1_000, 1_000 + len(lru)):
        evicted = lru.insert(new_id)
        assert evicted is not None
        order += evicted
    return order


def test_the_least_recently_used_id_leaves_first() -> None:
    """A full set evicts the oldest id for a new one; a touch or a second insert makes an id recent."""
    lru = held(3, 1, 2, 3)
    assert lru.touch(1)
    assert lru.insert(2) == []
    assert lru.insert(4) == [3]
    assert 3 not in lru
    assert len(lru) == 3
    assert eviction_order(lru) == [1, 2, 4]


def test_touching_an_absent_id_adds_nothing() -> None:
    """Only `insert` makes an id resident."""
    lru = held(2, 1)
    assert not lru.touch(9)
    assert (9 in lru, len(lru)) == (False, 1)


def test_a_set_without_limit_evicts_nothing() -> None:
    """A capacity of None holds all."""
    lru = LruSet(None)
    assert [lru.insert(block_id) for block_id in range(1_000)] == [[]] * 1_000
    assert len(lru) == 1_000


def test_a_capacity_of_zero_holds_nothing() -> None:
    """A tier that is switched off refuses every id."""
    lru = LruSet(0)
    assert lru.insert(1) is None
    assert (1 in lru, len(lru)) == (False, 0)


def test_a_pinned_id_is_passed_over() -> None:
    """What is being read or written stays; the next oldest leaves in its place."""
    lru = held(2, 1, 2)
    lru.pin(1)
    assert lru.insert(3) == [2]
    lru.unpin(1)
    assert lru.insert(4) == [1]


def test_where_nothing_can_be_pinned_a_pin_keeps_nothing() -> None:
    """Decisions at arrival hang on the order of requests alone: what is being read is evicted all the same."""
    lru = LruSet(2, pins=False)
    lru.insert(1)
    lru.pin(1)
    lru.pin(1)
    lru.insert(2)
    assert lru.insert(3) == [1]
    # None was counted, so that none is left.
    assert lru.unpin(1)
    assert lru.evict(2) == [2, 3]


def test_nothing_changes_where_all_is_pinned() -> None:
    """An insert that finds no room returns None, and neither the ids nor their order change."""
    lru = held(2, 1, 2)
    lru.pin(1)
    lru.pin(2)
    assert lru.insert(3) is None
    assert 3 not in lru
    assert lru.insert(1) == []  # resident already: that needs no room
    lru.unpin(1)
    lru.unpin(2)
    assert eviction_order(lru) == [2, 1]


def test_pins_are_counted() -> None:
    """Two readers of one block each hold it: it may leave when both are done."""
    lru = held(1, 1)
    lru.pin(1)
    lru.pin(1)
    lru.unpin(1)
    assert lru.insert(2) is None
    lru.unpin(1)
    assert lru.insert(2) == [1]


def test_a_discarded_id_and_its_pins_are_forgotten() -> None:
    """A block that could not be read is dropped at once; discarding an absent id is no error."""
    lru = held(1, 1)
    lru.pin(1)
    lru.discard(1)
    lru.discard(7)
    assert len(lru) == 0
    assert lru.insert(1) == []
    assert lru.insert(2) == [1]


def test_what_is_not_ready_is_held_and_not_found() -> None:
    """A tier's blocks but for those on their way: a view, which follows both."""
    lru, unready = held(None, 1, 2, 3), {2}
    findable = Findable(lru.ids, unready)
    assert (list(findable), len(findable), 2 in findable, 2 in lru) == ([1, 3], 2, False, True)
    unready.discard(2)
    lru.insert(4)
    lru.discard(1)
    assert (list(findable), len(findable)) == ([2, 3, 4], 3)
    assert leading_run([2, 3, 1, 4], [findable]) == 2


@pytest.mark.parametrize(
    ("resident", "run"),
    [
        ([{1, 2, 3}], 3),
        ([{1, 3}], 1),
        ([{2, 3}], 0),
        ([{1}, {2}, {3}], 3),
        ([{3}, {1}], 1),
        ([], 0),
    ],
)
def test_a_resident_block_behind_a_missing_one_is_useless(resident: list[set[int]], run: int) -> None:
    """The run ends at the first block that no tier holds; the blocks before it may lie in different tiers."""
    assert leading_run([1, 2, 3], resident) == run


def test_an_empty_chain_has_no_run() -> None:
    """A prompt shorter than a block has nothing to look up."""
    assert leading_run([], [{1}]) == 0


def test_tail_first_lets_the_head_of_a_chain_outlive_its_tail() -> None:
    """In a set of three, a fourth block costs the chain its tail, or, touched head first, its head and so all of it."""
    kept: dict[TouchOrder, int] = {}
    for order in TouchOrder:
        lru = held(3, *in_touch_order([1, 2, 3], order))
        lru.insert(9)
        kept[order] = leading_run([1, 2, 3], [lru])
    assert kept == {TouchOrder.TAIL: 2, TouchOrder.HEAD: 0}


def agentic_chains() -> list[list[int]]:
    """The requests of all conversations, started together and merged by time; ids made local to the file."""
    chains: list[tuple[float, list[int]]] = []

    def collect(number: int, requests: list[dict[str, object]], start_s: float) -> None:
        for request in requests:
            time_s = request["t"]
            assert isinstance(time_s, int | float)
            if request["type"] == "subagent":
                nested = request["requests"]
                assert isinstance(nested, list)
                collect(number, nested, start_s + time_s)
            else:
                ids = request["hash_ids"]
                assert isinstance(ids, list)
                chains.append((start_s + time_s, [(number << 32) + block_id for block_id in ids]))

    for number, path in enumerate(sorted(AGENTIC.glob("*.json"))):
        collect(number, json.loads(path.read_text())["requests"], 0.0)
    chains.sort(key=lambda chain: chain[0])
    return [ids for _, ids in chains]


@pytest.mark.skipif(not AGENTIC.is_dir(), reason=f"the agentic traces are not at {AGENTIC}")
@pytest.mark.parametrize(
    ("capacity_blocks", "order", "found"),
    [
        (None, TouchOrder.TAIL, 123_459),
        (1_000, TouchOrder.HEAD, 7_251),
        (1_000, TouchOrder.TAIL, 47_907),
    ],
)
def test_agentic_conversations_give_the_published_counts(
    capacity_blocks: int | None, order: TouchOrder, found: int
) -> None:
    """Ten coding-agent sessions at once: 122 requests, 138,281 blocks, and the known number found in each cache."""
    chains = agentic_chains()
    assert len(chains) == 122
    assert sum(map(len, chains)) == 138_281
    lru = LruSet(capacity_blocks)
    hits = 0
    for ids in chains:
        hits += leading_run(ids, [lru])
        for block_id in in_touch_order(ids, order):
            lru.insert(block_id)
    assert hits == found
    assert len(lru) == (capacity_blocks or 14_822)
