"""How a KV-cache run would be laid out: ranks, sizes, capacities and needs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.config import GIB, MIB, PAGE_BYTES
from mlpstorage.errors import ConfigurationError
from mlpstorage.spec.kvcache import KVCacheSpec

CLIENT_BYTES = 300 * MIB
"""Memory that a rank may use beside its DRAM tier and the blocks in flight."""

STORAGE_FREE_FRACTION = 5
"""The automatic storage limit leaves one part in so many of the file system free."""

CPU_TIER_MOST_BYTES = 32 * GIB
"""Most that the automatic DRAM tier takes."""

WRITE_QUEUE_BYTES = GIB
"""Blocks that wait to be written, at most; then a request's store step waits."""

WARMUP_PART = 5
WARMUP_MOST_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Object sizes and tier capacities of one rank.

    Attributes:
        bytes_per_token: Bytes of keys and values of one token.
        block_tokens: Tokens of one object.
        object_bytes: Payload of one object.
        stored_bytes: The same, padded to 4 KiB for direct I/O.
        gpu_blocks: Objects that the GPU tier holds.
        cpu_blocks: Objects that the DRAM tier holds; None while its size is not known.
        storage_blocks: Objects that the storage tier holds; None likewise.
        write_queue_blocks: Objects that may wait to be written.
        in_flight_bytes: Most bytes in I/O buffers at once.
    """

    bytes_per_token: int
    block_tokens: int
    object_bytes: int
    stored_bytes: int
    gpu_blocks: int
    cpu_blocks: int | None
    storage_blocks: int | None
    write_queue_blocks: int
    in_flight_bytes: int


def sizes(spec: KVCacheSpec, block_tokens: int) -> Sizes:
    """Sizes that follow from the spec, for objects of `block_tokens` tokens."""
    per_token = spec.shape.bytes_per_token
    object_bytes = per_token * block_tokens
    stored_bytes = -(-object_bytes // PAGE_BYTES) * PAGE_BYTES

    def capacity(gib: float | None, each_bytes: int) -> int | None:
        return None if gib is None else int(gib * GIB) // each_bytes

    return Sizes(
        bytes_per_token=per_token,
        block_tokens=block_tokens,
        object_bytes=object_bytes,
        stored_bytes=stored_bytes,
        gpu_blocks=int(spec.gpu_mem_gb * GIB) // object_bytes,
        cpu_blocks=capacity(spec.cpu_mem_gb, stored_bytes),
        storage_blocks=capacity(spec.storage_gb, stored_bytes),
        write_queue_blocks=_write_queue_blocks(spec.io_threads, stored_bytes, capacity(spec.storage_gb, stored_bytes)),
        in_flight_bytes=spec.io_threads * stored_bytes,
    )


def _write_queue_blocks(io_threads: int, stored_bytes: int, storage_blocks: int | None) -> int:
    """Room of the write queue: 1 GiB, or work for every thread; at most a quarter of the storage tier, at least one."""
    wanted = max(2 * io_threads, WRITE_QUEUE_BYTES // stored_bytes)
    return wanted if storage_blocks is None else max(1, min(wanted, storage_blocks // 4))


def warmup_s(spec: KVCacheSpec) -> float:
    """Seconds of warm-up: as asked, else a fifth of the duration, at most a minute."""
    return min(spec.duration / WARMUP_PART, WARMUP_MOST_S) if spec.warmup is None else spec.warmup


def with_automatic_sizes(
    spec: KVCacheSpec, *, memory_free_bytes: int, storage_total_bytes: int, storage_free_bytes: int, ranks_on_host: int
) -> KVCacheSpec:
    """The spec with every size that was left to the program worked out for one rank of a host."""
    changes: dict[str, object] = {}
    if spec.warmup is None:
        changes["warmup"] = warmup_s(spec)
    if spec.cpu_mem_gb is None:
        share = min(CPU_TIER_MOST_BYTES, memory_free_bytes // ranks_on_host // 2)
        changes["cpu_mem_gb"] = _whole_mib(share)
    if spec.storage_gb is None:
        room = storage_free_bytes - storage_total_bytes // STORAGE_FREE_FRACTION
        if room <= 0:
            raise ConfigurationError(
                f"the file system of the cache directory has {gib(storage_free_bytes)} free of "
                f"{gib(storage_total_bytes)}, less than the fifth that the automatic limit leaves free: give the limit "
                "with --storage-gb, or another --cache-dir"
            )
        changes["storage_gb"] = max(_whole_mib(room // ranks_on_host), 1 / 1024)
    return spec.model_copy(update=changes)


def check_room(
    spec: KVCacheSpec,
    planned: Sizes,
    *,
    memory_free_bytes: int,
    storage_free_bytes: int,
    ranks_on_host: int,
    where: str,
) -> None:
    """Refuse a plan that does not fit the host.

    Args:
        spec: With every size worked out.
        planned: Its sizes.
        memory_free_bytes: Memory that is free on the host.
        storage_free_bytes: Free bytes of the cache directory's file system.
        ranks_on_host: Ranks that share the two.
        where: The cache directory, for the message.

    Raises:
        ConfigurationError: Too little memory or space; says the need, what is there, and the flag to change.
    """
    assert spec.cpu_mem_gb is not None, "sizes are worked out first"
    assert spec.storage_gb is not None, "sizes are worked out first"
    each = f"{ranks_on_host} ranks" if ranks_on_host > 1 else "one rank"
    memory_bytes = ranks_on_host * (int(spec.cpu_mem_gb * GIB) + planned.in_flight_bytes + CLIENT_BYTES)
    if memory_bytes > memory_free_bytes:
        raise ConfigurationError(
            f"not enough memory: the plan needs {gib(memory_bytes)} for {each} (DRAM tier {spec.cpu_mem_gb:g} GiB, "
            f"blocks in flight {gib(planned.in_flight_bytes)}, client {gib(CLIENT_BYTES)}), {gib(memory_free_bytes)} "
            "are free: lower --cpu-mem-gb, --io-threads or --block-tokens"
        )
    storage_bytes = ranks_on_host * int(spec.storage_gb * GIB)
    if storage_bytes > storage_free_bytes:
        raise ConfigurationError(
            f"not enough space: the plan needs {gib(storage_bytes)} for {each} in {where}, {gib(storage_free_bytes)} "
            "are free: lower --storage-gb or choose another --cache-dir"
        )
    if not planned.storage_blocks:
        raise ConfigurationError(
            f"the storage tier of {spec.storage_gb:g} GiB holds no object of {gib(planned.stored_bytes)}: raise "
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
    ranks = spec.num_processes or sum(host.slots or 1 for host in hosts)
    elsewhere = any(not is_local(host.name) for host in hosts)
    return Layout(ranks=ranks, ranks_here=0 if elsewhere else ranks, uses_mpi=elsewhere or ranks > 1)


def rank_directory(cache_dir: Path, rank: int) -> Path:
    """The directory of one rank below the cache directory."""
    return cache_dir / f"rank_{rank}"


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / MIB:.2f} MiB"


def _whole_mib(count: int) -> float:
    """Bytes as GiB, rounded down to whole MiB so that the figure reads back exactly."""
    return max(count, 0) // MIB / 1024
