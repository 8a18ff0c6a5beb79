"""A place that all ranks of a run share: rank 0 holds it for the run, the others join, and rank 0 clears it away.

What an earlier run has left there rank 0 lists, before anybody else opens the place, and deals out: each rank makes
room for new blocks among its part of it, and finds the others' parts by looking.
"""

import contextlib
import errno
import time
from dataclasses import dataclass, replace

from mlpstorage.cluster.facts import limited_space
from mlpstorage.errors import AccessError, ConfigurationError, MLPStorageError
from mlpstorage.kvcache.cache import Found, Place, claim_place, find_blocks, make_store, object_keys
from mlpstorage.kvcache.process import Signals
from mlpstorage.kvcache.ranks import Alone, Ranks
from mlpstorage.plan.kvcache import Sizes, sizes
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.claim import Removed
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.marker import read_marker

_SEEN_WITHIN_S = 5.0
_LOOK_EVERY_S = 0.1
"""How long, and how often, a rank looks for rank 0's marker: a network file system shows new names with some delay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPlace:
    """What rank 0 tells the others of the place that it holds.

    Attributes:
        objects: Name of the objects' directory or prefix below the cache directory.
        found: What an earlier run has left there; None where nothing is reused.
        reused_bytes: Room that this takes.
    """

    objects: str
    found: Found | None
    reused_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A claim that rank 0 holds, and acts upon, for all ranks; a `storage.claim.Claim`."""

    place: str
    cleared: Removed | None = None
    reused: bool = False

    def run_begins(self) -> None:
        """Nothing to do here."""

    def remove_objects(self) -> Removed:
        """Nothing to do here."""
        return Removed(run_id="", files=0, bytes=0)

    def release(self) -> None:
        """Nothing to do here."""


def share_place(
    spec: KVCacheSpec, run_id: str, ranks: Ranks, held: contextlib.ExitStack, signals: Signals
) -> tuple[Place | SharedPlace | None, MLPStorageError | None]:
    """Have rank 0 take the place that all share, and tell the others of it; None where it could not, or none is shared.

    `held` clears it away, once no rank uses it any more.
    """
    if not spec.shares_cache:
        return None, None
    place: Place | None = None
    error: MLPStorageError | None = None
    try:
        if ranks.rank == 0:
            place = hold_place(spec, sizes(spec), run_id, held)
        signals.preparing = False
    except MLPStorageError as caught:
        signals.preparing = False
        error = caught
    except OSError as caught:
        signals.preparing = False
        error = as_refusal(caught)
    # A rank that fails by a fault of the program ends all others, and waits for none.
    held.push(lambda kind, *_: None if kind else ranks.barrier())
    told = ranks.allgather(None if place is None else told_of(place))[0]
    if told is None:
        return None, error
    try:
        signals.resume()
    except MLPStorageError as caught:
        return None, caught
    return (place or told), None


def as_refusal(error: OSError) -> MLPStorageError:
    """The system's error as the user's."""
    kind = AccessError if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS} else ConfigurationError
    where = f"{error.filename}: " if error.filename else ""
    return kind(f"{where}{error.strerror or error}; choose a place that can be used with --cache-dir")


def hold_place(spec: KVCacheSpec, planned: Sizes, run_id: str, cleanup: contextlib.ExitStack) -> Place:
    """Take the place for all ranks, and list what is to be reused; `cleanup` clears it away and gives it back.

    Raises:
        MLPStorageError: See `claim_place`.
        OSError: What is there cannot be listed.
    """
    place = claim_place(spec, planned, run_id, Alone(), cleanup)
    assert place.claim is not None, "layouts that can be shared have a place"
    if not place.claim.reused:
        return place
    store = make_store(spec, planned, place)
    store.open()
    try:
        return replace(place, found=find_blocks(store, place.keys))
    finally:
        store.close()


def told_of(place: Place) -> SharedPlace:
    """What the other ranks must know of a place."""
    objects = place.objects
    assert objects is not None, "layouts that can be shared have a place"
    name = objects.prefix.rpartition("/")[2] if isinstance(objects, S3Location) else objects.name
    return SharedPlace(objects=name, found=place.found, reused_bytes=place.reused_bytes)


def join_place(spec: KVCacheSpec, planned: Sizes, run_id: str, shared: SharedPlace) -> Place:
    """The place that rank 0 holds, as another rank uses it.

    Raises:
        AccessError: It may not be read.
        ConfigurationError: What this rank sees there is not what rank 0 holds.
    """
    where = spec.cache_dir
    assert where is not None, "rank 0 holds it"
    until_s = time.monotonic() + _SEEN_WITHIN_S
    while _run_there(spec) != run_id:
        if time.monotonic() > until_s:
            raise ConfigurationError(
                f"--cache-scope shared: {where} is not the place that rank 0 has claimed: give one that all hosts "
                "share with --cache-dir, or use --cache-scope private"
            )
        time.sleep(_LOOK_EVERY_S)
    keys = object_keys(spec, planned.kv_ranks)
    joined = Joined(place=str(where))
    if isinstance(where, S3Location):
        return Place(claim=joined, removal=None, objects=where / shared.objects, keys=keys, space=None)
    where = where.resolve()
    space = limited_space(where)
    if space is not None:
        space = replace(space, free_bytes=space.free_bytes + shared.reused_bytes)
    return Place(claim=joined, removal=None, objects=where / shared.objects, keys=keys, space=space)


def part_of(found: Found | None, ranks: Ranks) -> Found | None:
    """The part of the reused blocks that a rank makes room among; rank 0 reports for all of them."""
    if found is None:
        return None
    return Found(blocks=found.blocks[ranks.rank :: ranks.size], reuse=found.reuse if ranks.rank == 0 else None)


def _run_there(spec: KVCacheSpec) -> str | None:
    """The run that holds the cache directory, as far as this host sees."""
    where = spec.cache_dir
    if isinstance(where, S3Location):
        from mlpstorage.storage.object_client import connect, told  # noqa: PLC0415 - obstore is an optional package
        from mlpstorage.storage.object_marker import read_prefix_marker  # noqa: PLC0415 - likewise

        with told(where):
            prefix_marker, _ = read_prefix_marker(connect(where.bucket), where)
        return None if prefix_marker is None else prefix_marker.run_id
    assert where is not None, "rank 0 holds it"
    marker = read_marker(where)
    return None if marker is None else marker.run_id
