"""How a KV-cache run would be laid out: ranks, sizes, capacities and needs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from mlpstorage.cluster.facts import FileSystemSpace
from mlpstorage.config import GIB, MIB
from mlpstorage.config import Layout as StoreLayout
from mlpstorage.errors import ConfigurationError
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.spec.workload import DEFAULT_BLOCK_TOKENS, STEADY, STEADY_WARMUP_MOST_S
from mlpstorage.storage.base import buffer_bytes, padded_bytes
from mlpstorage.storage.location import S3Location

CLIENT_BYTES = 250 * MIB
"""Memory that a rank may use beside its DRAM tier and its I/O buffers."""

STORAGE_FREE_FRACTION = 5
"""The automatic storage limit leaves one part in so many of the file system free."""

NULL_STORAGE_GIB = 100.0
"""The automatic limit of the layout that stores nothing: what a disk could well give, and an index of small blocks
(tiny-1b, 16 tokens) that fits the memory of a client."""

CPU_TIER_MOST_BYTES = 32 * GIB
"""Most that the automatic DRAM tier takes."""

QUEUED_OBJECTS = 2
"""The write queue holds so many objects for each that can be in flight, however large they are."""

QUEUE_PART = 4
"""The write queue takes at most one part in so many of the storage tier."""

WARMUP_PART = 5
WARMUP_MOST_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes and tier capacities of one rank. A block is one object, or one a kv rank.

    Attributes:
        bytes_per_token: Bytes of keys and values of one token, on all kv ranks together.
        block_tokens: Tokens of one block.
        kv_ranks: Objects of one block.
        object_bytes: Payload of one object.
        stored_bytes: The same, padded to 4 KiB for direct I/O.
        block_bytes: Payload of all objects of a block.
        stored_block_bytes: The same, padded.
        gpu_blocks: Blocks that the GPU tier holds.
        cpu_blocks: Blocks that the DRAM tier holds; None while its size is not known.
        storage_blocks: Blocks that the storage tier holds; None likewise.
        write_queue_blocks: Blocks that may wait to be written.
        in_flight_bytes: Most bytes of objects in flight.
        io_memory_bytes: Memory of the I/O buffers, with the random bytes that objects are made of, and for layout
            object with the HTTP client's copies.
    """

    bytes_per_token: int
    block_tokens: int
    kv_ranks: int
    object_bytes: int
    stored_bytes: int
    block_bytes: int
    stored_block_bytes: int
    gpu_blocks: int
    cpu_blocks: int | None
    storage_blocks: int | None
    write_queue_blocks: int
    in_flight_bytes: int
    io_memory_bytes: int

    @property
    def storage_objects(self) -> int:
        """Objects that the storage tier holds: slots of a slab; 0 while its size is not known."""
        return (self.storage_blocks or 0) * self.kv_ranks


def sizes(spec: KVCacheSpec) -> Sizes:
    """Sizes that follow from the spec."""
    block_tokens = DEFAULT_BLOCK_TOKENS if spec.block_tokens is None else spec.block_tokens
    kv_ranks = spec.shape.kv_ranks(spec.tensor_parallel)
    object_bytes = spec.shape.kv_rank_bytes_per_token(spec.tensor_parallel) * block_tokens
    stored_bytes = padded_bytes(object_bytes)
    in_flight_bytes = spec.depth * stored_bytes
    copies_bytes = in_flight_bytes if spec.store_layout is StoreLayout.OBJECT else 0

    def capacity(gib: float | None) -> int | None:
        return None if gib is None else int(gib * GIB) // (kv_ranks * stored_bytes)

    return Sizes(
        bytes_per_token=spec.bytes_per_token,
        block_tokens=block_tokens,
        kv_ranks=kv_ranks,
        object_bytes=object_bytes,
        stored_bytes=stored_bytes,
        block_bytes=kv_ranks * object_bytes,
        stored_block_bytes=kv_ranks * stored_bytes,
        gpu_blocks=int(spec.gpu_mem_gb * GIB) // (kv_ranks * object_bytes),
        cpu_blocks=capacity(spec.cpu_mem_gb),
        storage_blocks=capacity(spec.storage_gb),
        write_queue_blocks=_write_queue_blocks(spec, kv_ranks, stored_bytes, capacity(spec.storage_gb)),
        in_flight_bytes=in_flight_bytes,
        io_memory_bytes=spec.depth * buffer_bytes(stored_bytes, spec.depth) + copies_bytes,
    )


def _write_queue_blocks(spec: KVCacheSpec, kv_ranks: int, stored_bytes: int, storage_blocks: int | None) -> int:
    """Room of the write queue: as asked, or enough to do; at most a part of the storage tier, at least one block."""
    busy = -(-QUEUED_OBJECTS * spec.depth // kv_ranks)
    wanted = max(busy, int(spec.write_queue_gib * GIB) // (kv_ranks * stored_bytes))
    return wanted if storage_blocks is None else max(1, min(wanted, storage_blocks // QUEUE_PART))


def warmup_s(spec: KVCacheSpec) -> float:
    """Seconds of warm-up, at most: as asked, else a fifth of the duration, at most a minute."""
    if spec.warmup == STEADY:
        return STEADY_WARMUP_MOST_S
    return min(spec.duration / WARMUP_PART, WARMUP_MOST_S) if spec.warmup is None else spec.warmup


def with_settled_io(spec: KVCacheSpec) -> KVCacheSpec:
    """The spec with layout, objects in flight and threads, where left to the program, settled; no host matters."""
    return spec.model_copy(update={"layout": spec.store_layout, "io_depth": spec.depth, "io_threads": spec.threads})


def with_automatic_sizes(
    spec: KVCacheSpec,
    *,
    memory_free_bytes: int,
    space: FileSystemSpace | None,
    ranks_on_host: int,
    ranks_on_storage: int | None = None,
) -> KVCacheSpec:
    """The spec with everything that was left to the program worked out for one rank of a host.

    Args:
        spec: What was asked for.
        memory_free_bytes: Memory that is free on the host.
        space: Room of the cache directory's file system; None where there is none or it tells no size.
        ranks_on_host: Ranks that share the two.
        ranks_on_storage: Ranks that share the file system, where those of other hosts do, too.

    Raises:
        ConfigurationError: There is no telling how large the storage tier may be.
    """
    changes: dict[str, object] = {}
    if spec.warmup is None:
        changes["warmup"] = warmup_s(spec)
    if spec.cpu_mem_gb is None:
        share = min(CPU_TIER_MOST_BYTES, memory_free_bytes // ranks_on_host // 2)
        changes["cpu_mem_gb"] = _whole_mib(share)
    if spec.storage_gb is None:
        changes["storage_gb"] = _automatic_storage_gib(spec, space, ranks_on_storage or ranks_on_host)
    return with_settled_io(spec).model_copy(update=changes)


def _automatic_storage_gib(spec: KVCacheSpec, space: FileSystemSpace | None, ranks: int) -> float:
    if spec.store_layout is StoreLayout.NULL:
        return NULL_STORAGE_GIB
    if space is None:
        where = (
            "an object store" if spec.store_layout is StoreLayout.OBJECT else "the file system of the cache directory"
        )
        raise ConfigurationError(f"--storage-gb: {where} tells no size: give the limit of the storage tier")
    room = space.free_bytes - space.total_bytes // STORAGE_FREE_FRACTION
    if room <= 0:
        raise ConfigurationError(
            f"the file system of the cache directory has {gib(space.free_bytes)} free of {gib(space.total_bytes)}, "
            "less than the fifth that the automatic limit leaves free: give the limit with --storage-gb, or another "
            "--cache-dir"
        )
    return max(_whole_mib(room // ranks), 1 / 1024)


def check_room(
    spec: KVCacheSpec,
    planned: Sizes,
    *,
    memory_free_bytes: int,
    storage_free_bytes: int | None,
    ranks_on_host: int,
    where: str,
    ranks_on_storage: int | None = None,
) -> None:
    """Refuse a plan that does not fit the host.

    Args:
        spec: With every size worked out.
        planned: Its sizes.
        memory_free_bytes: Memory that is free on the host.
        storage_free_bytes: Free bytes of the cache directory's file system; None where there is no such limit.
        ranks_on_host: Ranks that share the two.
        where: The cache directory, for the message.
        ranks_on_storage: Ranks that share the file system, where those of other hosts do, too.

    Raises:
        ConfigurationError: Too little memory or space; says the need, what is there, and the flag to change.
    """
    assert spec.cpu_mem_gb is not None, "sizes are worked out first"
    assert spec.storage_gb is not None, "sizes are worked out first"
    each = f"{ranks_on_host} ranks" if ranks_on_host > 1 else "one rank"
    memory_bytes = ranks_on_host * (int(spec.cpu_mem_gb * GIB) + planned.io_memory_bytes + CLIENT_BYTES)
    if memory_bytes > memory_free_bytes:
        raise ConfigurationError(
            f"not enough memory: the plan needs {gib(memory_bytes)} for {each} (DRAM tier {spec.cpu_mem_gb:g} GiB, "
            f"I/O buffers {gib(planned.io_memory_bytes)}, client {gib(CLIENT_BYTES)}), {gib(memory_free_bytes)} "
            "are free: lower --cpu-mem-gb, --io-depth or --block-tokens"
        )
    on_storage = ranks_on_storage or ranks_on_host
    storage_bytes = on_storage * int(spec.storage_gb * GIB)
    if storage_free_bytes is not None and storage_bytes > storage_free_bytes:
        all_of_them = f"{on_storage} ranks" if on_storage > 1 else "one rank"
        raise ConfigurationError(
            f"not enough space: the plan needs {gib(storage_bytes)} for {all_of_them} in {where}, "
            f"{gib(storage_free_bytes)} are free: lower --storage-gb or choose another --cache-dir"
        )
    if not planned.storage_blocks:
        raise ConfigurationError(
            f"the storage tier of {spec.storage_gb:g} GiB holds no block of {gib(planned.stored_block_bytes)}: raise "
            "--storage-gb or lower --block-tokens"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which ranks run where.

    Attributes:
        ranks: Number of ranks.
        ranks_here: How many of them on this machine.
        uses_mpi: Whether an MPI launcher starts them.
    """

    ranks: int
    ranks_here: int
    uses_mpi: bool


def layout(spec: KVCacheSpec, is_local: Callable[[str], bool]) -> Layout:
    """Ranks and where they run; `is_local` tells whether a host name is this machine."""
    hosts = spec.parsed_hosts
    ranks = spec.ranks
    elsewhere = any(not is_local(host.name) for host in hosts)
    return Layout(ranks=ranks, ranks_here=0 if elsewhere else ranks, uses_mpi=elsewhere or ranks > 1)


@overload
def rank_directory(cache_dir: Path, rank: int) -> Path: ...
@overload
def rank_directory(cache_dir: S3Location, rank: int) -> S3Location: ...
def rank_directory(cache_dir: Path | S3Location, rank: int) -> Path | S3Location:
    """The place of one rank below the cache directory."""
    return cache_dir / f"rank_{rank}"


@overload
def cache_place(spec: KVCacheSpec, cache_dir: Path, rank: int) -> Path: ...
@overload
def cache_place(spec: KVCacheSpec, cache_dir: S3Location, rank: int) -> S3Location: ...
@overload
def cache_place(spec: KVCacheSpec, cache_dir: Path | S3Location, rank: int) -> Path | S3Location: ...
def cache_place(spec: KVCacheSpec, cache_dir: Path | S3Location, rank: int) -> Path | S3Location:
    """The place of one rank's objects: one of its own, or the cache directory itself where all ranks share it."""
    return cache_dir if spec.shares_cache else rank_directory(cache_dir, rank)


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / MIB:.2f} MiB"


def _whole_mib(count: int) -> float:
    """Bytes as GiB, rounded down to whole MiB so that the figure reads back exactly."""
    return max(count, 0) // MIB / 1024
