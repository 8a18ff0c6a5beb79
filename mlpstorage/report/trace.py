"""What a trace holds, as text."""

from mlpstorage.kvcache.inspect import TraceFacts


def trace_facts_text(facts: TraceFacts) -> str:
    """Counts of a trace, and what caches of several sizes would find."""
    lines = [
        f"requests              {facts.requests:,}",
        f"mean input tokens     {facts.mean_input_tokens:,.2f}",
        f"mean output tokens    {facts.mean_output_tokens:,.2f}",
        f"blocks                {facts.blocks:,} ({facts.unique_blocks:,} distinct)",
        f"found without limit   {facts.hit_blocks:,} blocks, {facts.hit_ratio_blocks:.2%} of all; "
        f"{facts.hit_ratio_tokens:.2%} of the tokens",
    ]
    lines += [
        f"found in {row.capacity_blocks:>12,} blocks ({row.touch} first)   {row.hit_blocks:,}, {row.hit_ratio_blocks:.2%}"
        for row in facts.capacities
    ]
    return "\n".join(lines) + "\n"
