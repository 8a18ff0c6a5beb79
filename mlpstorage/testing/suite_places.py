"""The conformance suite of block stores, third part: what is left in a place by others, and after a crash."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.base import BlockStore, Listing, aligned_memory
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.testing.content import difference, make_content
from mlpstorage.testing.suite_child import StoreProcess
from mlpstorage.testing.suite_hooks import (
    OBJECTS,
    OpenStore,
    StoreHooks,
    assert_gone,
    assert_holds,
    assert_unseen,
    requires,
    write,
)

OTHER_NAMESPACES = ("another model|0|full", "another model|1|full")


class PlaceTests(StoreHooks):
    """Reopening, listing, sharing, foreign things, and processes that are killed."""

    def test_listing_of_an_open_store(self, store: BlockStore, keys: ObjectKeys) -> None:
        """A listing has every object once, and nothing else."""
        write(store, keys, [3, 1, 2])
        write(store, keys, [1], 1)
        store.delete(2)
        found = store.listing()
        assert sorted(found.object_ids) == [1, 3]
        assert (found.damaged, found.foreign) == (0, 0)

    def test_reopened(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """`lasting` says whether a new store on the place finds what an earlier one left."""
        first = open_store()
        write(first, keys, [1, 2, 3])
        first.delete(2)
        first.close()
        second = open_store()
        found = second.listing()
        lasting = second.capabilities.lasting
        assert sorted(found.object_ids) == ([1, 3] if lasting else [])
        assert (found.damaged, found.foreign) == (0, 0)
        assert_gone(second, [2] if lasting else [1, 2, 3])
        assert_holds(second, keys, found.object_ids)
        write(second, keys, range(OBJECTS - 2), 1)
        assert_holds(second, keys, range(OBJECTS - 2), 1)

    def test_room_after_reopening(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """What is found takes its room and no more than that: the rest can be filled, without harm to what is there."""
        first = open_store(objects=6)
        requires(first.capabilities, "lasting")
        write(first, keys, [1, 2, 3])
        first.delete(1)
        first.close()
        second = open_store(objects=6)
        second.listing()
        write(second, keys, [4, 5, 6, 7])
        assert_holds(second, keys, [2, 3, 4, 5, 6, 7])

    @pytest.mark.parametrize("left_bytes", [0, 1, 8192, 5 * 4096 - 1])
    def test_listing_leaves_out_what_is_truncated(
        self, open_store: OpenStore, raw: StoreHooks, keys: ObjectKeys, place: Path, left_bytes: int
    ) -> None:
        """A truncated object is counted as damaged, once, and is removed."""
        first = open_store()
        requires(first.capabilities, "lasting")
        write(first, keys, [1, 2])
        first.close()
        raw.raw_truncate(place, keys, 2, make_content(keys, 2, first.stored_bytes), left_bytes)
        self._assert_damaged(open_store, keys, left_bytes)

    @pytest.mark.parametrize("pages", [(0,), (4,), (0, 1, 2, 3, 4)], ids=["first", "last", "all"])
    def test_listing_leaves_out_what_lost_its_stamps(
        self, open_store: OpenStore, raw: StoreHooks, keys: ObjectKeys, place: Path, pages: Iterable[int]
    ) -> None:
        """An object whose first or last page is not its own (torn, or never written) is damaged, and is removed."""
        first = open_store()
        requires(first.capabilities, "lasting")
        if not self.lists_by_stamps:
            pytest.skip("the store's writes come to pass whole or not at all: its listing looks at sizes alone")
        write(first, keys, [1, 2])
        first.close()
        content = make_content(keys, 2, first.stored_bytes)
        changed = bytearray(content)
        for page in pages:
            changed[page * 4096 : (page + 1) * 4096] = bytes(4096)
        raw.raw_replace(place, keys, 2, content, bytes(changed))
        self._assert_damaged(open_store, keys, 1)

    def _assert_damaged(self, open_store: OpenStore, keys: ObjectKeys, left_bytes: int) -> None:
        """Object 1 is whole, object 2 is not; where nothing is left of it, nobody may know that it was there."""
        second = open_store()
        found = second.listing()
        assert found.object_ids == (1,)
        assert found.damaged == 1 or (found.damaged == 0 and not left_bytes)
        assert found.foreign == 0
        assert_gone(second, [2])
        assert second.listing() == Listing(object_ids=(1,), damaged=0, foreign=0)
        write(second, keys, [2], 1)
        assert_holds(second, keys, [1])
        assert_holds(second, keys, [2], 1)

    def test_foreign_things_are_left_alone(
        self, open_store: OpenStore, raw: StoreHooks, keys: ObjectKeys, place: Path
    ) -> None:
        """What is not the store's is counted by a listing and stays where it is."""
        first = open_store()
        requires(first.capabilities, "lasting")
        write(first, keys, [1])
        before = raw.raw_things(place)
        foreign = raw.raw_add_foreign(place)
        assert sorted(before + foreign) == raw.raw_things(place)
        first.close()
        second = open_store()
        assert second.listing() == Listing(object_ids=(1,), damaged=0, foreign=len(foreign))
        write(second, keys, [2])
        second.delete(2)
        assert set(foreign) <= set(raw.raw_things(place))

    def test_two_namespaces(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """Stores of two models may share a place: equal ids are different objects, and each lists its own."""
        first = open_store()
        requires(first.capabilities, "shared")
        other_keys = ObjectKeys(*OTHER_NAMESPACES)
        second = open_store(keys=other_keys)
        write(first, keys, [1, 2])
        write(second, other_keys, [1, 3])
        assert_holds(first, keys, [1, 2])
        assert_holds(second, other_keys, [1, 3])
        assert_gone(first, [3])
        for store, ids in ((first, [1, 2]), (second, [1, 3])):
            found = store.listing()
            assert sorted(found.object_ids) == ids
            assert (found.damaged, found.foreign) == (0, 2)
        first.delete(1)
        assert_holds(second, other_keys, [1, 3])

    def test_other_namespace_finds_nothing(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """A store of another model that comes later finds none of the first one's objects, and harms none."""
        first = open_store()
        requires(first.capabilities, "lasting")
        write(first, keys, [1, 2])
        first.close()
        other_keys = ObjectKeys(*OTHER_NAMESPACES)
        try:
            second = open_store(keys=other_keys)
        except (OSError, ConfigurationError):
            pass  # a store for one model refuses the place of another
        else:
            found = second.listing()
            assert found.object_ids == ()
            assert found.damaged == 0
            assert_gone(second, [1, 2])
            second.close()
        third = open_store()
        assert sorted(third.listing().object_ids) == [1, 2]
        assert_holds(third, keys, [1, 2])

    def test_shared_between_stores(self, open_store: OpenStore, keys: ObjectKeys) -> None:
        """`shared` says that two stores on a place see each other's objects, replacements and deletes at once."""
        first = open_store()
        requires(first.capabilities, "shared")
        second = open_store()
        write(first, keys, [1, 2])
        assert second.exists([1, 2, 3]) == [True, True, False]
        assert_holds(second, keys, [1, 2])
        write(second, keys, [1], 1)
        assert_holds(first, keys, [1], 1)
        second.delete(2)
        # What deleting it once more says is left open: a store may have to take its own word for what is there.
        assert_unseen(first, [2])
        assert second.listing().object_ids == first.listing().object_ids == (1,)

    def test_shared_between_processes(self, open_store: OpenStore, process: StoreProcess, keys: ObjectKeys) -> None:
        """What another process writes is seen here whole, and not before it is."""
        store = open_store()
        requires(store.capabilities, "shared")
        process.open()
        assert_gone(store, [1, 2])
        process.write([1, 2])
        assert_holds(store, keys, [1, 2])
        if store.capabilities.descriptors:
            process.ask("half", 3, 0)
            assert_gone(store, [3])

    def test_processes_share_their_objects(
        self, open_store: OpenStore, process: StoreProcess, keys: ObjectKeys
    ) -> None:
        """Either process finds, reads and replaces what the other has written."""
        store = open_store()
        requires(store.capabilities, "shared")
        process.open()
        process.write([1, 2])
        write(store, keys, [3, 4])
        assert store.exists([1, 2, 3, 4, 5]) == process.exists([1, 2, 3, 4, 5]) == [True, True, True, True, False]
        assert_holds(store, keys, [1, 2])
        assert process.problems([3, 4]) == [None, None]
        process.write([3], 1)
        write(store, keys, [1], 1)
        assert_holds(store, keys, [3], 1)
        assert process.problems([1], 1) == [None]

    def test_deleted_by_another_process(self, open_store: OpenStore, process: StoreProcess, keys: ObjectKeys) -> None:
        """What the other process deletes is gone here, whoever wrote it, and can be written again."""
        store = open_store()
        requires(store.capabilities, "shared")
        process.open()
        process.write([1, 2])
        write(store, keys, [3, 4])
        assert_holds(store, keys, [1])
        process.delete([1, 3])
        assert_unseen(store, [1, 3])
        with pytest.raises(FileNotFoundError):
            store.delete(1)
        store.delete(2)
        assert process.problems([2, 4]) == ["it is not there", None]
        assert sorted(store.listing().object_ids) == [4]
        write(store, keys, [1, 3], 2)
        assert process.problems([1, 3], 2) == [None, None]

    def test_written_by_two_processes_at_once(
        self, open_store: OpenStore, process: StoreProcess, keys: ObjectKeys
    ) -> None:
        """Reads meanwhile and at the end get the whole object of one of them; nothing is left over."""
        store = open_store()
        requires(store.capabilities, "shared", "holds_data")
        process.open()
        write(store, keys, [1], 2)
        process.tell("write", [1] * self.rounds, 1)
        for _ in range(self.rounds):
            write(store, keys, [1], 2)
            _assert_one_of(store, keys, 1, [1, 2])
            assert process.answer() == 1
        _assert_one_of(store, keys, 1, [1, 2])
        found = store.listing()
        assert (found.object_ids, found.damaged, found.foreign) == ((1,), 0, 0)

    def test_killed_in_the_middle_of_a_write(
        self, open_store: OpenStore, process: StoreProcess, keys: ObjectKeys, place: Path
    ) -> None:
        """A process that dies with half an object written leaves its whole objects, and nothing of that one."""
        requires(process.open(), "lasting", "descriptors")
        process.write([1, 2])
        things = self.raw_things(place)
        assert process.ask("half", 3, 0)
        process.kill()
        store = open_store()
        found = store.listing()
        assert sorted(found.object_ids) == [1, 2]
        assert found.damaged <= 1
        assert found.foreign == 0
        assert_holds(store, keys, [1, 2])
        assert_gone(store, [3])
        assert self.raw_things(place) == things
        assert sorted(store.listing().object_ids) == [1, 2]
        assert store.listing().damaged == 0
        write(store, keys, [3], 1)
        assert_holds(store, keys, [3], 1)

    def test_killed_while_it_replaces_an_object(
        self, open_store: OpenStore, process: StoreProcess, keys: ObjectKeys
    ) -> None:
        """A process that dies while it replaces an object leaves the old version of it, or none."""
        requires(process.open(), "lasting", "descriptors")
        process.write([1, 2])
        assert process.ask("half", 2, 1)
        process.kill()
        store = open_store()
        found = store.listing()
        assert sorted(found.object_ids) in ([1, 2], [1])
        assert_holds(store, keys, found.object_ids)

    @pytest.mark.parametrize("answers", [1, 4, 11])
    def test_killed_while_it_writes(
        self, open_store: OpenStore, process: StoreProcess, keys: ObjectKeys, answers: int
    ) -> None:
        """Of a process that is killed while it writes all is found that it had reported, and only whole objects.

        It writes objects 0 to 7 and then replaces them, again and again; whatever is listed must be of the version that
        was reported last, or of the one that was being written.
        """
        requires(process.open(), "lasting")
        for version in range(20):
            process.tell("write", list(range(8)), version)
        reported = [process.answer() for _ in range(answers)]
        reported += process.kill()
        counts = [reported.count(object_id) for object_id in range(8)]
        in_flight = len(reported) % 8
        store = open_store()
        found = store.listing()
        must = {object_id for object_id in range(8) if counts[object_id] and object_id != in_flight}
        assert must <= set(found.object_ids) <= must | {in_flight}
        assert len(found.object_ids) == len(set(found.object_ids))
        assert found.damaged <= 1
        assert found.foreign == 0
        for object_id in found.object_ids:
            versions = [counts[object_id] - 1] if counts[object_id] else []
            if object_id == in_flight:
                versions.append(counts[object_id])
            _assert_one_of(store, keys, object_id, versions)
        again = store.listing()
        assert sorted(again.object_ids) == sorted(found.object_ids)
        assert again.damaged == 0
        write(store, keys, range(OBJECTS - 2), 100)
        assert_holds(store, keys, range(OBJECTS - 2), 100)


def _assert_one_of(store: BlockStore, keys: ObjectKeys, object_id: int, versions: Iterable[int]) -> None:
    """An object is whole and one of some versions."""
    memory = aligned_memory(store.stored_bytes)
    store.read(object_id, memory)
    contents = [make_content(keys, object_id, store.stored_bytes, version) for version in versions]
    assert bytes(memory) in contents, f"object {object_id}: {difference(memory, contents[0])}"
