"""What would run, and how large it is, as text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlpstorage.plan.datasize import DataSizes
from mlpstorage.plan.kvcache import Layout, Sizes, gib, warmup_s
from mlpstorage.spec.fields import Source
from mlpstorage.spec.kvcache import KVCacheSpec

AUTO = "auto, worked out when it runs"


def plan_text(
    spec: KVCacheSpec,
    sources: Mapping[str, Source],
    planned: Sizes,
    layout: Layout,
    *,
    result_dir: Path,
    cache_dir: Path,
    command: str,
    refusal: str | None,
) -> str:
    """The plan of a run and its exact command. Nothing of it was done; `refusal` is why it would not start."""
    hosts = ", ".join(host.name for host in spec.parsed_hosts) if layout.uses_mpi else "this machine"
    per_second = (
        f"trace {spec.trace}, times x {spec.time_scale:g}, first {spec.max_requests or 'all'} requests"
        if spec.trace
        else f"{spec.num_users} synthetic users a rank, closed loop"
    )
    rows = [
        ("model", f"{spec.model}, {planned.bytes_per_token:,} bytes per token"),
        ("load", per_second),
        ("objects", f"{planned.block_tokens} tokens, {gib(planned.stored_bytes)} each ({_block_note(spec)})"),
        ("phases", f"{warmup_s(spec):g} s warm-up, {spec.duration:g} s measured window, drain"),
        ("ranks", f"{layout.ranks} on {hosts}{', started over MPI' if layout.uses_mpi else ''}"),
        ("GPU tier", f"{spec.gpu_mem_gb:g} GiB a rank"),
        ("DRAM tier", AUTO if spec.cpu_mem_gb is None else f"{spec.cpu_mem_gb:g} GiB a rank"),
        ("storage tier", AUTO if spec.storage_gb is None else f"at most {spec.storage_gb:g} GiB a rank"),
        ("cache files", str(cache_dir)),
        ("results", str(result_dir)),
    ]
    parameters = [
        (name, f"{value}  ({sources[name]})")
        for name, value in spec.parameters().items()
        if value is not None and value not in ([], {})
    ]
    return "\n".join(
        [
            "What would run (nothing was created, nobody was contacted):",
            *_lines(rows),
            "",
            "Parameters:",
            *_lines(parameters),
            "",
            "Command:",
            f"  {command}",
            "",
            *([] if refusal is None else [f"It would be refused: {refusal}", ""]),
        ]
    )


def data_sizes_text(estimate: DataSizes) -> str:
    """The sizes of a load."""
    rows = [
        ("bytes per token", f"{estimate.bytes_per_token:,}"),
        ("block", f"{estimate.block_tokens} tokens, {estimate.bytes_per_block:,} bytes"),
        (
            "block on storage",
            f"{estimate.stored_bytes_per_block:,} bytes ({estimate.padding_bytes_per_block:,} padding)",
        ),
        ("break-even", f"reading beats computing above {estimate.break_even_gib_per_s:.2f} GiB/s, for one request"),
        ("prefill", f"{estimate.prefill_tokens_per_s:,.0f} tokens/s"),
    ]
    if estimate.window_bytes_per_sequence:
        rows.insert(
            1,
            ("sliding windows", f"{estimate.window_bytes_per_sequence:,} bytes a sequence (not in the figures below)"),
        )
    contexts = [
        (
            f"{size.context_tokens:,} tokens",
            f"{gib(size.bytes_per_user)} a user, {gib(size.bytes_all_users)} for {estimate.num_users:,} users",
        )
        for size in estimate.contexts
    ]
    tiers = [
        (
            tier.tier,
            "auto, worked out by the run"
            if tier.blocks is None
            else f"{tier.capacity_gib:g} GiB: {tier.blocks:,} blocks, {tier.tokens:,} tokens",
        )
        for tier in estimate.tiers
    ]
    if estimate.total_tokens is not None:
        tiers.append(("all tiers", f"{estimate.total_blocks:,} blocks, {estimate.total_tokens:,} tokens"))
    return "\n".join(
        [
            f"{estimate.model}, {estimate.num_users:,} users, sizes of one rank:",
            *_lines(rows),
            "",
            "A context of",
            *_lines(contexts),
            "",
            "Tiers hold",
            *_lines(tiers),
            "",
        ]
    )


def _block_note(spec: KVCacheSpec) -> str:
    return "the trace's own blocks, or groups of them" if spec.trace else "padded to 4 KiB"


def _lines(rows: Iterable[Sequence[str]]) -> list[str]:
    pairs = list(rows)
    width = max(len(name) for name, _ in pairs)
    return [f"  {name:<{width}}  {text}" for name, text in pairs]
