"""From a spec to what a rank plays."""

from functools import partial

from mlpstorage.config import Arrivals, Decisions, Placement
from mlpstorage.kvcache.synthetic import Mix
from mlpstorage.kvcache.traces import Trace, open_trace
from mlpstorage.kvcache.workload import (
    TracePlay,
    Workload,
    dealt_arrivals,
    trace_workload,
    user_arrivals,
    user_workload,
)
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.spec.workload import DEFAULT_BLOCK_TOKENS


def with_settled_load(spec: KVCacheSpec, ranks: int) -> KVCacheSpec:
    """The spec with what was left to the program of the load settled: trace format, block size, arrivals, decisions.

    Looks into the trace where there is one.

    Raises:
        MissingFileError: There is no such trace.
        AccessError: It may not be read.
        ConfigurationError: It is of no known format.
    """
    trace = None if spec.trace is None else open_trace(spec.trace, spec.trace_format)
    arrivals = spec.arrivals or _arrivals(spec, trace)
    own_tokens = None if trace is None else trace.block_tokens
    return spec.model_copy(
        update={
            "trace_format": None if trace is None else trace.format,
            "block_tokens": spec.block_tokens or own_tokens or DEFAULT_BLOCK_TOKENS,
            "arrivals": arrivals,
            "decisions": spec.decisions or _decisions(spec, arrivals, ranks),
        }
    )


def build_workload(spec: KVCacheSpec, rank: int, ranks: int) -> Workload:
    """What `rank` plays, of a spec whose load is settled.

    Raises:
        MLPStorageError: See `trace_workload`.
    """
    assert spec.block_tokens is not None, "settled"
    assert spec.arrivals is not None, "settled"
    if spec.trace is not None:
        play = TracePlay(
            arrivals=spec.arrivals,
            block_tokens=spec.block_tokens,
            time_scale=spec.time_scale,
            spread_s=spec.spread_arrivals,
            request_rate_per_s=spec.request_rate,
            max_requests=spec.max_requests,
            seed=spec.seed,
            users=spec.num_users,
            placement=spec.placement,
        )
        return trace_workload(open_trace(spec.trace, spec.trace_format), play, rank=rank, ranks=ranks)
    mix = Mix(weights=spec.mix, rag_num_docs=spec.rag_num_docs)
    multi_turn = not spec.disable_multi_turn
    if spec.request_rate is None:
        return user_workload(mix, spec.num_users, spec.seed + rank, spec.block_tokens, multi_turn=multi_turn)
    # Independent Poisson processes of a rank each are one of all ranks together.
    arrivals = partial(
        user_arrivals,
        mix,
        spec.num_users,
        block_tokens=spec.block_tokens,
        rate_per_s=spec.request_rate / ranks,
        multi_turn=multi_turn,
    )
    if spec.placement is Placement.SESSION or ranks == 1:
        return arrivals(seed=spec.seed + rank)
    return dealt_arrivals([arrivals(seed=spec.seed + number) for number in range(ranks)], rank)


def _arrivals(spec: KVCacheSpec, trace: Trace | None) -> Arrivals:
    if spec.request_rate is not None:
        return Arrivals.OPEN
    if trace is None:
        return Arrivals.CLOSED
    return Arrivals.SESSION if trace.has_think_times else Arrivals.OPEN


def _decisions(spec: KVCacheSpec, arrivals: Arrivals, ranks: int) -> Decisions:
    """At arrival where two runs can do the same, and are meant to end with the same requests."""
    repeats = arrivals is Arrivals.OPEN and spec.max_requests is not None and ranks == 1
    return Decisions.ARRIVAL if repeats and spec.timed_policy is None else Decisions.COMPLETION
