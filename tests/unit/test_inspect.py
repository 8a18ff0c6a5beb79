"""What `trace inspect` counts: a trace worked by hand, and the published counts of the conversation trace."""

import json
from pathlib import Path

import pytest

from mlpstorage.config import TouchOrder
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.inspect import inspect_trace

CONVERSATION = Path(__file__).resolve().parents[3] / "shared" / "traces" / "conversation_trace.jsonl"

KEYS = [
    "requests",
    "mean_input_tokens",
    "mean_output_tokens",
    "blocks",
    "unique_blocks",
    "hit_blocks",
    "hit_ratio_blocks",
    "hit_ratio_tokens",
    "capacities",
]


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
    assert list(facts) == KEYS
    assert facts == {
        "requests": 4,
        "mean_input_tokens": 1_075.0,
        "mean_output_tokens": 30.0,
        "blocks": 11,
        "unique_blocks": 5,
        "hit_blocks": 5,
        "hit_ratio_blocks": pytest.approx(5 / 11),
        "hit_ratio_tokens": pytest.approx(2_124 / 4_300),
        "capacities": [],
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


@pytest.mark.skipif(not CONVERSATION.is_file(), reason=f"the conversation trace is not at {CONVERSATION}")
def test_the_conversation_trace_gives_the_published_counts() -> None:
    """12,031 requests, 288,500 blocks, 105,710 of them found without a limit; a limit never finds more."""
    facts = inspect_trace(CONVERSATION, [1_000, 10_000, 182_790], TouchOrder.TAIL)
    assert (facts.requests, facts.blocks, facts.unique_blocks) == (12_031, 288_500, 182_790)
    assert facts.hit_blocks == 105_710
    assert round(facts.mean_input_tokens, 2) == 12_035.06
    assert round(facts.mean_output_tokens, 2) == 342.62
    assert round(facts.hit_ratio_blocks, 4) == 0.3664
    assert round(facts.hit_ratio_tokens, 4) == 0.3736
    small, medium, whole = (capacity.hit_blocks for capacity in facts.capacities)
    assert 0 < small < medium < whole == 105_710
