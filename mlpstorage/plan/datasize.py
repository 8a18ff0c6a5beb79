"""How large a load is, and when reading it beats computing it: arithmetic on a spec, nothing is run."""

from dataclasses import asdict, dataclass

from mlpstorage.config import GIB
from mlpstorage.plan.kvcache import sizes
from mlpstorage.spec.kvcache import KVCacheSpec

REFERENCE_CONTEXT_TOKENS = (2048, 8192, 32768, 131_072)
"""Context lengths for which sizes are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSize:
    """Size of the cache of users who all have a context of that length; full blocks only, padding included."""

    context_tokens: int
    blocks_per_user: int
    bytes_per_user: int
    bytes_all_users: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSize:
    """What a tier holds. None where its size is left to the run."""

    tier: str
    capacity_gib: float | None
    blocks: int | None
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSizes:
    """Sizes of a load of one rank.

    A block is one object, or one a kv rank; bytes of blocks are of all their objects. `break_even_gib_per_s` is the
    bandwidth above which reading a cached token takes less time than computing it: prefill tokens a second x bytes per
    token.
    """

    model: str
    profile: str | None
    tensor_parallel: int
    num_users: int
    bytes_per_token: int
    window_bytes_per_sequence: int
    block_tokens: int
    bytes_per_block: int
    stored_bytes_per_block: int
    padding_bytes_per_block: int
    objects_per_block: int
    bytes_per_object: int
    prefill_tokens_per_s: float
    break_even_gib_per_s: float
    contexts: tuple[ContextSize, ...]
    tiers: tuple[TierSize, ...]
    total_blocks: int | None
    total_tokens: int | None

    def as_dict(self) -> dict[str, object]:
        """The figures as JSON has them."""
        return asdict(self)


def data_sizes(spec: KVCacheSpec) -> DataSizes:
    """The sizes that follow from a spec."""
    planned = sizes(spec, spec.block_tokens)
    tokens = planned.block_tokens
    tiers = tuple(
        TierSize(tier=tier, capacity_gib=capacity, blocks=blocks, tokens=None if blocks is None else blocks * tokens)
        for tier, capacity, blocks in (
            ("gpu", spec.gpu_mem_gb, planned.gpu_blocks),
            ("cpu", spec.cpu_mem_gb, planned.cpu_blocks),
            ("storage", spec.storage_gb, planned.storage_blocks),
        )
    )
    blocks = [tier.blocks for tier in tiers if tier.blocks is not None]
    total_blocks = sum(blocks) if len(blocks) == len(tiers) else None
    contexts = []
    for context_tokens in REFERENCE_CONTEXT_TOKENS:
        of_user = context_tokens // tokens
        contexts.append(
            ContextSize(
                context_tokens=context_tokens,
                blocks_per_user=of_user,
                bytes_per_user=of_user * planned.stored_block_bytes,
                bytes_all_users=of_user * planned.stored_block_bytes * spec.num_users,
            )
        )
    return DataSizes(
        model=spec.model,
        profile=spec.profile,
        tensor_parallel=spec.tensor_parallel,
        num_users=spec.num_users,
        bytes_per_token=planned.bytes_per_token,
        window_bytes_per_sequence=spec.shape.window_bytes_per_sequence,
        block_tokens=tokens,
        bytes_per_block=planned.block_bytes,
        stored_bytes_per_block=planned.stored_block_bytes,
        padding_bytes_per_block=planned.stored_block_bytes - planned.block_bytes,
        objects_per_block=planned.kv_ranks,
        bytes_per_object=planned.object_bytes,
        prefill_tokens_per_s=spec.prefill_tokens_per_s,
        break_even_gib_per_s=spec.prefill_tokens_per_s * planned.bytes_per_token / GIB,
        contexts=tuple(contexts),
        tiers=tiers,
        total_blocks=total_blocks,
        total_tokens=None if total_blocks is None else total_blocks * tokens,
    )
