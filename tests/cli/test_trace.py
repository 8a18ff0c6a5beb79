"""`kvcache trace inspect` and `kvcache trace convert` on every format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Cli

AGENTIC = Path(__file__).resolve().parents[3] / "shared" / "traces" / "agentic"

BAILIAN = (
    '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 33, "output_length": 2, "type": "text", '
    '"turn": 1, "hash_ids": [5, 5, 6]}\n'
    '{"chat_id": 2, "parent_chat_id": 1, "timestamp": 2, "input_length": 48, "output_length": 2, "type": "text", '
    '"turn": 2, "hash_ids": [5, 5, 7]}\n'
)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:04.9799600,50,8\n"


@pytest.mark.parametrize(("touch", "found"), [("head", 7_251), ("tail", 47_907)])
def test_inspect_counts_the_agentic_traces(cli: Cli, touch: str, found: int) -> None:
    """The published counts of the ten conversations, for both orders in which a cache of 1,000 blocks is touched."""
    if not AGENTIC.is_dir():
        pytest.skip(f"{AGENTIC} is not here; the traces are no part of the repository")
    ended = cli.run("kvcache", "trace", "inspect", AGENTIC, "--capacity-blocks", "1000", "--touch", touch, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    facts = json.loads(ended.stdout)
    assert (facts["format"], facts["requests"], facts["sessions"]) == ("agentic", 122, 10)
    assert (facts["blocks"], facts["unique_blocks"], facts["hit_blocks"]) == (138_281, 14_822, 123_459)
    assert facts["capacities"][0]["hit_blocks"] == found
    assert sum(facts["warnings"].values()) == 7


def test_inspect_counts_a_packed_bailian_trace(cli: Cli) -> None:
    """Equal blocks at different places are different: of six blocks five are, and two are found."""
    trace = cli.place / "trace"
    trace.write_bytes(gzip.compress(BAILIAN.encode()))
    ended = cli.run("kvcache", "trace", "inspect", trace, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    facts = json.loads(ended.stdout)
    assert (facts["format"], facts["sessions"], facts["duration_s"]) == ("bailian", 1, 1.5)
    assert (facts["blocks"], facts["unique_blocks"], facts["hit_blocks"]) == (6, 4, 2)


def test_inspect_says_what_a_format_cannot_tell(cli: Cli) -> None:
    """A table has neither blocks nor sessions: null in JSON, a reason in the text."""
    trace = cli.place / "trace.csv"
    trace.write_text(AZURE)
    ended = cli.run("kvcache", "trace", "inspect", trace, "--capacity-blocks", "5", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    facts = json.loads(ended.stdout)
    assert (facts["requests"], facts["mean_input_tokens"], facts["duration_s"]) == (2, 49.0, 1.0)
    assert (facts["blocks"], facts["sessions"], facts["reuse_distance"]) == (None, None, None)
    assert facts["capacities"] == [
        {"capacity_blocks": 5, "touch": "tail", "hit_blocks": None, "hit_ratio_blocks": None}
    ]
    shown = cli.run("kvcache", "trace", "inspect", trace, "--capacity-blocks", "5")
    assert shown.stdout.count("n/a: the format has no block ids") == 2
    assert "n/a: the format has no sessions" in shown.stdout


def test_inspect_regroups_blocks_upwards_only(cli: Cli) -> None:
    """In blocks of 32 tokens each prompt has one full block, the same; 24 and 8 are refused with the reason."""
    trace = cli.place / "trace"
    trace.write_text(BAILIAN)
    facts = json.loads(cli.run("kvcache", "trace", "inspect", trace, "--block-tokens", "32", "--json").stdout)
    assert (facts["block_tokens"], facts["blocks"], facts["unique_blocks"], facts["hit_blocks"]) == (32, 2, 1, 1)
    for size, why in (("24", "not a multiple"), ("8", "says nothing of its parts")):
        ended = cli.run("kvcache", "trace", "inspect", trace, "--block-tokens", size)
        assert (ended.returncode, ended.stdout) == (5, "")
        assert why in ended.stderr


def test_inspect_takes_a_format_by_name(cli: Cli) -> None:
    """A format that does not fit fails at the first record, with file and line; an unknown name is a usage error."""
    trace = cli.place / "trace"
    trace.write_text(BAILIAN)
    assert cli.run("kvcache", "trace", "inspect", trace, "--trace-format", "bailian").returncode == 0
    wrong = cli.run("kvcache", "trace", "inspect", trace, "--trace-format", "azure")
    assert wrong.returncode == 5
    assert f"{trace}, line 1: the column 'TIMESTAMP' is missing" in wrong.stderr
    assert cli.run("kvcache", "trace", "inspect", trace, "--trace-format", "csv").returncode == 2


def test_inspect_refuses_what_is_no_trace(cli: Cli) -> None:
    """A file of another format, a directory without conversations, a truncated archive: exit 5, in one line."""
    other = cli.place / "other"
    other.write_text("hello\n")
    empty = cli.place / "empty"
    empty.mkdir()
    cut = cli.place / "cut"
    cut.write_bytes(gzip.compress((BAILIAN * 1).encode())[:-9])
    for path, what in ((other, "line 1: not the beginning"), (empty, "no file *.json"), (cut, "archive is cut off")):
        ended = cli.run("kvcache", "trace", "inspect", path)
        assert (ended.returncode, ended.stdout) == (5, "")
        assert ended.stderr.startswith(f"mlpstorage: error: {path}")
        assert what in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_convert_writes_a_mooncake_trace(cli: Cli) -> None:
    """The new trace is read as one, and the text says what was lost; a second time it needs --force."""
    trace = cli.place / "trace"
    trace.write_text(BAILIAN)
    ended = cli.run("kvcache", "trace", "convert", trace, cli.place / "out.jsonl.zst")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "lost             sessions (the mooncake format has no room for them)" in ended.stdout
    facts = json.loads(cli.run("kvcache", "trace", "inspect", cli.place / "out.jsonl.zst", "--json").stdout)
    assert (facts["format"], facts["requests"], facts["blocks"], facts["hit_blocks"]) == ("mooncake", 2, 2, 0)
    again = cli.run("kvcache", "trace", "convert", trace, cli.place / "out.jsonl.zst", "--json")
    assert (again.returncode, again.stdout) == (5, "")
    assert "--force" in again.stderr
    forced = cli.run("kvcache", "trace", "convert", trace, cli.place / "out.jsonl.zst", "--json", "--force")
    assert json.loads(forced.stdout)["lost"] == ["sessions"]
    assert sorted(path.name for path in cli.place.iterdir()) == ["out.jsonl.zst", "trace"]


def test_convert_refuses_a_trace_without_block_ids(cli: Cli) -> None:
    """There is nothing to write into `hash_ids`: exit 5, with the reason, and no file."""
    trace = cli.place / "trace"
    trace.write_text(AZURE)
    ended = cli.run("kvcache", "trace", "convert", trace, cli.place / "out")
    assert (ended.returncode, ended.stdout) == (5, "")
    assert "the azure format has no block ids" in ended.stderr
    assert not (cli.place / "out").exists()


def test_help_says_that_sessions_are_lost(cli: Cli) -> None:
    """Who converts a trace should know before."""
    text = " ".join(cli.run("kvcache", "trace", "convert", "--help").stdout.split())
    assert "Sessions and think times have no place in that format and are lost." in text
