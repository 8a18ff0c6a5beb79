"""Reading mooncake traces, regrouping blocks, and playing a trace as an open loop."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlpstorage.config import TraceFormat
from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError
from mlpstorage.kvcache.traces import TraceRequest, check_block_tokens, full_block_ids, open_trace, regroup

CONVERSATION = Path(__file__).resolve().parents[3] / "shared" / "traces" / "conversation_trace.jsonl"

GOOD_LINE = '{"timestamp": 7, "input_length": 513, "output_length": 9, "hash_ids": [4, 5]}'


def line(timestamp: object = 0, tokens: object = 100, output: object = 1, ids: object = (1,)) -> str:
    """One line of a trace, with any value replaced."""
    row = {"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": ids}
    return json.dumps(row)


def written(path: Path, *lines: str) -> Path:
    """A trace file of the given lines."""
    path.write_text("".join(f"{text}\n" for text in lines))
    return path


def read_mooncake(path: Path, max_requests: int | None = None) -> Iterator[TraceRequest]:
    """The requests of the mooncake trace at `path`."""
    return open_trace(path, TraceFormat.MOONCAKE).requests(max_requests)


def five_requests(path: Path) -> Path:
    """Five requests, the first at 60 s, then one a second; 2 full blocks and a partial one each, the first shared."""
    return written(
        path,
        *(line(60_000 + 1_000 * number, 1_100, 10 + number, [0, 10 + number, 20 + number]) for number in range(5)),
    )


@contextmanager
def without_root() -> Iterator[None]:
    """Run as `nobody` where the tests run as root, whom no permission stops."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


class TestReadMooncake:
    """A trace of the mooncake format."""

    def test_records_hold_what_the_lines_say(self, tmp_path: Path) -> None:
        """Milliseconds become seconds; the partial last block keeps its id; the line number is the file's."""
        path = written(tmp_path / "t.jsonl", GOOD_LINE, line(1_500.5, 1_024, 0, [4, 2**64 - 1]))
        assert list(read_mooncake(path)) == [
            TraceRequest(
                place="line 1",
                timestamp_s=0.007,
                input_tokens=513,
                output_tokens=9,
                block_ids=(4, 5),
                session=0,
                turn=0,
                after=(),
            ),
            TraceRequest(
                place="line 2",
                timestamp_s=1.5005,
                input_tokens=1_024,
                output_tokens=0,
                block_ids=(4, 2**64 - 1),
                session=1,
                turn=0,
                after=(),
            ),
        ]

    def test_blank_lines_and_further_keys_are_passed_over(self, tmp_path: Path) -> None:
        """Blank lines count as lines but not as requests, and a missing newline at the end is no matter."""
        path = tmp_path / "t.jsonl"
        path.write_text(f'\n  \n{GOOD_LINE}\r\n\n{GOOD_LINE[:-1]}, "chat": "x"}}')
        assert [record.place for record in read_mooncake(path)] == ["line 3", "line 5"]

    def test_equal_times_are_in_order(self, tmp_path: Path) -> None:
        """Requests of one moment are allowed: the published trace rounds its times."""
        path = written(tmp_path / "t.jsonl", line(5), line(5), line(6))
        assert [record.timestamp_s for record in read_mooncake(path)] == [0.005, 0.005, 0.006]

    def test_no_line_behind_the_last_wanted_request_is_looked_at(self, tmp_path: Path) -> None:
        """With a limit, the rest of the file may be anything; without it, the broken line is found."""
        path = written(tmp_path / "t.jsonl", GOOD_LINE, GOOD_LINE, "broken")
        assert len(list(read_mooncake(path, max_requests=2))) == 2
        with pytest.raises(ConfigurationError, match="line 3"):
            list(read_mooncake(path))

    @pytest.mark.parametrize(
        ("broken", "what"),
        [
            ("{", "not JSON"),
            ("broken", "not JSON"),
            (GOOD_LINE[:-20], "not JSON"),
            (GOOD_LINE + GOOD_LINE, "not JSON"),
            ("[" * 100_000, "not JSON"),
            (GOOD_LINE.replace("513", "5" * 5_000), "not JSON"),
            ("[1, 2]", "not a JSON object"),
            ("null", "not a JSON object"),
            ('{"timestamp": 0, "input_length": 1, "output_length": 1}', "the key 'hash_ids' is missing"),
            ('{"t": 0, "in": 1, "out": 1, "hash_ids": [1]}', "the key 'timestamp' is missing"),
            (line(timestamp="0"), "timestamp must be"),
            (line(timestamp=True), "timestamp must be"),
            (line(timestamp=None), "timestamp must be"),
            (line(timestamp=-1), "timestamp must be"),
            (line(timestamp=float("nan")), "timestamp must be"),
            (line(timestamp=float("inf")), "timestamp must be"),
            (line(timestamp=10**400), "timestamp must be"),
            (line(tokens=0, ids=[]), "input_length must be"),
            (line(tokens=-5), "input_length must be"),
            (line(tokens=5.0), "input_length must be"),
            (line(tokens=True), "input_length must be"),
            (line(output=-1), "output_length must be"),
            (line(output=False), "output_length must be"),
            (line(output=2**63), "output_length must be"),
            (line(ids=3), "hash_ids must be"),
            (line(ids={"1": 1}), "hash_ids must be"),
            (line(ids=[True]), "hash_ids must be"),
            (line(ids=[1.0]), "hash_ids must be"),
            (line(ids=["1"]), "hash_ids must be"),
            (line(ids=[-1]), "hash_ids must be"),
            (line(ids=[2**64]), "hash_ids must be"),
            (line(tokens=513, ids=[1]), "input_length 513 makes 2 blocks of 512 tokens, but hash_ids has 1"),
            (line(tokens=512, ids=[1, 2]), "input_length 512 makes 1 blocks of 512 tokens, but hash_ids has 2"),
            (line(ids=[]), "input_length 100 makes 1 blocks of 512 tokens, but hash_ids has 0"),
            (line(timestamp=6), "its timestamp lies before that of the request above"),
        ],
    )
    def test_a_broken_line_is_refused_with_file_line_and_remedy(self, tmp_path: Path, broken: str, what: str) -> None:
        """The first line that is not a request ends the reading with exit code 5; the lines before it are read."""
        path = written(tmp_path / "t.jsonl", GOOD_LINE, "", broken, GOOD_LINE)
        records = read_mooncake(path)
        assert next(records).input_tokens == 513
        with pytest.raises(
            ConfigurationError, match=f"{re.escape(str(path))}, line 3: .*{re.escape(what)}.*; "
        ) as caught:
            next(records)
        assert caught.value.exit_code == 5
        assert len(str(caught.value).splitlines()) == 1

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        """A damaged file is told as such, not as a traceback."""
        path = tmp_path / "t.jsonl"
        path.write_bytes(GOOD_LINE.encode() + b"\n\x1f\x8b\x08\xff\n")
        with pytest.raises(ConfigurationError, match=r"line 2: not UTF-8 text; give a file with"):
            list(read_mooncake(path))

    @pytest.mark.parametrize("content", ["", "\n \n\n"])
    def test_a_trace_without_a_request_is_refused(self, tmp_path: Path, content: str) -> None:
        """An empty file would make an empty, and so a perfect, run."""
        path = tmp_path / "t.jsonl"
        path.write_text(content)
        with pytest.raises(ConfigurationError, match="holds no request") as caught:
            list(read_mooncake(path))
        assert caught.value.exit_code == 5

    @pytest.mark.parametrize("name", ["absent.jsonl", "t.jsonl/below-a-file.jsonl"])
    def test_a_missing_trace_has_its_own_exit_code(self, tmp_path: Path, name: str) -> None:
        """No such file: exit code 3, with the path."""
        written(tmp_path / "t.jsonl", GOOD_LINE)
        with pytest.raises(MissingFileError, match=re.escape(name)) as caught:
            list(read_mooncake(tmp_path / name))
        assert caught.value.exit_code == 3

    def test_a_trace_that_may_not_be_read_has_its_own_exit_code(self, tmp_path: Path) -> None:
        """No permission: exit code 4, with the path."""
        path = written(tmp_path / "t.jsonl", GOOD_LINE)
        path.chmod(0)
        with without_root(), pytest.raises(AccessError, match=r"t\.jsonl") as caught:
            list(read_mooncake(path))
        assert caught.value.exit_code == 4

    def test_a_directory_or_a_pipe_is_not_a_mooncake_trace(self, tmp_path: Path) -> None:
        """A pipe is refused at once: opening it would wait for a writer, and it cannot be read twice."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigurationError, match="not a regular file"):
            list(read_mooncake(tmp_path / "pipe"))
        with pytest.raises(ConfigurationError, match="mooncake format is a file, not a directory"):
            list(read_mooncake(tmp_path))

    @pytest.mark.skipif(not CONVERSATION.is_file(), reason=f"the conversation trace is not at {CONVERSATION}")
    def test_the_conversation_trace_is_read_whole(self) -> None:
        """12,031 requests with 288,500 blocks, 182,790 of them different, as published."""
        records = list(read_mooncake(CONVERSATION))
        assert len(records) == 12_031
        assert sum(len(record.block_ids or ()) for record in records) == 288_500
        assert len({block_id for record in records for block_id in record.block_ids or ()}) == 182_790


class TestBlocks:
    """Full blocks and their groups."""

    def test_a_partial_last_block_is_dropped(self, tmp_path: Path) -> None:
        """Only full blocks are stored: 1,025 tokens are two blocks and one token."""
        path = written(tmp_path / "t.jsonl", line(0, 1_025, 1, [1, 2, 3]), line(0, 1_024, 1, [1, 2]), line(0, 511))
        trace = open_trace(path)
        assert [full_block_ids(request, trace) for request in trace.requests()] == [(1, 2), (1, 2), ()]

    @pytest.mark.parametrize(
        ("block_tokens", "groups"),
        [(64, (1, 2, 3, 4, 5, 6, 7)), (128, (2, 4, 6)), (192, (3, 6)), (256, (4,)), (448, (7,)), (512, ())],
    )
    def test_blocks_are_grouped_upwards(self, block_tokens: int, groups: tuple[int, ...]) -> None:
        """A group takes the id of its last block, which stands for the whole prefix; an incomplete one is dropped."""
        check_block_tokens(64, block_tokens)
        assert regroup((1, 2, 3, 4, 5, 6, 7), 64, block_tokens) == groups

    @pytest.mark.parametrize(
        ("block_tokens", "what"),
        [
            (768, r"--block-tokens 768 is not a multiple of the trace's blocks of 512 tokens; give a multiple"),
            (256, r"--block-tokens 256 is smaller than .* 512 tokens.* id says nothing of its parts; give 512 or"),
        ],
    )
    def test_block_tokens_that_do_not_fit_are_refused_with_the_reason(self, block_tokens: int, what: str) -> None:
        """768 tokens are one and a half blocks of the trace, 256 a half of which nothing is known."""
        for call in (lambda: check_block_tokens(512, block_tokens), lambda: regroup((1, 2), 512, block_tokens)):
            with pytest.raises(ConfigurationError, match=what) as caught:
                call()
            assert caught.value.exit_code == 5
