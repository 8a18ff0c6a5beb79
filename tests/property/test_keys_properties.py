"""Keys for any ids: nothing is lost on the way to a key and back, and no two objects share a stamp."""

from hypothesis import given
from hypothesis import strategies as st

from mlpstorage.storage.keys import ObjectKeys

block_ids = st.integers(0, 2**64 - 1)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8, unique=True), block_ids, st.data())
def test_key_leads_back_to_its_object(namespaces: list[str], block_id: int, data: st.DataObject) -> None:
    """Every key of every kv rank is turned back into the object's id."""
    keys = ObjectKeys(*namespaces)
    object_id = block_id * len(namespaces) + data.draw(st.integers(0, len(namespaces) - 1))
    assert object_id in keys.block_objects(block_id)
    assert keys.object_id(keys.key(object_id)) == object_id
    assert keys.key(object_id).hex() == keys.name(object_id)


@given(st.sets(block_ids, min_size=2, max_size=50))
def test_stamps_of_a_namespace_are_all_different(some: set[int]) -> None:
    """Different blocks have different stamps, and every stamp fits into a word."""
    keys = ObjectKeys("tiny-1b|0|full")
    stamps = {keys.stamp(block_id) for block_id in some}
    assert len(stamps) == len(some)
    assert all(0 <= stamp < 2**64 for stamp in stamps)
