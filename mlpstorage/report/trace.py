"""What a trace holds, and what became of it, as text."""

from collections.abc import Mapping

from mlpstorage.kvcache.inspect import CapacityFacts, ReuseFacts, TraceFacts
from mlpstorage.kvcache.traces.convert import Converted

_NO_IDS = "n/a: the format has no block ids"
_NO_SESSIONS = "n/a: the format has no sessions"


def trace_facts_text(facts: TraceFacts) -> str:
    """Counts of a trace, and what caches of several sizes would find."""
    rows = [
        ("format", facts.format.value),
        ("requests", f"{facts.requests:,}"),
        ("sessions", _NO_SESSIONS if facts.sessions is None else f"{facts.sessions:,}"),
        ("duration", f"{facts.duration_s:,.1f} s"),
        ("mean input tokens", f"{facts.mean_input_tokens:,.2f}"),
        ("median, longest input", f"{facts.p50_input_tokens:,}, {facts.max_input_tokens:,}"),
        ("mean output tokens", f"{facts.mean_output_tokens:,.2f}"),
        ("median, longest output", f"{facts.p50_output_tokens:,}, {facts.max_output_tokens:,}"),
        *_block_rows(facts),
        *((f"found in {cache.capacity_blocks:,} blocks", _capacity(cache)) for cache in facts.capacities),
    ]
    return _table(rows) + _warnings(facts.warnings)


def converted_text(converted: Converted) -> str:
    """What was written, and what was lost."""
    rows = [
        ("written", str(converted.out)),
        ("requests", f"{converted.requests:,}"),
        ("blocks", f"{converted.blocks:,}"),
        ("distinct blocks", f"{converted.unique_blocks:,}"),
    ]
    if converted.lost:
        rows.append(("lost", f"{', '.join(converted.lost)} (the mooncake format has no room for them)"))
    return _table(rows) + _warnings(converted.warnings)


def _block_rows(facts: TraceFacts) -> list[tuple[str, str]]:
    if facts.block_tokens is None or facts.hit_blocks is None or facts.reuse_distance is None:
        return [("blocks", _NO_IDS)]
    ratios = f"{_percent(facts.hit_ratio_blocks)} of the blocks, {_percent(facts.hit_ratio_tokens)} of the tokens"
    reads = "n/a" if facts.reads_per_write is None else f"{facts.reads_per_write:,.2f}"
    return [
        ("tokens of a block", f"{facts.block_tokens:,}"),
        ("blocks", f"{facts.blocks:,}"),
        ("distinct blocks", f"{facts.unique_blocks:,}"),
        ("found without limit", f"{facts.hit_blocks:,} ({ratios})"),
        ("median request", f"{facts.p50_hit_tokens:,} tokens found, {facts.p50_new_tokens:,} new"),
        ("reads per write", reads),
        ("reuse distance", _reuse(facts.reuse_distance)),
    ]


def _reuse(reuse: ReuseFacts) -> str:
    named = (("p50", reuse.p50_blocks), ("p90", reuse.p90_blocks), ("p99", reuse.p99_blocks))
    text = ", ".join(f"{name} {'n/a' if value is None else f'{value:,}'}" for name, value in named)
    return f"{text} blocks" + (f" (one block in {reuse.sampled_one_in} sampled)" if reuse.sampled_one_in > 1 else "")


def _capacity(cache: CapacityFacts) -> str:
    if cache.hit_blocks is None:
        return _NO_IDS
    return f"{cache.hit_blocks:,} ({_percent(cache.hit_ratio_blocks)} of the blocks, touched {cache.touch} first)"


def _percent(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{ratio:.2%}"


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows)


def _warnings(warnings: Mapping[str, int]) -> str:
    return "".join(f"warning: {text} ({count:,} times)\n" for text, count in warnings.items())
