"""`trace convert`: what is written, and that it has the same prefixes."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from mlpstorage.config import TouchOrder, TraceFormat
from mlpstorage.errors import ConfigurationError, MissingFileError, RunError
from mlpstorage.kvcache.inspect import inspect_trace
from mlpstorage.kvcache.traces.convert import convert_trace

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
AGENTIC = TRACES / "agentic"
CONVERSATION = TRACES / "conversation_trace.jsonl"


def conversation(path: Path) -> Path:
    """A conversation of four requests over blocks of 64 tokens.

    Prompts: 8 blocks and 3 tokens; the same once more; the same and 2 blocks and 3 tokens; 16 blocks exactly.
    """
    eight, sixteen = list(range(8)), list(range(16))
    rows = [(0, 515, eight), (1.5, 515, eight), (2, 643, [*eight, 8, 9]), (3.0001, 1_024, sixteen)]
    document = {
        "block_size": 64,
        "requests": [{"t": t, "type": "n", "in": size, "out": 9, "hash_ids": ids} for t, size, ids in rows],
    }
    path.write_text(json.dumps(document))
    return path


def rows_of(path: Path) -> list[dict[str, object]]:
    """What stands in a converted trace."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation_is_written_in_blocks_of_512(tmp_path: Path) -> None:
    """Full blocks are equal where all before them is; the end that has no id is nobody else's, not even its twin's."""
    converted = convert_trace(conversation(tmp_path / "t.json"), tmp_path / "out.jsonl")
    assert rows_of(tmp_path / "out.jsonl") == [
        {"timestamp": 0, "input_length": 515, "output_length": 9, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 515, "output_length": 9, "hash_ids": [0, 2]},
        {"timestamp": 2000, "input_length": 643, "output_length": 9, "hash_ids": [0, 3]},
        {"timestamp": 3000.1, "input_length": 1024, "output_length": 9, "hash_ids": [0, 4]},
    ]
    assert (converted.requests, converted.blocks, converted.unique_blocks) == (4, 8, 5)
    assert converted.lost == ("sessions", "think times")
    assert converted.source_format is TraceFormat.AGENTIC
    assert list(converted.warnings.values()) == [3]


def test_ends_with_ids_are_shared_by_equal_prompts_only(tmp_path: Path) -> None:
    """Bailian's ids reach the end: equal prompts share it, a longer one and one with another end do not."""
    chains = [(20, (1, 2)), (20, (1, 2)), (21, (1, 2)), (20, (1, 3)), (36, (1, 2, 3))]
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "chat_id": chat,
                    "parent_chat_id": -1,
                    "timestamp": chat,
                    "input_length": tokens,
                    "output_length": 1,
                    "hash_ids": ids,
                }
            )
            + "\n"
            for chat, (tokens, ids) in enumerate(chains)
        )
    )
    convert_trace(path, tmp_path / "out.jsonl")
    assert [row["hash_ids"] for row in rows_of(tmp_path / "out.jsonl")] == [[0], [0], [1], [2], [3]]


@pytest.mark.parametrize("source", [AGENTIC, CONVERSATION], ids=["agentic", "mooncake"])
def test_a_published_trace_keeps_its_prefixes(tmp_path: Path, source: Path) -> None:
    """Counts in full blocks of 512 are those of the source in full blocks of 512, in caches of three sizes."""
    if not source.exists():
        pytest.skip(f"no trace at {source}")
    out = tmp_path / "out.jsonl.gz"
    convert_trace(source, out)
    before, after = (
        inspect_trace(path, [100, 1_000], TouchOrder.TAIL, block_tokens=512).as_dict() for path in (source, out)
    )
    for name in ("format", "sessions", "warnings"):
        del before[name], after[name]
    assert isinstance(before["hit_blocks"], int)
    assert before["hit_blocks"] > 10_000
    assert before == after


def test_mooncake_stays_mooncake(tmp_path: Path) -> None:
    """Ids are numbered anew, partial blocks stay shared where they were."""
    path = tmp_path / "t.jsonl"
    rows = [(600, [9, 7]), (600, [9, 7]), (600, [9, 8]), (512, [9])]
    path.write_text(
        "".join(
            json.dumps({"timestamp": 5, "input_length": tokens, "output_length": 1, "hash_ids": ids}) + "\n"
            for tokens, ids in rows
        )
    )
    assert convert_trace(path, tmp_path / "out").lost == ()
    assert [row["hash_ids"] for row in rows_of(tmp_path / "out")] == [[0, 1], [0, 1], [0, 2], [0]]


def test_the_name_decides_on_packing(tmp_path: Path) -> None:
    """.gz and .zst are packed, with the same content; equal traces make equal files."""
    source = conversation(tmp_path / "t.json")
    for name in ("out", "out.gz", "again.gz", "out.zst"):
        convert_trace(source, tmp_path / name)
    plain = (tmp_path / "out").read_bytes()
    assert gzip.decompress((tmp_path / "out.gz").read_bytes()) == plain
    assert (tmp_path / "again.gz").read_bytes() == (tmp_path / "out.gz").read_bytes()
    with (tmp_path / "out.zst").open("rb") as file:
        assert zstandard.ZstdDecompressor().stream_reader(file).read() == plain


def test_a_file_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    """Without it the old content stays."""
    source = conversation(tmp_path / "t.json")
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"out exists; name another file, or replace it with --force"):
        convert_trace(source, out)
    assert out.read_text() == "mine"
    convert_trace(source, out, force=True)
    assert len(rows_of(out)) == 4


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    """A trace that breaks off in the middle, a directory that is missing or is the name itself: no part is left."""
    source = tmp_path / "t.jsonl"
    source.write_text('{"timestamp": 7, "input_length": 5, "output_length": 9, "hash_ids": [4]}\nbroken\n')
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(ConfigurationError, match="line 2"):
        convert_trace(source, place / "out")
    assert list(place.iterdir()) == []
    with pytest.raises(MissingFileError, match="there is no such directory"):
        convert_trace(source, place / "none" / "out")
    with pytest.raises(RunError, match="cannot be written"):
        convert_trace(conversation(tmp_path / "t.json"), place, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "t.json", "t.jsonl"]


def test_a_trace_without_ids_or_of_odd_blocks_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Mooncake is a format of ids; blocks of 48 tokens do not make up one of 512."""
    table = tmp_path / "t.csv"
    table.write_text("Timestamp,Request tokens,Response tokens\n1,2,3\n")
    with pytest.raises(ConfigurationError, match="the burstgpt format has no block ids"):
        convert_trace(table, tmp_path / "out")
    odd = tmp_path / "t.json"
    odd.write_text('{"block_size": 48, "requests": [{"t": 0, "type": "s", "in": 48, "out": 1, "hash_ids": [1]}]}')
    with pytest.raises(ConfigurationError, match="its blocks of 48 tokens do not make up mooncake's of 512"):
        convert_trace(odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()
