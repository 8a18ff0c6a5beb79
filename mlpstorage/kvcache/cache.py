"""A rank's cache on storage: whose place it is, the store in it, and what an earlier run left there."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from mlpstorage.cluster.facts import FileSystemSpace, limited_space
from mlpstorage.config import GIB, IoEngineName, Layout, Verify
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.ranks import Ranks
from mlpstorage.plan.kvcache import Sizes, cache_place
from mlpstorage.results.models import Reuse
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.affinity import SharedCpu
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.cache_dir import CacheDirectory
from mlpstorage.storage.claim import CacheFormat, Claim
from mlpstorage.storage.descriptor import DescriptorStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.ops import IoEngine
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.removal import object_room


class Removal:
    """Whether the objects of a claim are removed when it is given back.

    Until the run begins only what the claim itself began may go: a run that is refused deletes no cache that an earlier
    one has kept, and leaves none of its own.
    """

    __slots__ = ("_claim", "_wanted")

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._wanted = not claim.reused

    def run_begins(self, *, keep: bool) -> None:
        """From here on the objects are the run's, to keep or to remove."""
        self._claim.run_begins()
        self._wanted = not keep

    def __call__(self) -> None:
        """Remove the objects, where that is wanted."""
        if self._wanted:
            self._claim.remove_objects()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an earlier run left: the blocks that are whole, the least recently written first.

    `reuse` is what is reported of it; of a place that ranks share None for all but rank 0.
    """

    blocks: tuple[int, ...]
    reuse: Reuse | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A claimed place for the objects of one rank, or of all.

    Attributes:
        claim: By which it is held.
        removal: Whether the objects go with the claim.
        objects: Where the store puts its objects.
        keys: Names of the objects.
        space: Room of its file system; None where that is unknown (an object store, the null layout, a file system that
            tells no size).
        reused_bytes: What objects of an earlier run take of it, that are to be reused.
        found: What of these this rank makes room among, where ranks share the place and it was listed for all.
    """

    claim: Claim | None
    removal: Removal | None
    objects: Path | S3Location | None
    keys: ObjectKeys
    space: FileSystemSpace | None
    reused_bytes: int = 0
    found: Found | None = None


def object_keys(spec: KVCacheSpec, kv_ranks: int) -> ObjectKeys:
    """The names of a run's objects: one namespace, "model|kv_rank|group", a kv rank."""
    return ObjectKeys(*(f"{spec.model}|{kv_rank}|0" for kv_rank in range(kv_ranks)))


@runtime_checkable
class Flushable(Protocol):
    """A store that does not make durable by itself what it was given."""

    def flush(self) -> None:
        """Make durable all that was written."""
        ...


def claim_place(spec: KVCacheSpec, planned: Sizes, run_id: str, ranks: Ranks, cleanup: contextlib.ExitStack) -> Place:
    """Take the rank's part of the cache directory; `cleanup` gives it back, and removes the objects unless kept.

    Raises:
        ConfigurationError: It is in use, or holds what may not be deleted or cannot be reused.
        AccessError: It may not be used.
    """
    keys = object_keys(spec, planned.kv_ranks)
    if spec.store_layout is Layout.NULL:
        return Place(claim=None, removal=None, objects=None, keys=keys, space=None)
    if spec.cache_dir is None:
        raise ConfigurationError("--cache-dir: a rank needs it")
    where = cache_place(spec, spec.cache_dir, ranks.rank)
    cache_format = CacheFormat(
        layout=spec.store_layout,
        namespaces=tuple(f"{spec.model}|{kv_rank}|0" for kv_rank in range(planned.kv_ranks)),
        object_bytes=planned.object_bytes,
        block_tokens=planned.block_tokens,
        levels=spec.file_levels if spec.store_layout is Layout.FILE else (),
    )
    claim: Claim
    objects: Path | S3Location
    space: FileSystemSpace | None = None
    reused_bytes = 0
    if isinstance(where, S3Location):
        from mlpstorage.storage.object_claim import ObjectPrefix  # noqa: PLC0415 - obstore is an optional package

        prefix = ObjectPrefix.claim(where, run_id, format=cache_format, keep=spec.keep_cache, reuse=spec.reuse_cache)
        claim, objects = prefix, prefix.objects
    else:
        directory = CacheDirectory.claim(
            where, run_id, format=cache_format, keep=spec.keep_cache, reuse=spec.reuse_cache
        )
        claim, objects = directory, directory.objects
        space = limited_space(where)
        if space is not None and directory.reused:
            # What is reused takes no new space; the other ranks on the host are taken to have as much.
            reused_bytes = object_room(directory.objects, cache_format.layout, cache_format.levels).bytes
            space = replace(space, free_bytes=space.free_bytes + ranks.ranks_on_host * reused_bytes)
    cleanup.callback(claim.release)
    removal = Removal(claim)
    cleanup.callback(removal)
    return Place(claim=claim, removal=removal, objects=objects, keys=keys, space=space, reused_bytes=reused_bytes)


def make_store(spec: KVCacheSpec, planned: Sizes, place: Place) -> BlockStore:
    """The store of the spec's layout, not yet open."""
    match spec.store_layout:
        case Layout.NULL:
            from mlpstorage.storage.null_store import NullStore  # noqa: PLC0415 - one layout a run

            return NullStore(place.keys, planned.object_bytes)
        case Layout.OBJECT:
            from mlpstorage.storage.object_store import ObjectStore  # noqa: PLC0415 - an optional package

            assert isinstance(place.objects, S3Location), "the spec allows this layout for S3 only"
            return ObjectStore(
                place.objects,
                place.keys,
                planned.object_bytes,
                part_bytes=spec.object_part_mib << 20,
                limit_s=spec.io_limit_s,
            )
    assert isinstance(place.objects, Path), "all other layouts lie in a file system"
    match spec.store_layout:
        case Layout.SLAB:
            from mlpstorage.storage.slab_store import SlabStore  # noqa: PLC0415 - one layout a run

            return SlabStore(
                place.objects,
                place.keys,
                planned.object_bytes,
                slots=planned.storage_objects,
                direct=spec.direct,
                write_sync=spec.write_sync,
            )
        case Layout.BUCKET:
            from mlpstorage.storage.bucket_store import BucketStore  # noqa: PLC0415 - one layout a run

            return BucketStore(
                place.objects, place.keys, planned.object_bytes, direct=spec.direct, write_sync=spec.write_sync
            )
    from mlpstorage.storage.file_store import FileStore  # noqa: PLC0415 - one layout a run

    return FileStore(
        place.objects,
        place.keys,
        planned.object_bytes,
        direct=spec.direct,
        write_sync=spec.write_sync,
        levels=spec.file_levels,
    )


def shared_cpu(spec: KVCacheSpec, store: BlockStore, number_on_host: int) -> SharedCpu | None:
    """The CPU that I/O threads share where nearly all that they do is to wait; None where they do not.

    That is for direct I/O with no more than stamps to check, and where nothing is stored. In the latter case the
    calling thread stays there too, with those that it starts: nothing but Python runs, one thread at a time.
    """
    moves_nothing = not store.capabilities.holds_data
    if not moves_nothing and (spec.verify is Verify.FULL or not store.capabilities.direct):
        return None
    cpu = SharedCpu(number_on_host)
    if moves_nothing:
        cpu.enter()
    return cpu


def make_engine(
    spec: KVCacheSpec, store: BlockStore, payload: Payload, arena: DramArena, cpu: SharedCpu | None
) -> IoEngine:
    """The I/O engine, not yet started, over a store that is open.

    Args:
        spec: What was asked for.
        store: Where the objects are.
        payload: What is in them.
        arena: Slots of the DRAM tier.
        cpu: What `shared_cpu` says.

    Raises:
        ConfigurationError: It cannot be had here.
    """
    if spec.io_engine is IoEngineName.THREADS:
        from mlpstorage.storage.pool import IoPool  # noqa: PLC0415 - one engine a run

        return IoPool(store, payload, arena, spec.depth, spec.io_priority, cpu)
    from mlpstorage.storage.uring import UringEngine, probe_uring  # noqa: PLC0415 - an optional package

    refusal = probe_uring()
    if refusal is not None:
        raise ConfigurationError(f"--io-engine uring: {refusal}; use --io-engine threads")
    if not isinstance(store, DescriptorStore):
        raise ConfigurationError(
            f"--io-engine uring: layout {spec.store_layout} has no files to hand to it; use --io-engine threads"
        )
    return UringEngine(store, payload, arena, spec.depth, spec.io_priority)


def find_blocks(store: BlockStore, keys: ObjectKeys) -> Found:
    """Rebuild the index from what the store lists; objects of blocks that are not whole are deleted."""
    begin_s = time.monotonic()
    listing = store.listing()
    present = set(listing.object_ids)
    blocks: dict[int, None] = {}
    orphans: list[int] = []
    incomplete: set[int] = set()
    for object_id in listing.object_ids:
        block_id = object_id // keys.parts
        if all(part in present for part in keys.block_objects(block_id)):
            blocks[block_id] = None
        else:
            incomplete.add(block_id)
            orphans.append(object_id)
    for object_id in orphans:
        store.delete(object_id)
    objects = len(blocks) * keys.parts
    return Found(
        blocks=tuple(blocks),
        reuse=Reuse(
            objects=objects,
            bytes=objects * store.object_bytes,
            damaged_objects=listing.damaged,
            incomplete_blocks=len(incomplete),
            foreign_entries=listing.foreign,
            rebuild_s=time.monotonic() - begin_s,
        ),
    )


def place_warnings(place: Place, store: BlockStore, found: Found | None) -> Sequence[str]:
    """What the user must know of the place before the run begins."""
    told: list[str] = []
    claim = place.claim
    where = "" if claim is None else claim.place
    if claim is not None and claim.cleared is not None and claim.cleared.files:
        cleared = claim.cleared
        told.append(
            f"cleared {cleared.files:,} files ({cleared.bytes / GIB:.2f} GiB) that the dead run {cleared.run_id} had "
            f"left in {where}"
        )
    refusal = getattr(store, "direct_refusal", None)
    if refusal is not None:
        told.append(f"buffered I/O in {where}: {refusal}; the page cache is part of what is measured")
    unreserved = getattr(store, "allocation_refusal", None)
    if unreserved is not None:
        told.append(f"{unreserved}; a write may find it full")
    reuse = None if found is None else found.reuse
    if reuse is not None and (reuse.damaged_objects or reuse.incomplete_blocks):
        told.append(
            f"left out of the reused cache in {where}: {reuse.damaged_objects:,} damaged objects and "
            f"{reuse.incomplete_blocks:,} blocks of which a part was missing"
        )
    return told
