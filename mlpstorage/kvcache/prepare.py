"""What a rank makes ready before its run begins: its place, its store, its buffers and what drives them."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.cluster.facts import available_memory_bytes, host_facts
from mlpstorage.config import Verify
from mlpstorage.kvcache.cache import (
    Flushable,
    Found,
    Place,
    claim_place,
    find_blocks,
    make_engine,
    make_store,
    place_warnings,
    shared_cpu,
)
from mlpstorage.kvcache.existence import ExistenceThreads
from mlpstorage.kvcache.host_series import counter_warnings
from mlpstorage.kvcache.played import build_workload
from mlpstorage.kvcache.ranks import Ranks
from mlpstorage.kvcache.shared_place import SharedPlace, join_place, part_of
from mlpstorage.kvcache.workload import Workload
from mlpstorage.plan.kvcache import Sizes, check_room, sizes, with_automatic_sizes
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.ops import IoEngine
from mlpstorage.storage.payload import Payload, WriteNumbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that a rank needs before its run begins. `facts` are None until the lowest rank of the host has told them."""

    spec: KVCacheSpec
    planned: Sizes
    workload: Workload
    facts: dict[str, object] | None
    place: Place
    store: BlockStore
    found: Found | None
    arena: DramArena
    io_engine: IoEngine
    existence: ExistenceThreads | None
    warnings: tuple[str, ...]


def prepare(
    spec: KVCacheSpec,
    run_id: str,
    ranks: Ranks,
    cleanup: contextlib.ExitStack,
    shared: Place | SharedPlace | None,
) -> Prepared:
    """Check the host, claim the place unless all share one, and make everything ready; `cleanup` takes it back."""
    workload = build_workload(spec, ranks.rank, ranks.size)
    match shared:
        case None:
            place = claim_place(spec, sizes(spec), run_id, ranks, cleanup)
        case Place():
            place = shared
        case _:
            place = join_place(spec, sizes(spec), run_id, shared)
    spec, planned = _fitted(spec, place, ranks)
    facts = host_facts(place.objects if isinstance(place.objects, Path) else None) if ranks.lowest_on_host else None
    store = make_store(spec, planned, place)
    store.open()
    cleanup.callback(store.close)
    if spec.keep_cache and isinstance(store, Flushable):
        cleanup.callback(store.flush)
    if shared is not None:
        found = part_of(shared.found, ranks)
    else:
        found = find_blocks(store, place.keys) if place.claim is not None and place.claim.reused else None
    existence = None
    if shared is not None and ranks.size > 1:
        existence = ExistenceThreads(store, planned.kv_ranks)
        existence.start()
        cleanup.callback(existence.close)
    arena = DramArena(planned.cpu_blocks or 0, planned.stored_block_bytes)
    cleanup.callback(arena.close)
    writes = None if spec.verify is Verify.OFF else WriteNumbers(shared=existence is not None)
    payload = Payload(place.keys, planned.stored_bytes, spec.verify, buffers=spec.depth, writes=writes)
    io_engine = make_engine(spec, store, payload, arena, shared_cpu(spec, store, ranks.number_on_host))
    io_engine.start()
    cleanup.callback(io_engine.close)
    return Prepared(
        spec=spec,
        planned=planned,
        workload=workload,
        facts=facts,
        place=place,
        store=store,
        found=found,
        arena=arena,
        io_engine=io_engine,
        existence=existence,
        warnings=(*place_warnings(place, store, found), *(() if facts is None else counter_warnings())),
    )


def is_buffered(store: BlockStore) -> bool:
    """Whether the page cache of this host is under the store."""
    return store.capabilities.aligned and not store.capabilities.direct


def _fitted(spec: KVCacheSpec, place: Place, ranks: Ranks) -> tuple[KVCacheSpec, Sizes]:
    """The spec with every size worked out for this host, and the sizes that follow; refused where they do not fit."""
    memory_bytes = available_memory_bytes()
    ranks_on_storage = ranks.size if spec.shares_cache else None
    spec = with_automatic_sizes(
        spec,
        memory_free_bytes=memory_bytes,
        space=place.space,
        ranks_on_host=ranks.ranks_on_host,
        ranks_on_storage=ranks_on_storage,
    )
    planned = sizes(spec)
    check_room(
        spec,
        planned,
        memory_free_bytes=memory_bytes,
        storage_free_bytes=None if place.space is None else place.space.free_bytes,
        ranks_on_host=ranks.ranks_on_host,
        ranks_on_storage=ranks_on_storage,
        where="" if place.claim is None else place.claim.place,
    )
    return spec, planned
