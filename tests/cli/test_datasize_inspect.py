"""`kvcache datasize` and `kvcache trace inspect`: numbers without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Cli

CONVERSATION = Path(__file__).resolve().parents[3] / "shared" / "traces" / "conversation_trace.jsonl"


def test_datasize_of_llama(cli: Cli) -> None:
    """llama3.1-8b keeps 2 x 32 layers x 8 heads x 128 values x 2 bytes = 131,072 bytes a token; nothing is created."""
    ended = cli.run("kvcache", "datasize", "--model", "llama3.1-8b", "--num-users", "100", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    assert document["bytes_per_token"] == 131_072
    assert document["num_users"] == 100
    assert list(cli.place.iterdir()) == []


def test_datasize_as_text(cli: Cli) -> None:
    """The text names the bytes of a token."""
    ended = cli.run("kvcache", "datasize", "--model", "llama3.1-8b")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "131,072" in ended.stdout


def test_inspect_counts_a_small_trace(cli: Cli) -> None:
    """Counts of four requests, worked out by hand, with caches of any and of two blocks."""
    rows = [
        (1500, [1, 2, 3]),  # finds nothing
        (1500, [1, 2, 4]),  # finds 1 2
        (600, [5, 2]),  # finds nothing: 2 is behind a missing block
        (1024, [1, 2]),  # finds 1 2
    ]
    trace = cli.place / "trace.jsonl"
    trace.write_text(
        "\n".join(
            json.dumps({"timestamp": n, "input_length": tokens, "output_length": 10 * n, "hash_ids": ids})
            for n, (tokens, ids) in enumerate(rows)
        )
    )
    ended = cli.run("kvcache", "trace", "inspect", trace, "--capacity-blocks", "2", "--touch", "tail", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    # Two blocks, tail first. After 3 2 1: {2, 1}. Request 2 finds 1 2; after 4 2 1: {2, 1}. Request 3 finds nothing;
    # after 2 5: {2, 5}. Request 4 finds nothing, as 1 is gone.
    wanted = {
        "requests": 4,
        "mean_input_tokens": (1500 + 1500 + 600 + 1024) / 4,
        "mean_output_tokens": 15,
        "blocks": 10,
        "unique_blocks": 5,
        "hit_blocks": 4,
        "hit_ratio_blocks": 0.4,
        "hit_ratio_tokens": 4 * 512 / 4624,
        "capacities": [{"capacity_blocks": 2, "touch": "tail", "hit_blocks": 2, "hit_ratio_blocks": 0.2}],
    }
    facts = json.loads(ended.stdout)
    assert {key: facts[key] for key in wanted} == wanted


def test_inspect_refuses_a_broken_trace(cli: Cli) -> None:
    """A broken line: exit 5, file and line are named; a missing file: exit 3."""
    trace = cli.place / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\nno JSON\n')
    broken = cli.run("kvcache", "trace", "inspect", trace)
    assert broken.returncode == 5
    assert f"{trace}, line 2:" in broken.stderr
    missing = cli.run("kvcache", "trace", "inspect", cli.place / "none.jsonl")
    assert missing.returncode == 3
    assert "none.jsonl" in missing.stderr


def test_inspect_counts_the_conversation_trace(cli: Cli) -> None:
    """The published Mooncake conversation trace gives the counts that were published for it."""
    if not CONVERSATION.is_file():
        pytest.skip(f"{CONVERSATION} is not here; the trace is no part of the repository")
    ended = cli.run("kvcache", "trace", "inspect", CONVERSATION, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    facts = json.loads(ended.stdout)
    assert facts["requests"] == 12_031
    assert facts["mean_input_tokens"] == pytest.approx(12_035.06, abs=0.005)
    assert facts["mean_output_tokens"] == pytest.approx(342.62, abs=0.005)
    assert facts["blocks"] == 288_500
    assert facts["unique_blocks"] == 182_790
    assert facts["hit_blocks"] == 105_710
    assert facts["hit_ratio_blocks"] == pytest.approx(0.3664, abs=0.00005)
    assert facts["hit_ratio_tokens"] == pytest.approx(0.3736, abs=0.00005)
