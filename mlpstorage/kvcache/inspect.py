"""What a trace offers to a prefix cache: its size, its reuse, and what caches of given capacities would find.

Counted with the engine's own index (`LruSet`, `leading_run`, `in_touch_order`), in the trace's own blocks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlpstorage.config import TouchOrder
from mlpstorage.kvcache.index import LruSet, in_touch_order, leading_run
from mlpstorage.kvcache.traces import MOONCAKE_BLOCK_TOKENS, read_mooncake


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityFacts:
    """What a cache of `capacity_blocks` blocks finds.

    Attributes:
        capacity_blocks: Blocks that the cache holds at most.
        touch: Order in which a request's blocks become recent.
        hit_blocks: Blocks found, all requests together.
        hit_ratio_blocks: Those of all blocks, 0 to 1.
    """

    capacity_blocks: int
    touch: TouchOrder
    hit_blocks: int
    hit_ratio_blocks: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFacts:
    """Counts of a trace in its own blocks, a partial last block of a prompt included.

    A request finds its leading run of blocks that are in the cache before any of its own are inserted.

    Attributes:
        requests: Number of requests.
        mean_input_tokens: Mean length of a prompt.
        mean_output_tokens: Mean length of an answer.
        blocks: Blocks of all prompts.
        unique_blocks: Different blocks among them.
        hit_blocks: Blocks that a cache without limit finds.
        hit_ratio_blocks: Those of all blocks, 0 to 1.
        hit_ratio_tokens: Tokens of those blocks, of all prompt tokens, 0 to 1; a partial block counts its own tokens.
        capacities: The same for caches with a limit.
    """

    requests: int
    mean_input_tokens: float
    mean_output_tokens: float
    blocks: int
    unique_blocks: int
    hit_blocks: int
    hit_ratio_blocks: float
    hit_ratio_tokens: float
    capacities: tuple[CapacityFacts, ...]

    def as_dict(self) -> dict[str, object]:
        """The facts as plain JSON values, under their attribute names."""
        facts = asdict(self)
        facts["capacities"] = [asdict(capacity) | {"touch": capacity.touch.value} for capacity in self.capacities]
        return facts


def inspect_trace(path: Path, capacities: Sequence[int], touch: TouchOrder) -> TraceFacts:
    """Count a mooncake trace once through, with one cache without limit and one for each of `capacities`.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: The trace is empty or broken.
    """
    unlimited = _Cache(None, touch)
    limited = [_Cache(capacity, touch) for capacity in capacities]
    requests = input_tokens = output_tokens = blocks = hit_tokens = 0
    for record in read_mooncake(path):
        ids = record.block_ids
        requests += 1
        input_tokens += record.input_tokens
        output_tokens += record.output_tokens
        blocks += len(ids)
        hit_tokens += min(unlimited.play(ids) * MOONCAKE_BLOCK_TOKENS, record.input_tokens)
        for cache in limited:
            cache.play(ids)
    return TraceFacts(
        requests=requests,
        mean_input_tokens=input_tokens / requests,
        mean_output_tokens=output_tokens / requests,
        blocks=blocks,
        unique_blocks=len(unlimited.held),
        hit_blocks=unlimited.hit_blocks,
        hit_ratio_blocks=unlimited.hit_blocks / blocks,
        hit_ratio_tokens=hit_tokens / input_tokens,
        capacities=tuple(
            CapacityFacts(
                capacity_blocks=capacity,
                touch=touch,
                hit_blocks=cache.hit_blocks,
                hit_ratio_blocks=cache.hit_blocks / blocks,
            )
            for capacity, cache in zip(capacities, limited, strict=True)
        ),
    )


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
