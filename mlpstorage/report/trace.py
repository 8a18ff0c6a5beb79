"""What a trace holds, as text."""

from mlpstorage.kvcache.inspect import TraceFacts


def trace_facts_text(facts: TraceFacts) -> str:
    """Counts of a trace, and what caches of several sizes would find."""
    ratios = f"{facts.hit_ratio_blocks:.2%} of the blocks, {facts.hit_ratio_tokens:.2%} of the tokens"
    rows = [
        ("requests", f"{facts.requests:,}"),
        ("mean input tokens", f"{facts.mean_input_tokens:,.2f}"),
        ("mean output tokens", f"{facts.mean_output_tokens:,.2f}"),
        ("blocks", f"{facts.blocks:,}"),
        ("distinct blocks", f"{facts.unique_blocks:,}"),
        ("found without limit", f"{facts.hit_blocks:,} ({ratios})"),
    ]
    for cache in facts.capacities:
        found = f"{cache.hit_blocks:,} ({cache.hit_ratio_blocks:.2%} of the blocks, touched {cache.touch} first)"
        rows.append((f"found in {cache.capacity_blocks:,} blocks", found))
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows)
