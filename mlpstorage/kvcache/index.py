"""Which blocks are resident where: least-recently-used sets of block ids, and the leading-run look-up over them."""

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, KeysView, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from mlpstorage.config import TouchOrder


class LruSet:
    """Block ids in order of use, oldest first, at most `capacity_blocks` of them.

    A pinned id is resident but cannot be evicted: it is being read or written. Pins are counted.

    Args:
        capacity_blocks: Most ids that are held; None for no limit.
        pins: Whether anything can be pinned; if not, `pin` does nothing.

    Attributes:
        ids: The ids, oldest first: a view, which is faster to ask than the set itself.
    """

    __slots__ = ("_can_pin", "_order", "_pins", "capacity_blocks", "ids")

    def __init__(self, capacity_blocks: int | None = None, *, pins: bool = True) -> None:
        self.capacity_blocks = capacity_blocks
        self._can_pin = pins
        self._order: OrderedDict[int, None] = OrderedDict()
        self._pins: dict[int, int] = {}
        self.ids: KeysView[int] = self._order.keys()

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._order

    def __len__(self) -> int:
        return len(self._order)

    def touch(self, block_id: int) -> bool:
        """Make `block_id` the most recent; False where it is not held."""
        if block_id not in self._order:
            return False
        self._order.move_to_end(block_id)
        return True

    def touch_all(self, block_ids: Iterable[int]) -> None:
        """Make those of these that are held recent, in this order."""
        order = self._order
        for block_id in block_ids:
            if block_id in order:
                order.move_to_end(block_id)

    def insert(self, block_id: int) -> list[int] | None:
        """Hold `block_id` as the most recent and return the ids evicted for it, oldest first.

        Returns None, and changes nothing, where no room can be made: a capacity of 0, or all else pinned.
        """
        order = self._order
        if block_id in order:
            order.move_to_end(block_id)
            return []
        evicted: list[int] = []
        if self.capacity_blocks is not None:
            excess = len(order) + 1 - self.capacity_blocks
            if excess > 0:
                evicted = self._oldest(excess, ()) if order else []
                if len(evicted) < excess:
                    return None
        for victim in evicted:
            del order[victim]
        order[block_id] = None
        return evicted

    def evict(self, count: int, spared: Container[int] = ()) -> list[int]:
        """Forget the `count` oldest ids that are neither pinned nor `spared`, or all there are; returns them."""
        evicted = self._oldest(count, spared)
        for victim in evicted:
            del self._order[victim]
        return evicted

    def discard(self, block_id: int) -> None:
        """Forget `block_id`, pinned or not."""
        self._order.pop(block_id, None)
        self._pins.pop(block_id, None)

    def pin(self, block_id: int) -> None:
        """Keep `block_id` from eviction until `unpin`."""
        if self._can_pin:
            self._pins[block_id] = self._pins.get(block_id, 0) + 1

    def unpin(self, block_id: int) -> bool:
        """Take back one `pin`; returns whether none is left."""
        left = self._pins.get(block_id, 0) - 1
        if left > 0:
            self._pins[block_id] = left
            return False
        self._pins.pop(block_id, None)
        return True

    def _oldest(self, count: int, spared: Container[int]) -> list[int]:
        oldest: list[int] = []
        if count > 0:
            pins = self._pins
            for candidate in self._order:
                if candidate not in pins and candidate not in spared:
                    oldest.append(candidate)
                    if len(oldest) == count:
                        break
        return oldest


class Findable:
    """The blocks of a tier that a look-up finds: all but a few. A set of them all would cost 34 bytes a block more.

    Args:
        ids: The tier's blocks.
        unready: Those of them that are not found.
    """

    __slots__ = ("_ids", "_unready")

    def __init__(self, ids: KeysView[int], unready: AbstractSet[int]) -> None:
        self._ids = ids
        self._unready = unready

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._ids and block_id not in self._unready

    def __len__(self) -> int:
        return len(self._ids) - len(self._unready)

    def __iter__(self) -> Iterator[int]:
        return (block_id for block_id in self._ids if block_id not in self._unready)


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of ids offered to a tier: those new in it, those thrown out for them, those it could not take."""

    admitted: list[int]
    evicted: list[int]
    refused: list[int]


def admit(tier: LruSet, block_ids: Iterable[int]) -> Admission:
    """Touch or insert each id in turn and return the net effect.

    An id that is inserted and evicted again for a later one counts as refused: nothing was moved for it yet. One that
    is evicted and inserted again has stayed.
    """
    if tier.capacity_blocks == 0:
        return Admission([], [], list(block_ids))
    fresh: dict[int, None] = {}
    evicted: dict[int, None] = {}
    refused: list[int] = []
    for block_id in block_ids:
        held = block_id in tier.ids
        victims = tier.insert(block_id)
        if victims is None:
            refused.append(block_id)
            continue
        if block_id in evicted:
            del evicted[block_id]
        elif not held:
            fresh[block_id] = None
        for victim in victims:
            if victim in fresh:
                del fresh[victim]
                refused.append(victim)
            else:
                evicted[victim] = None
    return Admission(list(fresh), list(evicted), refused)


def leading_run(block_ids: Sequence[int], resident: Iterable[Container[int]]) -> int:
    """Length of the longest leading run of `block_ids` in which each is held by one of the `resident` sets.

    A resident block behind a missing one is useless: its keys and values depend on all tokens before it.
    """
    sets = tuple(resident)
    for position, block_id in enumerate(block_ids):
        for held in sets:
            if block_id in held:
                break
        else:
            return position
    return len(block_ids)


def in_touch_order(block_ids: Sequence[int], order: TouchOrder) -> Iterable[int]:
    """The blocks of a request in the order in which they become recent.

    Tail first lets the head of a chain outlive its tail: an evicted tail costs itself, an evicted head the whole chain.
    """
    return reversed(block_ids) if order is TouchOrder.TAIL else block_ids
