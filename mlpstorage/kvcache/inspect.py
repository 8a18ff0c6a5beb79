"""What a trace offers to a prefix cache: its size, its reuse, and what caches of given capacities would find.

Counted with the engine's own index (`LruSet`, `leading_run`, `in_touch_order`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlpstorage.config import TouchOrder, TraceFormat
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.index import LruSet, in_touch_order, leading_run
from mlpstorage.kvcache.traces import Trace, TraceRequest, check_block_tokens, full_block_ids, open_trace, regroup
from mlpstorage.measure.reuse import ReuseDistance


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityFacts:
    """What a cache of `capacity_blocks` blocks finds; None where the trace has no block ids.

    Attributes:
        capacity_blocks: Blocks that the cache holds at most.
        touch: Order in which a request's blocks become recent.
        hit_blocks: Blocks found, all requests together.
        hit_ratio_blocks: Those of all blocks, 0 to 1.
    """

    capacity_blocks: int
    touch: TouchOrder
    hit_blocks: int | None
    hit_ratio_blocks: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseFacts:
    """Distinct blocks used between two uses of the same block, over all uses but the first of each block.

    Attributes:
        p50_blocks: Median; None with too few reuses, here and below.
        p90_blocks: 90th percentile.
        p99_blocks: 99th percentile.
        sampled_one_in: 1 where all blocks were tracked; N where one in N stands for the rest.
    """

    p50_blocks: int | None
    p90_blocks: int | None
    p99_blocks: int | None
    sampled_one_in: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFacts:
    """Counts of a trace; what its format cannot tell is None.

    A request finds its leading run of blocks that are in the cache before any of its own are inserted. In the trace's
    own blocks a partial last block of a prompt counts; in blocks of another size only full ones do.

    Attributes:
        format: How the trace is written.
        requests: Number of requests.
        sessions: Number of sessions.
        duration_s: From the first request to the last, seconds.
        mean_input_tokens: Mean length of a prompt.
        p50_input_tokens: Median length of a prompt.
        max_input_tokens: The longest prompt.
        mean_output_tokens: Mean length of an answer.
        p50_output_tokens: Median length of an answer.
        max_output_tokens: The longest answer.
        block_tokens: Tokens of a block.
        blocks: Blocks of all prompts.
        unique_blocks: Different blocks among them.
        hit_blocks: Blocks that a cache without limit finds.
        hit_ratio_blocks: Those of all blocks, 0 to 1.
        hit_tokens: Tokens of those blocks; a partial block counts its own tokens.
        hit_ratio_tokens: Those of all prompt tokens, 0 to 1.
        p50_hit_tokens: Median over the requests of the tokens found.
        p50_new_tokens: Median over the requests of the prompt tokens not found.
        reads_per_write: Blocks that a cache without limit reads for each one that it writes: found over different ones,
            as each is written once.
        reuse_distance: How far back the last uses lie.
        capacities: Blocks found by caches with a limit.
        warnings: What was amended or left out, and how often.
    """

    format: TraceFormat
    requests: int
    sessions: int | None
    duration_s: float
    mean_input_tokens: float
    p50_input_tokens: int
    max_input_tokens: int
    mean_output_tokens: float
    p50_output_tokens: int
    max_output_tokens: int
    block_tokens: int | None
    blocks: int | None
    unique_blocks: int | None
    hit_blocks: int | None
    hit_ratio_blocks: float | None
    hit_tokens: int | None
    hit_ratio_tokens: float | None
    p50_hit_tokens: int | None
    p50_new_tokens: int | None
    reads_per_write: float | None
    reuse_distance: ReuseFacts | None
    capacities: tuple[CapacityFacts, ...]
    warnings: Mapping[str, int]

    def as_dict(self) -> dict[str, object]:
        """The facts as plain JSON values, under their attribute names."""
        facts = asdict(self)
        facts["format"] = self.format.value
        facts["capacities"] = [asdict(capacity) | {"touch": capacity.touch.value} for capacity in self.capacities]
        return facts


def inspect_trace(
    path: Path,
    capacities: Sequence[int],
    touch: TouchOrder,
    *,
    trace_format: TraceFormat | None = None,
    block_tokens: int | None = None,
) -> TraceFacts:
    """Count a trace once through, with one cache without limit and one for each of `capacities`.

    Args:
        path: The trace.
        capacities: Sizes of caches with a limit, in blocks.
        touch: Order in which a request's blocks become recent.
        trace_format: How it is written; None to find out.
        block_tokens: Count in blocks of so many tokens; None for the trace's own.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: The trace is empty or broken, or blocks of `block_tokens` cannot be made of its own.
    """
    trace = open_trace(path, trace_format)
    blocks = _Blocks(trace, capacities, touch, block_tokens)
    warnings: Counter[str] = Counter()
    inputs, outputs = _Lengths(), _Lengths()
    first_s, last_s, last_session = None, 0.0, -1
    for request in trace.requests(warnings=warnings):
        first_s = request.timestamp_s if first_s is None else first_s
        last_s = request.timestamp_s
        last_session = max(last_session, request.session)
        inputs.add(request.input_tokens)
        outputs.add(request.output_tokens)
        blocks.play(request)
    assert first_s is not None, "a trace without requests was refused"
    found = blocks.found
    with_ids = blocks.block_tokens is not None
    hit_tokens = found.total
    return TraceFacts(
        format=trace.format,
        requests=inputs.count,
        sessions=last_session + 1 if trace.has_sessions else None,
        duration_s=last_s - first_s,
        mean_input_tokens=inputs.total / inputs.count,
        p50_input_tokens=inputs.median,
        max_input_tokens=inputs.most,
        mean_output_tokens=outputs.total / outputs.count,
        p50_output_tokens=outputs.median,
        max_output_tokens=outputs.most,
        block_tokens=blocks.block_tokens,
        blocks=blocks.count if with_ids else None,
        unique_blocks=len(blocks.unlimited.held) if with_ids else None,
        hit_blocks=blocks.unlimited.hit_blocks if with_ids else None,
        hit_ratio_blocks=_ratio(blocks.unlimited.hit_blocks, blocks.count),
        hit_tokens=hit_tokens if with_ids else None,
        hit_ratio_tokens=hit_tokens / inputs.total if with_ids else None,
        p50_hit_tokens=found.median if with_ids else None,
        p50_new_tokens=blocks.new.median if with_ids else None,
        reads_per_write=_ratio(blocks.unlimited.hit_blocks, len(blocks.unlimited.held)),
        reuse_distance=blocks.reuse_facts() if with_ids else None,
        capacities=blocks.capacity_facts(),
        warnings=dict(warnings),
    )


class _Lengths:
    """Exact mean, median and maximum of lengths: counts of each length, which are far fewer than requests."""

    __slots__ = ("_counts", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        """Count one."""
        self.count += 1
        self.total += length
        self._counts[length] += 1

    @property
    def median(self) -> int:
        """The length that half of them do not exceed (nearest rank)."""
        seen = 0
        for length in sorted(self._counts):
            seen += self._counts[length]
            if 2 * seen >= self.count:
                return length
        raise AssertionError("there is no median of nothing")

    @property
    def most(self) -> int:
        """The greatest."""
        return max(self._counts)


class _Blocks:
    """The caches that the trace is played to, all at once."""

    def __init__(self, trace: Trace, capacities: Sequence[int], touch: TouchOrder, block_tokens: int | None) -> None:
        if block_tokens is not None:
            if trace.block_tokens is None:
                raise ConfigurationError(
                    f"--block-tokens: the {trace.format} format has no block ids to group; leave the flag out"
                )
            check_block_tokens(trace.block_tokens, block_tokens)
        self.block_tokens = block_tokens or trace.block_tokens
        self.unlimited = _Cache(None, touch)
        self.count = 0
        self.found, self.new = _Lengths(), _Lengths()
        self._trace = trace
        self._regrouped_tokens = block_tokens
        self._capacities = capacities
        self._touch = touch
        self._limited = [_Cache(capacity, touch) for capacity in capacities]
        self._reuse = ReuseDistance()

    def play(self, request: TraceRequest) -> None:
        """Look the request up in every cache, then store its blocks there."""
        if self.block_tokens is None:
            return
        ids = self._ids(request)
        self.count += len(ids)
        found_tokens = min(self.unlimited.play(ids) * self.block_tokens, request.input_tokens)
        self.found.add(found_tokens)
        self.new.add(request.input_tokens - found_tokens)
        for cache in self._limited:
            cache.play(ids)
        self._reuse.touch(in_touch_order(ids, self._touch))

    def capacity_facts(self) -> tuple[CapacityFacts, ...]:
        """What the caches with a limit found."""
        return tuple(
            CapacityFacts(
                capacity_blocks=capacity,
                touch=self._touch,
                hit_blocks=cache.hit_blocks if self.block_tokens is not None else None,
                hit_ratio_blocks=_ratio(cache.hit_blocks, self.count),
            )
            for capacity, cache in zip(self._capacities, self._limited, strict=True)
        )

    def reuse_facts(self) -> ReuseFacts:
        """How far back the last uses lie."""
        return ReuseFacts(
            p50_blocks=self._reuse.percentile(50),
            p90_blocks=self._reuse.percentile(90),
            p99_blocks=self._reuse.percentile(99),
            sampled_one_in=self._reuse.sample_weight,
        )

    def _ids(self, request: TraceRequest) -> tuple[int, ...]:
        if self._regrouped_tokens is None:
            return request.block_ids or ()
        assert self._trace.block_tokens is not None, "checked when this was made"
        return regroup(full_block_ids(request, self._trace), self._trace.block_tokens, self._regrouped_tokens)


class _Cache:
    """One tier that every block goes to, and the count of what was found there."""

    __slots__ = ("_touch", "held", "hit_blocks")

    def __init__(self, capacity_blocks: int | None, touch: TouchOrder) -> None:
        self.held = LruSet(capacity_blocks)
        self.hit_blocks = 0
        self._touch = touch

    def play(self, block_ids: Sequence[int]) -> int:
        """Look one request up, then store its blocks; returns the blocks found."""
        found = leading_run(block_ids, (self.held,))
        for block_id in in_touch_order(block_ids, self._touch):
            self.held.insert(block_id)
        self.hit_blocks += found
        return found


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
