"""The DRAM tier's memory: slots of one size in one anonymous mapping."""

from mlpstorage.storage.base import aligned_memory


class DramArena:
    """Slots for objects, taken and given back by one thread; any thread may use a slot that is taken.

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

    def view(self, slot: int) -> memoryview:
        """The memory of a slot, page-aligned where the slot size is a multiple of pages."""
        if self._memory is None:
            raise ValueError("the arena is closed")
        start = slot * self.slot_bytes
        return self._memory[start : start + self.slot_bytes]

    @property
    def touched_bytes(self) -> int:
        """Bytes of the slots that were ever in use, which is what the arena takes of physical memory at most."""
        return self._touched_slots * self.slot_bytes

    def close(self) -> None:
        """Let go of the memory; it goes back to the system as soon as no view of a slot is left."""
        self._memory = None
