"""What decides the engine's behaviour: sizes and policies, all of them resolved."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from mlpstorage.config import Decisions, Eviction, Promotion, StorePolicy, TouchOrder, WriteOverflow, WriteSync
from mlpstorage.kvcache.pacing import Pacing


class LoadLimit(Protocol):
    """How long a request waits for its load."""

    def limit_s(self, tokens: int) -> float:
        """Most seconds that reading `tokens` tokens from storage may take."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes and policies of one rank's engine. Tiers, queues and batches are in blocks.

    Attributes:
        block_tokens: Tokens of a block.
        kv_ranks: Objects of a block, one a kv rank.
        object_bytes: Payload of an object.
        gpu_blocks: Capacity of the GPU tier.
        cpu_blocks: Capacity of the DRAM tier.
        storage_blocks: Capacity of the storage tier.
        touch: In which order a request's blocks become recent.
        prefix_caching: Whether anything is looked up.
        pacing: Times of computation and thought.
        promote: Whether what was found on storage goes to DRAM, where the GPU tier has no room for it.
        decisions: When it is decided what a request finds, stores and evicts.
        store_policy: From which use on a block is written.
        eviction: What happens where the storage tier is full.
        evict_above: Part of the storage tier, above 0 and up to 1, beyond which it is never filled: what would exceed
            it evicts.
        evict_to: Part of the storage tier, up to `evict_above`, that an eviction leaves filled.
        write_overflow: What happens to new blocks that do not fit the write queue.
        write_queue_blocks: Most blocks that wait to be written or are being written.
        write_queue_s: Most seconds that a block should wait for its write, by the rate of the writes so far; None for
            no such bound.
        write_batch: Blocks that are written, and become findable, together.
        write_interval_s: New blocks collect for so long before they are written together; 0 for at once.
        write_sync: When writes are forced to stable storage; the engine does so after each batch for `batch`.
        load_batch: Reads of a request that are done one after the other; 0 for all, 1 for none.
        min_load_tokens: Where no more tokens than this are found on storage they are computed, not read.
        load_timeout: After how long a load from storage is abandoned; None for never.
    """

    block_tokens: int
    kv_ranks: int
    object_bytes: int
    gpu_blocks: int
    cpu_blocks: int
    storage_blocks: int
    touch: TouchOrder
    prefix_caching: bool
    pacing: Pacing
    promote: Promotion
    decisions: Decisions
    store_policy: StorePolicy
    eviction: Eviction
    evict_above: float
    evict_to: float
    write_overflow: WriteOverflow
    write_queue_blocks: int
    write_queue_s: float | None
    write_batch: int
    write_interval_s: float
    write_sync: WriteSync
    load_batch: int
    min_load_tokens: int
    load_timeout: LoadLimit | None

    def objects(self, block_ids: Collection[int]) -> Collection[int]:
        """Ids of the objects of blocks, block after block, one a kv rank; see `storage.keys`."""
        kv_ranks = self.kv_ranks
        if kv_ranks == 1:
            return block_ids
        return [block_id * kv_ranks + part for block_id in block_ids for part in range(kv_ranks)]
