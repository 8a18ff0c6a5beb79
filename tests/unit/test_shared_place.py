"""Joining a place that rank 0 holds: what the others are told, check and use."""

from pathlib import Path

import pytest

from mlpstorage.config import Layout
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache import shared_place
from mlpstorage.kvcache.cache import Found
from mlpstorage.kvcache.ranks import Alone
from mlpstorage.kvcache.shared_place import SharedPlace, join_place, part_of
from mlpstorage.plan.kvcache import sizes
from mlpstorage.results.models import Reuse
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.cache_dir import CacheDirectory
from mlpstorage.storage.claim import CacheFormat

FORMAT = CacheFormat(layout=Layout.FILE, namespaces=("tiny-1b|0|0",), object_bytes=4096, block_tokens=16, levels=(1, 1))
REUSE = Reuse(objects=7, bytes=7, damaged_objects=0, incomplete_blocks=0, foreign_entries=0, rebuild_s=0.5)


class ThirdOfThree(Alone):
    """Rank 2 of three."""

    rank = 2
    size = 3


def spec(cache_dir: Path) -> KVCacheSpec:
    """A spec whose ranks share a directory."""
    return KVCacheSpec(model="tiny-1b", cache_dir=cache_dir, num_processes=2, cache_scope="shared")


def test_who_joins_uses_the_place_and_holds_nothing(tmp_path: Path) -> None:
    """Its objects are those of the holder; giving it back, or clearing it, is the holder's."""
    holder = CacheDirectory.claim(tmp_path / "kv", "run-1", format=FORMAT)
    told = SharedPlace(objects="run-1", found=None, reused_bytes=12_345)
    place = join_place(spec(tmp_path / "kv"), sizes(spec(tmp_path)), "run-1", told)
    assert place.objects == holder.objects
    assert place.claim is not None
    assert (place.claim.place, place.claim.cleared, place.claim.reused) == (str(tmp_path / "kv"), None, False)
    assert place.removal is None
    (holder.objects / "x").write_text("an object")
    place.claim.run_begins()
    assert place.claim.remove_objects().files == 0
    place.claim.release()
    assert (holder.objects / "x").exists()
    (holder.objects / "x").unlink()
    holder.release()
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("other", [None, "run-2"])
def test_a_directory_that_is_not_the_same_is_refused(
    tmp_path: Path, other: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that sees no marker, or another run's, has a directory of its own under that name."""
    monkeypatch.setattr(shared_place, "_SEEN_WITHIN_S", 0.0)
    if other is not None:
        CacheDirectory.claim(tmp_path / "kv", other, format=FORMAT)
    told = SharedPlace(objects="run-1", found=None, reused_bytes=0)
    with pytest.raises(
        ConfigurationError, match="kv is not the place that rank 0 has claimed: give one that all hosts"
    ):
        join_place(spec(tmp_path / "kv"), sizes(spec(tmp_path)), "run-1", told)


def test_reused_blocks_are_dealt() -> None:
    """Each rank has every third, in their order; rank 0 alone reports them."""
    found = Found(blocks=(10, 11, 12, 13, 14, 15, 16), reuse=REUSE)
    assert part_of(found, ThirdOfThree()) == Found(blocks=(12, 15), reuse=None)
    assert part_of(found, Alone()) == found
    assert part_of(None, ThirdOfThree()) is None
