"""The arena of the DRAM tier."""

import resource
from pathlib import Path

import numpy as np
import pytest

from mlpstorage.storage.arena import DramArena

MIB = 1 << 20


def resident_bytes() -> int:
    """Physical memory of this process, as the kernel counts it."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def test_slots_run_out_and_come_back() -> None:
    """Each slot is handed out once; when all are out there is none; the one given back last comes first."""
    arena = DramArena(3, 4096)
    slots = [arena.allocate() for _ in range(3)]
    assert sorted(slot for slot in slots if slot is not None) == [0, 1, 2]
    assert arena.allocate() is None
    assert arena.used_slots == 3
    arena.free(2)
    arena.free(0)
    assert arena.used_slots == 1
    assert arena.allocate() == 0
    assert arena.allocate() == 2
    assert arena.allocate() is None


def test_no_more_slots_are_touched_than_were_in_use_at_once() -> None:
    """Slots that come back are used again before fresh ones."""
    arena = DramArena(100, 8192)
    for _ in range(50):
        slots = [arena.allocate() for _ in range(4)]
        for slot in slots:
            assert slot is not None
            arena.free(slot)
    assert arena.touched_bytes == 4 * 8192
    assert arena.used_slots == 0


def test_slots_do_not_overlap() -> None:
    """What is written to one slot shows in no other."""
    arena = DramArena(5, 1_124_352)
    for slot in range(5):
        assert arena.allocate() == slot
        assert arena.view(slot).nbytes == 1_124_352
        arena.view(slot)[:] = bytes([slot + 1]) * 1_124_352
    for slot in range(5):
        assert bytes(arena.view(slot)) == bytes([slot + 1]) * 1_124_352


def test_parts_of_a_slot_lie_one_after_the_other() -> None:
    """Equal parts of a slot cover it; the first begins where the slot does."""
    arena = DramArena(3, 4 * 8192)
    for slot in range(3):
        for part in range(4):
            view = arena.view(slot, part, 4)
            assert view.nbytes == 8192
            view[:] = bytes([10 * slot + part]) * 8192
    for slot in range(3):
        assert bytes(arena.view(slot)) == b"".join(bytes([10 * slot + part]) * 8192 for part in range(4))


@pytest.mark.parametrize("slot", [-1, 3])
def test_there_are_no_other_slots(slot: int) -> None:
    """A slot that is not there is an error, not some other memory."""
    with pytest.raises(IndexError, match=f"no slot {slot} "):
        DramArena(3, 4096).view(slot)


def test_memory_is_taken_as_it_is_used() -> None:
    """A gigabyte of slots costs nothing until written, then what was written, and nothing once closed."""
    before = resident_bytes()
    arena = DramArena(512, 2 * MIB)
    assert resident_bytes() - before < 16 * MIB
    for _ in range(32):
        slot = arena.allocate()
        assert slot is not None
        np.frombuffer(arena.view(slot), np.uint8).fill(7)
    used = resident_bytes() - before
    assert arena.touched_bytes == 64 * MIB
    assert used + MIB >= 64 * MIB
    assert used < 80 * MIB
    arena.close()
    assert resident_bytes() - before < 16 * MIB


def test_closed_arena_has_no_slots_to_view() -> None:
    """Viewing a slot after the end is an error; closing twice is not."""
    arena = DramArena(1, 4096)
    arena.close()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.view(0)


def test_arena_without_slots() -> None:
    """A tier of no capacity has no slot."""
    arena = DramArena(0, 4096)
    assert arena.allocate() is None
    assert arena.touched_bytes == 0
    arena.close()
