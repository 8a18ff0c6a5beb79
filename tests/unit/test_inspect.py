"""What `trace inspect` counts: a trace worked by hand, and the published counts of the conversation trace."""

import json
from pathlib import Path

import pytest

from mlpstorage.config import TouchOrder
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.inspect import inspect_trace

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
CONVERSATION = TRACES / "conversation_trace.jsonl"
AGENTIC = TRACES / "agentic"


def small_trace(path: Path) -> Path:
    """Four requests of 1,100, 600, 1,100 and 1,500 tokens; the third is the first again.

    Without a limit: request 1 finds nothing; request 2 finds block 1; request 3 finds its three blocks; request 4 finds
    block 1 only, although its third block was seen before: the second one was not. Five of eleven blocks.
    """
    rows = [(1_100, 10, [1, 2, 3]), (600, 20, [1, 4]), (1_100, 30, [1, 2, 3]), (1_500, 60, [1, 5, 3])]
    path.write_text(
        "".join(
            json.dumps({"timestamp": 0, "input_length": tokens, "output_length": output, "hash_ids": ids}) + "\n"
            for tokens, output, ids in rows
        )
    )
    return path


def test_a_small_trace_gives_the_counts_worked_by_hand(tmp_path: Path) -> None:
    """Tokens found: 512 + 1,100 (the third block is partial, and counts its 76 tokens) + 512, of 4,300."""
    facts = inspect_trace(small_trace(tmp_path / "t.jsonl"), [], TouchOrder.TAIL).as_dict()
    assert facts == {
        "format": "mooncake",
        "requests": 4,
        "sessions": None,
        "duration_s": 0.0,
        "mean_input_tokens": 1_075.0,
        "p50_input_tokens": 1_100,
        "max_input_tokens": 1_500,
        "mean_output_tokens": 30.0,
        "p50_output_tokens": 20,
        "max_output_tokens": 60,
        "block_tokens": 512,
        "blocks": 11,
        "unique_blocks": 5,
        "hit_blocks": 5,
        "hit_ratio_blocks": pytest.approx(5 / 11),
        "hit_tokens": 2_124,
        "hit_ratio_tokens": pytest.approx(2_124 / 4_300),
        "p50_hit_tokens": 512,  # of 0, 512, 512, 1,100
        "p50_new_tokens": 88,  # of 0, 88, 988, 1,100
        "reads_per_write": 1.0,  # 5 found, 5 different ones written
        # Six reuses: too few for any percentile.
        "reuse_distance": {"p50_blocks": None, "p90_blocks": None, "p99_blocks": None, "sampled_one_in": 1},
        "capacities": [],
        "warnings": {},
    }


@pytest.mark.parametrize(
    ("touch", "hits"),
    [
        # What a cache of three holds after each request, oldest first. Tail first: 3 2 1; request 2 finds 1 and leaves
        # 2 4 1; request 3 finds 1 and 2 and leaves 3 2 1; request 4 finds 1.
        (TouchOrder.TAIL, [0, 4, 5]),
        # Head first: 1 2 3; request 2 finds 1 and leaves 3 1 4; request 3 finds 1 and leaves 1 2 3; request 4 finds 1.
        (TouchOrder.HEAD, [0, 3, 5]),
    ],
)
def test_limited_caches_find_what_was_worked_by_hand(tmp_path: Path, touch: TouchOrder, hits: list[int]) -> None:
    """A cache of no block finds nothing, one of three loses some, one that holds all five finds as much as any."""
    facts = inspect_trace(small_trace(tmp_path / "t.jsonl"), [0, 3, 5], touch).as_dict()
    assert facts["capacities"] == [
        {
            "capacity_blocks": capacity,
            "touch": touch.value,
            "hit_blocks": found,
            "hit_ratio_blocks": pytest.approx(found / 11),
        }
        for capacity, found in zip([0, 3, 5], hits, strict=True)
    ]


def test_the_touch_order_decides_in_a_small_cache(tmp_path: Path) -> None:
    """A chain of three in a cache of two leaves its head there when touched tail first, and else only its tail."""
    path = tmp_path / "t.jsonl"
    row = {"timestamp": 0, "input_length": 1_536, "output_length": 1, "hash_ids": [1, 2, 3]}
    path.write_text(f"{json.dumps(row)}\n" * 2)
    found = {touch: inspect_trace(path, [2], touch).capacities[0].hit_blocks for touch in TouchOrder}
    assert found == {TouchOrder.TAIL: 2, TouchOrder.HEAD: 0}


def test_the_facts_are_plain_json(tmp_path: Path) -> None:
    """They go to standard output as they are."""
    facts = inspect_trace(small_trace(tmp_path / "t.jsonl"), [3], TouchOrder.HEAD).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert '"touch": "head"' in json.dumps(facts)


def test_a_broken_trace_is_refused(tmp_path: Path) -> None:
    """Counts of the part before a broken line would be taken for those of the trace."""
    path = small_trace(tmp_path / "t.jsonl")
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ConfigurationError, match="line 5"):
        inspect_trace(path, [], TouchOrder.TAIL)


def test_blocks_of_another_size_are_full_ones_only(tmp_path: Path) -> None:
    """In blocks of 1,024 tokens the prompts have 1, 0, 1 and 1: ids 2, none, 2 and 5; the third is found."""
    facts = inspect_trace(small_trace(tmp_path / "t.jsonl"), [1], TouchOrder.TAIL, block_tokens=1_024)
    assert (facts.block_tokens, facts.blocks, facts.unique_blocks) == (1_024, 3, 2)
    assert (facts.hit_blocks, facts.hit_tokens, facts.reads_per_write) == (1, 1_024, 0.5)
    assert facts.capacities[0].hit_blocks == 1


def test_a_prompt_below_one_block_is_no_division_by_zero(tmp_path: Path) -> None:
    """Where no prompt fills a block, ratios of blocks are not to be had, and tokens found are none."""
    facts = inspect_trace(small_trace(tmp_path / "t.jsonl"), [7], TouchOrder.TAIL, block_tokens=2_048)
    assert (facts.blocks, facts.unique_blocks, facts.hit_blocks, facts.hit_tokens) == (0, 0, 0, 0)
    assert (facts.hit_ratio_blocks, facts.reads_per_write, facts.hit_ratio_tokens) == (None, None, 0.0)
    assert facts.capacities[0].hit_ratio_blocks is None


def test_what_a_format_cannot_tell_is_none(tmp_path: Path) -> None:
    """A table of lengths has no blocks, so nothing about them is 0; its lengths and times are counted."""
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Model,Request tokens,Response tokens\n5,a,100,7\n9,a,300,9\n11,a,0,0\n")
    facts = inspect_trace(path, [3], TouchOrder.HEAD)
    assert (facts.requests, facts.duration_s, facts.mean_input_tokens, facts.max_output_tokens) == (2, 4.0, 200.0, 9)
    without_ids = ("block_tokens", "blocks", "unique_blocks", "hit_blocks", "hit_ratio_blocks", "hit_tokens")
    for name in (*without_ids, "hit_ratio_tokens", "p50_hit_tokens", "p50_new_tokens", "reads_per_write"):
        assert getattr(facts, name) is None
    assert facts.sessions is None
    assert facts.reuse_distance is None
    assert [(one.capacity_blocks, one.hit_blocks, one.hit_ratio_blocks) for one in facts.capacities] == [
        (3, None, None)
    ]
    assert list(facts.warnings.values()) == [1]
    with pytest.raises(ConfigurationError, match="no block ids to group"):
        inspect_trace(path, [], TouchOrder.TAIL, block_tokens=512)


@pytest.mark.skipif(not AGENTIC.is_dir(), reason=f"the agentic traces are not at {AGENTIC}")
@pytest.mark.parametrize(("touch", "found"), [(TouchOrder.HEAD, 7_251), (TouchOrder.TAIL, 47_907)])
def test_the_agentic_traces_give_the_published_counts(touch: TouchOrder, found: int) -> None:
    """122 requests, 138,281 blocks, 14,822 different ones, 123,459 found; a cache of 1,000 as published."""
    facts = inspect_trace(AGENTIC, [1_000], touch)
    assert (facts.requests, facts.sessions, facts.block_tokens) == (122, 10, 64)
    assert (facts.blocks, facts.unique_blocks, facts.hit_blocks) == (138_281, 14_822, 123_459)
    assert facts.capacities[0].hit_blocks == found
    assert facts.reads_per_write == pytest.approx(123_459 / 14_822)


@pytest.mark.skipif(not CONVERSATION.is_file(), reason=f"the conversation trace is not at {CONVERSATION}")
def test_the_conversation_trace_gives_the_published_counts() -> None:
    """12,031 requests, 288,500 blocks, 105,710 of them found without a limit; a limit never finds more."""
    facts = inspect_trace(CONVERSATION, [1_000, 10_000, 182_790], TouchOrder.TAIL)
    assert (facts.requests, facts.blocks, facts.unique_blocks) == (12_031, 288_500, 182_790)
    assert facts.hit_blocks == 105_710
    assert round(facts.mean_input_tokens, 2) == 12_035.06
    assert round(facts.mean_output_tokens, 2) == 342.62
    assert facts.hit_ratio_blocks == pytest.approx(0.3664, abs=0.00005)
    assert facts.hit_ratio_tokens == pytest.approx(0.3736, abs=0.00005)
    assert facts.reads_per_write == pytest.approx(0.6, abs=0.05)  # the chat pole of the published table
    small, medium, whole = (capacity.hit_blocks or 0 for capacity in facts.capacities)
    assert 0 < small < medium < whole == 105_710
