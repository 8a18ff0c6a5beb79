"""What the numbers of a run mean, in words."""

from mlpstorage.report.text import bytes_text, percent_text, significant, time_text, with_unit
from mlpstorage.results.models import StorageCounts
from mlpstorage.results.summary import BreakEven, ReuseDistance, Saved, Summary, TtftParts, Window


def slower_than_recompute(summary: Summary) -> bool:
    """Whether reading from storage cost the requests that did it time, on the whole."""
    saved_ms = summary.breakeven.storage_saved_mean_ms
    return saved_ms is not None and saved_ms < 0


def ttft_text(summary: Summary) -> str:
    """Time to first token with the storage, and without it where that is known."""
    with_ms, without_ms = summary.latency["ttft"].p95_ms, summary.latency["ttft_without_storage"].p95_ms
    text = f"time to first token (TTFT) p95 {time_text(with_ms)}"
    return text if without_ms is None else f"{text} against {time_text(without_ms)} without it"


def goodput_text(summary: Summary) -> str:
    """How many requests a second met the target."""
    slo = summary.slo
    return (
        f"{significant(slo.goodput_per_s)} requests a second had their first token within "
        f"{time_text(slo.ttft_p95_ms_target)}, {percent_text(slo.within_target)} of all"
    )


def steady_text(window: Window) -> str:
    """Whether the warm-up did its work, where that was waited for."""
    if window.warmup_steady is None:
        return ""
    return ", to a steady hit ratio" if window.warmup_steady else ", in which the hit ratio did NOT become steady"


def parts_text(parts: TtftParts) -> str:
    """The parts of the mean TTFT."""
    named = (
        ("storage load", parts.storage_load_mean_ms),
        ("DRAM load", parts.dram_load_mean_ms),
        ("prefill queue", parts.prefill_queue_mean_ms),
        ("prefill", parts.prefill_mean_ms),
        ("client late", parts.client_late_mean_ms),
    )
    means = ", ".join(f"{name} {with_unit(significant(mean_ms), 'ms')}" for name, mean_ms in named)
    return f"{means} (means); storage is {percent_text(parts.storage_share)} of it"


def breakeven_text(breakeven: BreakEven) -> str:
    """Whether reading beat computing."""
    if not breakeven.storage_loads:
        return "no request read from storage"
    needed, got = significant(breakeven.read_gib_per_s_needed), significant(breakeven.load_gib_per_s)
    if breakeven.storage_slower_loads is None:
        return f"a request's load got {got} GiB/s; compute is not modelled (--accelerator none)"
    saved = significant(breakeven.storage_saved_mean_ms)
    return (
        f"a request's load got {got} GiB/s; reading beats computing above {needed} GiB/s "
        f"({significant(breakeven.prefill_tokens_per_s)} tokens/s). Saved by storage, mean: {saved} ms a request that "
        f"read; {breakeven.storage_slower_loads:,} of {breakeven.storage_loads:,} were slower than computing"
    )


def saved_text(saved: Saved) -> str:
    """What the cache saved the requests."""
    if not saved.requests:
        return "not known: compute is not modelled (--accelerator none)"
    return (
        f"by all tiers: TTFT {significant(saved.mean_ms)} ms mean, {significant(saved.p50_ms)} ms p50; "
        f"{saved.slower_requests:,} of {saved.requests:,} requests would have been faster without a cache"
    )


def reuse_text(reuse: ReuseDistance) -> str:
    """How large a cache would have to be."""
    return (
        f"{percent_text(reuse.first_use_share)} of the uses of blocks were first ones; half of the others were within "
        f"{with_unit(significant(reuse.p50_gib), 'GiB')} of different blocks, nine in ten within "
        f"{with_unit(significant(reuse.p90_gib), 'GiB')}"
    )


def writes_text(storage: StorageCounts) -> str:
    """What was written, and what was not."""
    return (
        f"{bytes_text(storage.written_bytes)} written; avoided: {bytes_text(storage.dedup_skipped_bytes)} that storage "
        f"had, {storage.writes_deferred:,} blocks at their first use, {storage.writes_dropped:,} blocks dropped"
    )
