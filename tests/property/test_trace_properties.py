"""Reuse distances and converted traces against brute-force models, over random chains."""

import json
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.config import TouchOrder
from mlpstorage.kvcache.inspect import inspect_trace
from mlpstorage.kvcache.traces import open_trace, regroup
from mlpstorage.kvcache.traces.convert import convert_trace
from mlpstorage.measure.histogram import bucket_of
from mlpstorage.measure.reuse import ReuseDistance

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=200)

USES = st.lists(st.integers(0, 30) | st.integers(0, 2**64 - 1), max_size=120)


@deterministic
@given(uses=USES, cuts=st.lists(st.integers(0, 120), max_size=4))
def test_distances_are_counted_exactly_while_all_blocks_are_tracked(uses: list[int], cuts: list[int]) -> None:
    """The distance is the number of different blocks between two uses of the same one, however the calls are cut."""
    wanted: Counter[int] = Counter()
    for place, block_id in enumerate(uses):
        before = [earlier for earlier in range(place) if uses[earlier] == block_id]
        if before:
            wanted[bucket_of(len(set(uses[before[-1] + 1 : place])))] += 1
    reuse = ReuseDistance()
    edges = sorted({0, len(uses), *(min(cut, len(uses)) for cut in cuts)})
    for start, end in pairwise(edges):
        reuse.touch(uses[start:end])
    assert reuse.distances == dict(wanted)
    assert reuse.first_uses == len(set(uses))
    assert reuse.reuses == len(uses) - len(set(uses))


@deterministic
@given(uses=USES, max_tracked=st.integers(1, 20))
def test_a_sample_stays_small_and_keeps_the_sum(uses: list[int], max_tracked: int) -> None:
    """Whatever is sampled: weights are positive and add up to the reuses, and no more blocks are held than allowed."""
    reuse = ReuseDistance(max_tracked)
    for start in range(0, len(uses), 10):
        reuse.touch(uses[start : start + 10])
        assert len(reuse._last) == len(reuse._tracked_uses) <= max_tracked
        assert reuse._tracked_uses == sorted(reuse._last.values())
    assert all(weight > 0 for weight in reuse.distances.values())
    assert sum(reuse.distances.values()) == reuse.reuses
    assert reuse.uses == len(uses)


@deterministic
@given(chain=st.lists(st.integers(0, 2**64 - 1), max_size=40), size=st.integers(1, 8), block=st.sampled_from([16, 64]))
def test_regrouping_keeps_the_last_id_of_every_full_group(chain: list[int], size: int, block: int) -> None:
    """Against cutting the list into groups and dropping the last one if it is short."""
    groups = [chain[start : start + size] for start in range(0, len(chain), size)]
    assert regroup(tuple(chain), block, block * size) == tuple(group[-1] for group in groups if len(group) == size)


# A prompt is a list of parts of 256 tokens, of four sorts, and an end below that.
PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=7), st.integers(0, 255)).filter(any),
    min_size=1,
    max_size=12,
)


def bailian_file(place: Path, prompts: list[tuple[list[int], int]]) -> Path:
    """The prompts as a trace in blocks of 16 tokens, each known by its own content."""
    lines = []
    for chat, (parts, end) in enumerate(prompts):
        ids = [part * 16 + piece for part in parts for piece in range(16)]
        ids += [1_000 + piece for piece in range(end // 16)]
        if end % 16:
            ids.append(2_000 + end)
        row = {"chat_id": chat, "parent_chat_id": -1, "timestamp": chat, "output_length": 1, "hash_ids": ids}
        lines.append(json.dumps(row | {"input_length": 256 * len(parts) + end}) + "\n")
    path = place / "source.jsonl"
    path.write_text("".join(lines))
    return path


def full_blocks_found(prompts: list[tuple[list[int], int]]) -> int:
    """Blocks of 512 tokens found in a cache without limit: longest equal beginning with any prompt before."""
    found = 0
    for number, (parts, _) in enumerate(prompts):
        pairs = [tuple(parts[start : start + 2]) for start in range(0, len(parts) - 1, 2)]
        seen = {
            tuple(earlier[: 2 * length])
            for earlier, _ in prompts[:number]
            for length in range(1, len(earlier) // 2 + 1)
        }
        found += sum(tuple(parts[: 2 * length]) in seen for length in range(1, len(pairs) + 1))
    return found


@deterministic
@given(prompts=PROMPTS)
def test_a_converted_trace_finds_the_same_full_blocks(prompts: list[tuple[list[int], int]]) -> None:
    """Source and converted trace, both in full blocks of 512, find what the prompts' own equality says."""
    with tempfile.TemporaryDirectory() as name:
        source, out = bailian_file(Path(name), prompts), Path(name) / "out.jsonl"
        convert_trace(source, out)
        facts = [inspect_trace(path, [2], TouchOrder.TAIL, block_tokens=512) for path in (source, out)]
        lengths = [[one.input_tokens for one in open_trace(path).requests()] for path in (source, out)]
    assert facts[0].hit_blocks == facts[1].hit_blocks == full_blocks_found(prompts)
    assert facts[0].capacities == facts[1].capacities
    assert (facts[0].blocks, facts[0].unique_blocks) == (facts[1].blocks, facts[1].unique_blocks)
    assert lengths[0] == lengths[1] == [256 * len(parts) + end for parts, end in prompts]
