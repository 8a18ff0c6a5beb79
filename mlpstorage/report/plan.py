"""What would run, and how large it is, as text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlpstorage.config import Accelerator, Arrivals, IoEngineName, Placement
from mlpstorage.config import Layout as StoreLayout
from mlpstorage.plan.datasize import ContextSize, DataSizes
from mlpstorage.plan.kvcache import Layout, Sizes, gib, warmup_s
from mlpstorage.spec.fields import Source
from mlpstorage.spec.kvcache import KVCacheSpec, value_text
from mlpstorage.spec.storage import FILE_LAYOUTS, POLICY, levels_text
from mlpstorage.spec.workload import STEADY, mix_text
from mlpstorage.storage.location import S3Location

AUTO = "auto, worked out when it runs"


def plan_text(
    spec: KVCacheSpec,
    sources: Mapping[str, Source],
    planned: Sizes,
    layout: Layout,
    *,
    result_dir: Path,
    cache_dir: Path | S3Location,
    command: str,
    refusal: str | None,
) -> str:
    """The plan of a run and its exact command. Nothing of it was done; `refusal` is why it would not start."""
    hosts = ", ".join(host.name for host in spec.parsed_hosts) if layout.uses_mpi else "this machine"
    rows = [
        ("model", f"{spec.model}, {planned.bytes_per_token:,} bytes per token"),
        ("load", _load(spec)),
        ("profile", _profile(spec, sources)),
        ("blocks", f"{planned.block_tokens} tokens, {gib(planned.stored_block_bytes)} each ({_block_note(spec)})"),
        ("objects", _objects(spec, planned)),
        ("phases", _phases(spec)),
        ("compute", _spec_compute(spec)),
        ("ranks", f"{layout.ranks} on {hosts}{', started over MPI' if layout.uses_mpi else ''}"),
        ("GPU tier", f"{spec.gpu_mem_gb:g} GiB a rank"),
        ("DRAM tier", AUTO if spec.cpu_mem_gb is None else f"{spec.cpu_mem_gb:g} GiB a rank"),
        ("storage tier", _storage_tier(spec, layout)),
        ("layout", _layout(spec)),
        ("I/O", _io(spec)),
        ("policies", _policies(spec)),
        ("cache files", _cache_files(spec, cache_dir)),
        ("results", str(result_dir)),
    ]
    parameters = [
        (name, f"{_shown(name, value)}  ({sources[name]})")
        for name, value in spec.parameters().items()
        if not (value is None or (value in ([], {}) and sources[name] == "default"))
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


def _storage_tier(spec: KVCacheSpec, layout: Layout) -> str:
    if spec.storage_gb is None:
        return AUTO
    each = f"at most {spec.storage_gb:g} GiB a rank"
    if not spec.shares_cache:
        return each
    return f"{each} of what it writes, {spec.storage_gb * layout.ranks:g} GiB together"


def _cache_files(spec: KVCacheSpec, cache_dir: Path | S3Location) -> str:
    if spec.store_layout is StoreLayout.NULL:
        return "none"
    return f"{cache_dir}, one cache of all ranks" if spec.shares_cache else str(cache_dir)


def data_sizes_text(estimate: DataSizes) -> str:
    """The sizes of a load."""
    rows = [
        ("bytes per token", f"{estimate.bytes_per_token:,}"),
        ("block", f"{estimate.block_tokens} tokens, {estimate.bytes_per_block:,} bytes"),
        (
            "block on storage",
            f"{estimate.stored_bytes_per_block:,} bytes ({estimate.padding_bytes_per_block:,} padding)",
        ),
        ("objects", f"{estimate.objects_per_block} a block, {estimate.bytes_per_object:,} bytes each"),
        ("weights", f"{estimate.weights / 1e9:,.2f}e9, {estimate.active_weights / 1e9:,.2f}e9 for each token"),
        ("compute", _compute(estimate)),
        ("break-even", _break_even(estimate)),
    ]
    if estimate.window_bytes_per_sequence:
        rows.insert(
            1,
            ("sliding windows", f"{estimate.window_bytes_per_sequence:,} bytes a sequence (not in the figures below)"),
        )
    contexts = [
        (
            f"{size.context_tokens:,} tokens",
            f"{gib(size.bytes_per_user)} a user, {gib(size.bytes_all_users)} for {estimate.num_users:,} users"
            + _computed_in(size),
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
            f"{_load_name(estimate)}, {estimate.num_users:,} users, sizes of one rank:",
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


def _load(spec: KVCacheSpec) -> str:
    """What is played, and when."""
    if spec.trace is None:
        users = f"{spec.num_users} synthetic users a rank ({mix_text(spec.mix)})"
        dealt = "" if spec.placement is Placement.SESSION else f", placed by {spec.placement}"
        return f"{users}, {_rate(spec) or 'closed loop'}{dealt}"
    pace = {
        Arrivals.OPEN: f"open loop, {_rate(spec) or f'times x {spec.time_scale:g}'}",
        Arrivals.SESSION: f"sessions at their starts, with their pauses, times x {spec.time_scale:g}",
        Arrivals.CLOSED: f"its sessions one after the other by {spec.num_users} users a rank",
    }
    parts = [f"trace {spec.trace} ({spec.trace_format})", pace[spec.arrivals or Arrivals.OPEN]]
    if spec.spread_arrivals:
        parts.append(f"spread over {spec.spread_arrivals:g} s")
    if spec.placement is not Placement.SESSION:
        parts.append(f"placed by {spec.placement}")
    return ", ".join([*parts, f"first {spec.max_requests or 'all'} requests"])


def _rate(spec: KVCacheSpec) -> str | None:
    return None if spec.request_rate is None else f"{spec.request_rate:g} requests a second of all ranks together"


def _phases(spec: KVCacheSpec) -> str:
    warmup = "warm-up to a steady hit ratio, at most" if spec.warmup == STEADY else "warm-up"
    phases = f"{warmup} {warmup_s(spec):g} s, measured window {spec.duration:g} s, drain"
    return phases if spec.trials == 1 else f"{spec.trials} times: {phases}"


def _spec_compute(spec: KVCacheSpec) -> str:
    if spec.accelerator is not Accelerator.NONE:
        by = _accelerators(spec.num_accelerators, spec.accelerator, spec.mfu)
    else:
        rates = (("prefill", spec.prefill_tokens_per_s), ("decode", spec.decode_tokens_per_s))
        by = ", ".join(f"{name} of {rate:,.0f} tokens/s" for name, rate in rates if rate is not None) or "not modelled"
    return f"{by}; generation mode {spec.generation_mode}"


def _compute(estimate: DataSizes) -> str:
    if estimate.accelerator != Accelerator.NONE:
        return _accelerators(estimate.num_accelerators, estimate.accelerator, estimate.mfu)
    if estimate.prefill_tokens_per_s is None:
        return "not modelled"
    return f"prefill of {estimate.prefill_tokens_per_s:,.0f} tokens/s"


def _accelerators(number: int, accelerator: str, mfu: float) -> str:
    return f"{number} x {accelerator}, {mfu:g} of their peak in prefill"


def _break_even(estimate: DataSizes) -> str:
    if estimate.break_even_gib_per_s is None:
        return "unknown: computing is not modelled"
    where = "" if estimate.prefill_tokens_per_s else f"at {estimate.break_even_context_tokens:,} tokens "
    return f"{where}reading beats computing above {estimate.break_even_gib_per_s:.2f} GiB/s, for one request"


def _computed_in(size: ContextSize) -> str:
    if size.prefill_s is None:
        return ""
    return f"; computed in {size.prefill_s:.3g} s, reading beats that above {size.break_even_gib_per_s:.2f} GiB/s"


def _load_name(estimate: DataSizes) -> str:
    parts = [estimate.model]
    if estimate.profile is not None:
        parts.append(f"profile {estimate.profile}")
    if estimate.tensor_parallel > 1:
        parts.append(f"tensor parallel {estimate.tensor_parallel}")
    return ", ".join(parts)


def _profile(spec: KVCacheSpec, sources: Mapping[str, Source]) -> str:
    if spec.profile is None:
        return "none"
    return f"{spec.profile}: {', '.join(name for name, source in sources.items() if source == 'profile')}"


def _objects(spec: KVCacheSpec, planned: Sizes) -> str:
    one = "one a block" if planned.kv_ranks == 1 else f"{planned.kv_ranks} a block, {gib(planned.stored_bytes)} each"
    if spec.tensor_parallel == 1:
        return one
    copies = ", MLA is kept once" if planned.kv_ranks == 1 else ""
    return f"{one} (tensor parallel {spec.tensor_parallel}{copies})"


def _layout(spec: KVCacheSpec) -> str:
    match spec.store_layout:
        case StoreLayout.FILE:
            return f"file, hash directories {levels_text(spec.file_levels)}"
        case StoreLayout.OBJECT:
            return f"object, parts of {spec.object_part_mib} MiB, {spec.io_limit_s:g} s an operation at most"
        case StoreLayout.NULL:
            return "null: nothing is stored, the client is measured"
        case other:
            return str(other)


def _io(spec: KVCacheSpec) -> str:
    threads = "1 thread" if spec.threads == 1 else f"{spec.threads} threads"
    parts = [f"{spec.io_engine}, {spec.depth} objects in flight, {threads}"]
    if spec.io_engine is IoEngineName.THREADS:
        parts.append(f"priority {spec.io_priority}")
    if spec.store_layout in FILE_LAYOUTS:
        parts += [f"direct {spec.direct}", f"write sync {spec.write_sync}"]
    return ", ".join([*parts, f"verify {spec.verify}"])


def _policies(spec: KVCacheSpec) -> str:
    """Those that are not the default ones, by their flags."""
    fields = type(spec).model_fields
    changed = [
        f"{option.flags[0].removeprefix('--')} {value_text(getattr(spec, name))}"
        for name, option in spec.options().items()
        if option.group == POLICY and getattr(spec, name) != fields[name].default
    ]
    kept = [text for text, wanted in (("reuses the cache", spec.reuse_cache), ("keeps it", spec.keep_cache)) if wanted]
    return ", ".join([*changed, *kept]) or "the default ones"


def _shown(name: str, value: object) -> object:
    return value_text(tuple(value)) if name == "file_levels" and isinstance(value, list) else value


def _block_note(spec: KVCacheSpec) -> str:
    return "the trace's own blocks, or groups of them" if spec.trace else "padded to 4 KiB"


def _lines(rows: Iterable[Sequence[str]]) -> list[str]:
    pairs = list(rows)
    width = max(len(name) for name, _ in pairs)
    return [f"  {name:<{width}}  {text}" for name, text in pairs]
