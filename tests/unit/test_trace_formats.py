"""The line formats besides mooncake, how a format is found, and packed files."""

import gzip
import json
import re
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from mlpstorage.config import TraceFormat
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.traces import TraceRequest, open_trace
from mlpstorage.kvcache.traces.bailian import ORPHAN
from mlpstorage.kvcache.traces.tables import FAILED, NO_PROMPT

MOONCAKE_LINE = '{"timestamp": 7, "input_length": 513, "output_length": 9, "hash_ids": [4, 5]}\n'
BURSTGPT_HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def bailian_line(
    chat: object = 0,
    parent: object = -1,
    timestamp: object = 0.0,
    tokens: object = 20,
    output: object = 1,
    ids: object = (1, 2),
) -> str:
    """One line of a bailian trace, with any value replaced."""
    row = {
        "chat_id": chat,
        "parent_chat_id": parent,
        "timestamp": timestamp,
        "input_length": tokens,
        "output_length": output,
        "type": "text",
        "turn": 1,
        "hash_ids": ids,
    }
    return json.dumps(row) + "\n"


CONVERSATION = json.dumps(
    {"id": "c", "block_size": 64, "requests": [{"t": 0, "type": "n", "in": 64, "out": 1, "hash_ids": [1]}]}
)

SAMPLES = {
    TraceFormat.MOONCAKE: MOONCAKE_LINE,
    TraceFormat.AGENTIC: CONVERSATION,
    TraceFormat.BAILIAN: bailian_line(),
    TraceFormat.BURSTGPT: BURSTGPT_HEADER + "5,ChatGPT,472,18,490,Conversation log\n",
    TraceFormat.AZURE: AZURE_HEADER + "2023-11-16 18:17:03.9799600,4808,10\n",
}


def written(path: Path, text: str) -> Path:
    """A file of the given text."""
    path.write_text(text)
    return path


def read(
    path: Path, trace_format: TraceFormat | None = None, warnings: Counter[str] | None = None
) -> list[TraceRequest]:
    """All requests of the trace."""
    return list(open_trace(path, trace_format).requests(warnings=warnings))


def zstd(data: bytes) -> bytes:
    """Packed by the package itself."""
    return zstandard.ZstdCompressor().compress(data)


class TestBailian:
    """The format of Alibaba's Bailian traces."""

    def test_equal_prefixes_have_equal_ids_and_equal_blocks_alone_have_not(self, tmp_path: Path) -> None:
        """The ids of a prompt are equal to another's as far as both begin alike, and nowhere else."""
        chains = [(1, 2, 3), (1, 2, 4), (2, 2, 3), (1, 2, 3, 1), (3,), (2,), (1, 1, 1)]
        text = "".join(bailian_line(chat, tokens=16 * len(ids), ids=ids) for chat, ids in enumerate(chains))
        got = [request.block_ids or () for request in read(written(tmp_path / "t", text))]
        prefixes = {ids[: end + 1]: None for ids in chains for end in range(len(ids))}
        by_prefix = {
            ids[: end + 1]: block_id
            for ids, block_ids in zip(chains, got, strict=True)
            for end, block_id in enumerate(block_ids)
        }
        for ids, block_ids in zip(chains, got, strict=True):
            assert block_ids == tuple(by_prefix[ids[: end + 1]] for end in range(len(ids)))
        assert len(set(by_prefix.values())) == len(prefixes)
        assert all(0 <= block_id < 2**64 for block_id in by_prefix.values())

    def test_ids_are_the_same_at_every_reading(self, tmp_path: Path) -> None:
        """Ranks read the trace each for itself, so the hash must not depend on the process: a value kept here."""
        path = written(tmp_path / "t", bailian_line(ids=(1, 2)))
        (request,) = read(path)
        assert request.block_ids == (3439722301264460078, 14218548282796293256)

    def test_a_chat_belongs_to_the_session_of_its_parent(self, tmp_path: Path) -> None:
        """Sessions count from 0 in order of appearance, turns within them in order of time, forks included."""
        rows = [(10, -1), (11, -1), (12, 10), (13, 12), (14, 10), (15, 11)]
        text = "".join(bailian_line(chat, parent, place) for place, (chat, parent) in enumerate(rows))
        requests = read(written(tmp_path / "t", text))
        assert [(one.session, one.turn) for one in requests] == [(0, 0), (1, 0), (0, 1), (0, 2), (0, 3), (1, 1)]
        assert [one.timestamp_s for one in requests] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert all(one.after == () for one in requests)

    def test_a_parent_outside_of_the_trace_is_counted(self, tmp_path: Path) -> None:
        """A window cut out of a longer trace has children without parents: each begins a session."""
        warnings: Counter[str] = Counter()
        text = bailian_line(5, 4) + bailian_line(6, 3) + bailian_line(7, 6)
        requests = read(written(tmp_path / "t", text), warnings=warnings)
        assert [(one.session, one.turn) for one in requests] == [(0, 0), (1, 0), (1, 1)]
        assert warnings == {ORPHAN: 2}

    @pytest.mark.parametrize(
        ("broken", "what"),
        [
            ("{", "not JSON"),
            ("[1]", "not a JSON object"),
            (MOONCAKE_LINE, "the key 'chat_id' is missing"),
            (bailian_line(chat="1"), "chat_id and parent_chat_id must be"),
            (bailian_line(parent=None), "chat_id and parent_chat_id must be"),
            (bailian_line(chat=77), "chat_id 77 was used above"),
            (bailian_line(timestamp=-1), "timestamp must be"),
            (bailian_line(timestamp="1"), "timestamp must be"),
            (bailian_line(tokens=0, ids=[]), "input_length must be"),
            (bailian_line(tokens=-16, ids=[]), "input_length must be"),
            (bailian_line(output=-1), "output_length must be"),
            (bailian_line(ids=[1, -2]), "hash_ids must be"),
            (bailian_line(tokens=32, ids=[1]), "input_length 32 makes 2 blocks of 16 tokens, but hash_ids has 1"),
            (bailian_line(tokens=33, ids=[1, 2]), "input_length 33 makes 3 blocks of 16 tokens, but hash_ids has 2"),
            (bailian_line(timestamp=4.9), "its timestamp lies before"),
        ],
    )
    def test_a_broken_line_is_refused_with_its_number(self, tmp_path: Path, broken: str, what: str) -> None:
        """The line before it is read; the message names file and line, and the exit code is 5."""
        path = written(tmp_path / "t", bailian_line(77, timestamp=5) + "\n" + broken)
        requests = open_trace(path).requests()
        assert next(requests).turn == 0
        with pytest.raises(ConfigurationError, match=f"{re.escape(str(path))}, line 3: .*{re.escape(what)}") as caught:
            next(requests)
        assert caught.value.exit_code == 5


class TestTables:
    """BurstGPT and Azure."""

    def test_a_burstgpt_row_gives_time_and_lengths(self, tmp_path: Path) -> None:
        """There are no block ids, every request is a session, and times are seconds."""
        text = BURSTGPT_HEADER + "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1,230,231,API log\n"
        trace = open_trace(written(tmp_path / "t", text))
        assert (trace.block_tokens, trace.has_partial_block, trace.has_sessions) == (None, False, False)
        first, second = trace.requests()
        assert (first.place, first.timestamp_s, first.input_tokens, first.output_tokens) == ("line 2", 5.0, 472, 18)
        assert (second.timestamp_s, second.input_tokens, second.output_tokens) == (45.5, 1, 230)
        assert [(one.block_ids, one.session, one.turn, one.after) for one in (first, second)] == [
            (None, 0, 0, ()),
            (None, 1, 0, ()),
        ]

    def test_columns_are_found_by_name(self, tmp_path: Path) -> None:
        """The second release has more columns in another order; names may have a byte order mark before them."""
        header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        text = "\N{ZERO WIDTH NO-BREAK SPACE}" + header + '7.0,"a, b",43,GPT-4,906,446,1352,Conversation log\n'
        (request,) = read(written(tmp_path / "t", text))
        assert (request.timestamp_s, request.input_tokens, request.output_tokens) == (7.0, 906, 446)

    def test_failed_requests_are_left_out_and_counted(self, tmp_path: Path) -> None:
        """As in the publisher's files without failures; most of them have no prompt either."""
        text = BURSTGPT_HEADER + "1,a,0,0,0,x\n2,a,9,0,9,x\n3,a,9,1,10,x\n4,a,0,5,5,x\n"
        warnings: Counter[str] = Counter()
        requests = read(written(tmp_path / "t", text), warnings=warnings)
        assert [(one.place, one.session) for one in requests] == [("line 4", 0)]
        assert warnings == {FAILED: 2, NO_PROMPT: 1}

    def test_azure_times_count_from_the_first_request(self, tmp_path: Path) -> None:
        """Seven fractional digits, six with an offset, or none: all are times; a day is 86,400 s."""
        text = AZURE_HEADER + (
            "2023-11-16 18:17:03.9799600,4808,10\n"
            "2023-11-16 18:17:04.0319600,3180,0\n"
            "2023-11-16 18:17:05,1,8\n"
            "2023-11-17 19:17:03.979960+01:00,110,27\n"
        )
        requests = read(written(tmp_path / "t", text))
        assert [one.timestamp_s for one in requests] == pytest.approx([0.0, 0.052, 1.02004, 86_400.0], abs=1e-9)
        assert [(one.input_tokens, one.output_tokens) for one in requests] == [(4808, 10), (3180, 0), (1, 8), (110, 27)]

    @pytest.mark.parametrize(
        ("header", "good", "broken", "what"),
        [
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "6,a,1", "3 cells, but the first line names 6 columns"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", '6,"a', "not CSV"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "4.5,a,1,1,2,x", "its timestamp lies before"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "-6,a,1,1,2,x", "Timestamp must be"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "nan,a,1,1,2,x", "Timestamp must be"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "1e99,a,1,1,2,x", "Timestamp must be"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "6,a,-1,1,2,x", "Request tokens must be"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "6,a,1.5,1,2,x", "Request tokens must be"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "6,a,1_0,1,2,x", "Request tokens must be"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", "6,a,1,,2,x", "Response tokens must be"),
            (BURSTGPT_HEADER, "5,a,1,1,2,x", f"6,a,1,{'9' * 5000},2,x", "Response tokens must be"),
            (AZURE_HEADER, "2023-11-16 18:17:03,1,1", "yesterday,1,1", "TIMESTAMP must be a time such as"),
            (AZURE_HEADER, "2023-11-16 18:17:03,1,1", "5,1,1", "TIMESTAMP must be a time such as"),
            (AZURE_HEADER, "2023-11-16 18:17:03,1,1", "2023-11-16 18:17:02.9,1,1", "its timestamp lies before"),
            (AZURE_HEADER, "2023-11-16 18:17:03,1,1", "2023-11-16 18:17:03,x,1", "ContextTokens must be"),
        ],
    )
    def test_a_broken_row_is_refused_with_its_line(
        self, tmp_path: Path, header: str, good: str, broken: str, what: str
    ) -> None:
        """The rows before it are read; the header is line 1, so the second row is line 3."""
        path = written(tmp_path / "t", f"{header}{good}\n{broken}\n")
        requests = open_trace(path).requests()
        next(requests)
        with pytest.raises(ConfigurationError, match=f"{re.escape(str(path))}, line 3: .*{re.escape(what)}") as caught:
            next(requests)
        assert caught.value.exit_code == 5

    def test_a_table_without_rows_holds_no_request(self, tmp_path: Path) -> None:
        """A header alone, or failures alone, would make an empty run."""
        for name, text in (("header", BURSTGPT_HEADER), ("failures", BURSTGPT_HEADER + "1,a,0,0,0,x\n")):
            with pytest.raises(ConfigurationError, match="holds no request"):
                read(written(tmp_path / name, text))


class TestDetection:
    """Which format a file has."""

    @pytest.mark.parametrize("trace_format", TraceFormat)
    @pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
    def test_every_format_is_known_by_its_content(
        self, tmp_path: Path, trace_format: TraceFormat, pack: Callable[[bytes], bytes]
    ) -> None:
        """Whatever the file's name says, packed or not, with blank lines before."""
        path = tmp_path / "trace.csv.gz"
        path.write_bytes(pack(b"\n \n" + SAMPLES[trace_format].encode()))
        trace = open_trace(path)
        assert trace.format is trace_format
        assert len(list(trace.requests())) == 1

    def test_a_conversation_over_many_lines_is_known(self, tmp_path: Path) -> None:
        """A JSON document may be pretty-printed, and its block size may stand behind the requests."""
        document = json.loads(CONVERSATION)
        for name, text in (
            ("indented", json.dumps(document, indent=2)),
            ("size last", json.dumps({"requests": document["requests"], "block_size": 64})),
            ("indented, size last", json.dumps({"requests": document["requests"], "block_size": 64}, indent=1)),
        ):
            assert open_trace(written(tmp_path / name, text)).format is TraceFormat.AGENTIC

    def test_a_first_line_longer_than_the_look_is_known(self, tmp_path: Path) -> None:
        """A prompt of two million blocks, whose line does not end within what is looked at."""
        line = bailian_line(tokens=16 * 200_000, ids=list(range(10**9, 10**9 + 200_000)))
        assert len(line) > 1 << 20
        assert open_trace(written(tmp_path / "t", line)).format is TraceFormat.BAILIAN

    @pytest.mark.parametrize(
        "text",
        ["hello\n", "{}\n", "{", "[1, 2]\n", "a,b,c\n1,2,3\n", '{"timestamp": 1}\n', "\x00\x01\x02", '"unclosed\n'],
    )
    def test_a_file_of_another_format_is_refused_with_what_was_looked_for(self, tmp_path: Path, text: str) -> None:
        """The message names file, line and the five formats."""
        path = written(tmp_path / "t", "\n" + text)
        with pytest.raises(ConfigurationError, match=f"{re.escape(str(path))}, line 2: not the beginning") as caught:
            open_trace(path)
        assert caught.value.exit_code == 5
        assert all(trace_format.value in str(caught.value) for trace_format in TraceFormat)

    @pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"", mtime=0), zstd(b"")])
    def test_an_empty_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        """Packed or not."""
        path = tmp_path / "t"
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="holds no request"):
            open_trace(path)

    @pytest.mark.parametrize("given", TraceFormat)
    @pytest.mark.parametrize("real", TraceFormat)
    def test_a_format_that_does_not_fit_fails_at_the_first_record(
        self, tmp_path: Path, given: TraceFormat, real: TraceFormat
    ) -> None:
        """With file and line. Only a bailian line is a mooncake line too, if it has the blocks for it: not here."""
        path = written(tmp_path / "t", SAMPLES[real])
        if given is real:
            assert len(read(path, given)) == 1
            return
        with pytest.raises(ConfigurationError, match=f"{re.escape(str(path))}, line 1: ") as caught:
            read(path, given)
        assert caught.value.exit_code == 5


class TestPackedFiles:
    """gzip and zstd."""

    @pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
    def test_parts_packed_one_by_one_are_one_file(self, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
        """As `cat` of several packed files makes it."""
        path = tmp_path / "t"
        path.write_bytes(pack(MOONCAKE_LINE.encode()) + pack(MOONCAKE_LINE.encode() * 3))
        assert len(read(path)) == 4

    @pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
    def test_an_archive_that_is_cut_off_is_refused(self, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
        """The message names the file and the last line that could be read; the requests before were given out."""
        text = "".join(
            json.dumps({"timestamp": n, "input_length": 1, "output_length": n * 7919 % 1000, "hash_ids": [n]}) + "\n"
            for n in range(50_000)
        )
        packed = pack(text.encode())
        path = tmp_path / "t"
        path.write_bytes(packed[: len(packed) * 9 // 10])
        requests = open_trace(path).requests()
        seen: list[TraceRequest] = []
        with pytest.raises(ConfigurationError, match=r"t: the archive is cut off after line (\d+); get") as caught:
            seen.extend(requests)
        assert caught.value.exit_code == 5
        assert 20_000 < len(seen) < 50_000
        assert f"after line {len(seen)};" in str(caught.value)

    def test_a_damaged_archive_is_refused(self, tmp_path: Path) -> None:
        """A flipped byte in the middle is no end of the trace, but the end of the reading."""
        lines = "".join(MOONCAKE_LINE.replace("9", str(n * 7919 % 1000)) for n in range(20_000)).encode()
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        for name, packed in (("gzip", gzip.compress(lines)), ("zstd", compressor.compress(lines))):
            broken = bytearray(packed)
            for place in range(len(broken) // 2, len(broken) // 2 + 64):
                broken[place] ^= 0xA5
            path = tmp_path / name
            path.write_bytes(broken)
            with pytest.raises(ConfigurationError, match=f"{name}(: the archive is damaged|, line )") as caught:
                read(path)
            assert caught.value.exit_code == 5

    @pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
    def test_a_conversation_that_is_cut_off_is_refused(self, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
        """A document has no lines to count: the message says how much was unpacked."""
        packed = pack(CONVERSATION.encode())
        path = tmp_path / "t"
        path.write_bytes(packed[:-6])
        with pytest.raises(ConfigurationError, match="the archive is cut off"):
            read(path, TraceFormat.AGENTIC)

    def test_a_missing_package_is_named_with_its_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The package is optional: without it a zstd file is refused, with what to install."""
        path = tmp_path / "t"
        path.write_bytes(zstd(MOONCAKE_LINE.encode()))
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(ConfigurationError, match=r"needs the package zstandard .*pip install 'mlpstorage\[zstd\]'"):
            open_trace(path)


def peak_bytes_of_reading(path: Path) -> int:
    """Most memory that Python took while the trace was read as a stream."""
    tracemalloc.start()
    try:
        requests = sum(1 for _ in open_trace(path).requests())
        assert requests >= 3_000
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """A trace of 4 MB unpacked, and one three times as long, take the same few buffers."""
    peaks = []
    for name, count in (("once", 3_000), ("thrice", 9_000)):
        text = "".join(
            json.dumps({"timestamp": n, "input_length": 102_400, "output_length": 1, "hash_ids": [*range(n, n + 200)]})
            + "\n"
            for n in range(100_000, 100_000 + count)
        )
        path = tmp_path / name
        path.write_bytes(pack(text.encode()))
        peaks.append(peak_bytes_of_reading(path))
    assert len(text) > 12_000_000
    assert peaks[1] < 1.2 * peaks[0] < 8_000_000
