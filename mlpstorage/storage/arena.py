"""The DRAM tier's memory: slots of one size in one anonymous mapping."""

from mlpstorage.storage.base import aligned_memory


class DramArena:
    """Slots for blocks, taken and given back by one thread; any thread may use a slot that is taken.

    A block of several objects (one a kv rank) has them one after the other in its slot.

    The mapping costs address space only: physical memory is taken as slots are first written. A slot given back last
    is handed out first, so that no more memory is touched than was ever in use at once.
    """

    __slots__ = ("_free", "_memory", "_touched_slots", "slot_bytes", "slots", "used_slots")

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.used_slots = 0
        self._free: list[int] = []
        self._touched_slots = 0
        self._memory: memoryview | None = aligned_memory(slots * slot_bytes) if slots * slot_bytes else None

    def allocate(self) -> int | None:
        """Take a slot; None if all are in use."""
        if self._free:
            slot = self._free.pop()
        elif self._touched_slots < self.slots:
            slot = self._touched_slots
            self._touched_slots += 1
        else:
            return None
        self.used_slots += 1
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)
        self.used_slots -= 1

    def view(self, slot: int, part: int = 0, parts: int = 1) -> memoryview:
        """The memory of a slot, or of one of the equal parts of it; page-aligned where a part is full pages.

        Raises:
            IndexError: There is no such slot.
            ValueError: The arena is closed.
        """
        if self._memory is None:
            raise ValueError("the arena is closed")
        if not 0 <= slot < self.slots:
            raise IndexError(f"there is no slot {slot} in an arena of {self.slots}")
        part_bytes = self.slot_bytes // parts
        start = slot * self.slot_bytes + part * part_bytes
        return self._memory[start : start + part_bytes]

    @property
    def touched_bytes(self) -> int:
        """Bytes of the slots that were ever in use, which is what the arena takes of physical memory at most."""
        return self._touched_slots * self.slot_bytes

    def close(self) -> None:
        """Let go of the memory; it goes back to the system as soon as no view of a slot is left."""
        self._memory = None
