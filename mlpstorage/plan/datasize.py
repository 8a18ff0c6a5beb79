"""How large a load is, and when reading it beats computing it: arithmetic on a spec, nothing is run."""

from dataclasses import asdict, dataclass

from mlpstorage.config import GIB
from mlpstorage.plan.compute import ComputeModel, break_even_bytes_per_s, compute_model
from mlpstorage.plan.kvcache import Sizes, sizes
from mlpstorage.spec.kvcache import KVCacheSpec

REFERENCE_CONTEXT_TOKENS = (2048, 8192, 32768, 131_072)
"""Context lengths for which sizes are shown."""

BREAK_EVEN_CONTEXT_TOKENS = 8192
"""Context length for which the break-even bandwidth is told in one number, that of the Mooncake paper's example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSize:
    """Users who all have a context of that length: the size of their cache, and what it takes to compute one of them.

    Sizes are of full blocks only, padding included.

    Attributes:
        context_tokens: Length of the context.
        blocks_per_user: Full blocks of one.
        bytes_per_user: Their bytes on storage.
        bytes_all_users: Those of all users of a rank.
        prefill_s: Time to compute one, alone on the accelerators; None where that is not modelled.
        break_even_gib_per_s: Bandwidth above which reading it takes less; None likewise.
    """

    context_tokens: int
    blocks_per_user: int
    bytes_per_user: int
    bytes_all_users: int
    prefill_s: float | None
    break_even_gib_per_s: float | None


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

    A block is one object, or one a kv rank; bytes of blocks are of all their objects. `weights` are the model's, and
    `active_weights` those that one token is multiplied by. `break_even_gib_per_s` is the bandwidth above which reading
    a context of `break_even_context_tokens` takes less time than computing it; other lengths have their own. Where
    prefill has a constant rate, `prefill_tokens_per_s`, it is that rate x bytes per token for all.
    """

    model: str
    weights: int
    active_weights: int
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
    accelerator: str
    num_accelerators: int
    mfu: float
    prefill_tokens_per_s: float | None
    break_even_context_tokens: int
    break_even_gib_per_s: float | None
    contexts: tuple[ContextSize, ...]
    tiers: tuple[TierSize, ...]
    total_blocks: int | None
    total_tokens: int | None

    def as_dict(self) -> dict[str, object]:
        """The figures as JSON has them."""
        return asdict(self)


def data_sizes(spec: KVCacheSpec) -> DataSizes:
    """The sizes that follow from a spec."""
    planned = sizes(spec)
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
    compute = compute_model(spec)
    return DataSizes(
        model=spec.model,
        weights=spec.shape.weights,
        active_weights=spec.shape.active_weights,
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
        accelerator=spec.accelerator.value,
        num_accelerators=spec.num_accelerators,
        mfu=spec.mfu,
        prefill_tokens_per_s=spec.prefill_tokens_per_s,
        break_even_context_tokens=BREAK_EVEN_CONTEXT_TOKENS,
        break_even_gib_per_s=_break_even_gib_per_s(compute, planned, BREAK_EVEN_CONTEXT_TOKENS),
        contexts=tuple(
            _context_size(context_tokens, spec.num_users, planned, compute)
            for context_tokens in REFERENCE_CONTEXT_TOKENS
        ),
        tiers=tiers,
        total_blocks=total_blocks,
        total_tokens=None if total_blocks is None else total_blocks * tokens,
    )


def _context_size(context_tokens: int, num_users: int, planned: Sizes, compute: ComputeModel) -> ContextSize:
    of_user = context_tokens // planned.block_tokens
    return ContextSize(
        context_tokens=context_tokens,
        blocks_per_user=of_user,
        bytes_per_user=of_user * planned.stored_block_bytes,
        bytes_all_users=of_user * planned.stored_block_bytes * num_users,
        prefill_s=compute.prefill_s(context_tokens, 0),
        break_even_gib_per_s=_break_even_gib_per_s(compute, planned, context_tokens),
    )


def _break_even_gib_per_s(compute: ComputeModel, planned: Sizes, context_tokens: int) -> float | None:
    needed = break_even_bytes_per_s(compute, bytes_per_token=planned.bytes_per_token, context_tokens=context_tokens)
    return None if needed is None else needed / GIB
