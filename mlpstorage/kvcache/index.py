"""Which blocks are resident where: least-recently-used sets of block ids, and the leading-run look-up over them."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from mlpstorage.config import TouchOrder


class LruSet:
    """Block ids in order of use, oldest first, at most `capacity_blocks` of them.

    A pinned id is resident but cannot be evicted: it is being read or written. Pins are counted.

    Args:
        capacity_blocks: Most ids that are held; None for no limit.
    """

    __slots__ = ("_order", "_pins", "capacity_blocks")

    def __init__(self, capacity_blocks: int | None = None) -> None:
        self.capacity_blocks = capacity_blocks
        self._order: OrderedDict[int, None] = OrderedDict()
        self._pins: dict[int, int] = {}

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

    def insert(self, block_id: int) -> list[int] | None:
        """Hold `block_id` as the most recent and return the ids evicted for it, oldest first.

        Returns None, and changes nothing, where no room can be made: a capacity of 0, or all else pinned.
        """
        if self.touch(block_id):
            return []
        evicted: list[int] = []
        if self.capacity_blocks is not None:
            excess = len(self._order) + 1 - self.capacity_blocks
            if excess > 0:
                for candidate in self._order:
                    if candidate not in self._pins:
                        evicted.append(candidate)
                        if len(evicted) == excess:
                            break
                if len(evicted) < excess:
                    return None
        for victim in evicted:
            del self._order[victim]
        self._order[block_id] = None
        return evicted

    def discard(self, block_id: int) -> None:
        """Forget `block_id`, pinned or not."""
        self._order.pop(block_id, None)
        self._pins.pop(block_id, None)

    def pin(self, block_id: int) -> None:
        """Keep `block_id` from eviction until `unpin`."""
        self._pins[block_id] = self._pins.get(block_id, 0) + 1

    def unpin(self, block_id: int) -> None:
        """Take back one `pin`."""
        left = self._pins.get(block_id, 0) - 1
        if left > 0:
            self._pins[block_id] = left
        else:
            self._pins.pop(block_id, None)


def leading_run(block_ids: Sequence[int], resident: Iterable[Collection[int] | LruSet]) -> int:
    """Length of the longest leading run of `block_ids` in which each is held by one of the `resident` sets.

    A resident block behind a missing one is useless: its keys and values depend on all tokens before it.
    """
    sets = tuple(resident)
    for position, block_id in enumerate(block_ids):
        if not any(block_id in held for held in sets):
            return position
    return len(block_ids)


def in_touch_order(block_ids: Sequence[int], order: TouchOrder) -> Iterable[int]:
    """The blocks of a request in the order in which they become recent.

    Tail first lets the head of a chain outlive its tail: an evicted tail costs itself, an evicted head the whole chain.
    """
    return reversed(block_ids) if order is TouchOrder.TAIL else block_ids
