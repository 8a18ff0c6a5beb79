"""The prefix index against a brute-force model, over random operations and chains."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import TouchOrder
from mlpstorage.kvcache.index import LruSet, in_touch_order, leading_run

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=300)

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["insert", "touch", "discard", "pin", "unpin", "evict"]), st.integers(0, 7)), max_size=60
)
SPARED = 3
CAPACITIES = st.none() | st.integers(0, 6)


class ListModel:
    """The same contract on a plain list, oldest first, with every step written out."""

    def __init__(self, capacity: int | None, *, can_pin: bool = True) -> None:
        self.capacity = capacity
        self.can_pin = can_pin
        self.order: list[int] = []
        self.pins: list[int] = []

    def insert(self, block_id: int) -> list[int] | None:
        """Evict one by one until there is room, and put all back where there is none."""
        if self.touch(block_id):
            return []
        before = list(self.order)
        evicted: list[int] = []
        while self.capacity is not None and len(self.order) >= self.capacity:
            loose = [held for held in self.order if held not in self.pins]
            if not loose:
                self.order = before
                return None
            self.order.remove(loose[0])
            evicted.append(loose[0])
        self.order.append(block_id)
        return evicted

    def touch(self, block_id: int) -> bool:
        """Move to the end."""
        if block_id not in self.order:
            return False
        self.order.remove(block_id)
        self.order.append(block_id)
        return True

    def discard(self, block_id: int) -> None:
        """Remove the id and all its pins."""
        self.order = [held for held in self.order if held != block_id]
        self.pins = [pinned for pinned in self.pins if pinned != block_id]

    def pin(self, block_id: int) -> None:
        """One pin more, where there can be any."""
        if self.can_pin:
            self.pins.append(block_id)

    def unpin(self, block_id: int) -> bool:
        """One pin less, where there is one; whether none is left."""
        if block_id in self.pins:
            self.pins.remove(block_id)
        return block_id not in self.pins

    def evict(self, count: int) -> list[int]:
        """Remove the oldest that are not pinned, spare number 3."""
        evicted = [held for held in self.order if held not in self.pins and held != SPARED][:count]
        self.order = [held for held in self.order if held not in evicted]
        return evicted


@deterministic
@given(capacity=CAPACITIES, operations=OPERATIONS, pins=st.booleans())
def test_every_operation_agrees_with_the_list_model(
    capacity: int | None, operations: list[tuple[str, int]], *, pins: bool
) -> None:
    """Answers, evicted ids and their order, and what is held afterwards are those of the model, pins included."""
    lru, model = LruSet(capacity, pins=pins), ListModel(capacity, can_pin=pins)
    for name, block_id in operations:
        told = lru.evict(block_id, {SPARED}) if name == "evict" else getattr(lru, name)(block_id)
        assert told == getattr(model, name)(block_id)
        assert [held for held in range(8) if held in lru] == sorted(model.order)
        assert len(lru) == len(model.order)
        assert capacity is None or len(lru) <= capacity


@deterministic
@given(
    capacity=CAPACITIES,
    order=st.sampled_from(TouchOrder),
    chains=st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=20),
)
def test_a_replay_of_chains_finds_what_the_list_model_finds(
    capacity: int | None, order: TouchOrder, chains: list[list[int]]
) -> None:
    """Request after request, look-up before insertion: the blocks found agree, whatever the capacity and the order."""
    lru, model = LruSet(capacity), ListModel(capacity)
    for chain in chains:
        expected = next((place for place, block_id in enumerate(chain) if block_id not in model.order), len(chain))
        assert leading_run(chain, [lru]) == expected
        steps = chain[::-1] if order is TouchOrder.TAIL else chain
        assert list(in_touch_order(chain, order)) == steps
        for block_id in steps:
            assert lru.insert(block_id) == model.insert(block_id)


@deterministic
@given(
    chain=st.lists(st.integers(0, 12), max_size=12),
    tiers=st.lists(st.frozensets(st.integers(0, 12)), max_size=4),
)
def test_the_leading_run_is_the_longest_prefix_within_the_union(chain: list[int], tiers: list[frozenset[int]]) -> None:
    """Every block of the run is in some tier, and the block after it is in none."""
    run = leading_run(chain, tiers)
    union = frozenset[int]().union(*tiers)
    assert set(chain[:run]) <= union
    assert run == len(chain) or chain[run] not in union
