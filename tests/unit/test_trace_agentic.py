"""Agentic conversations: merged by time, ids of their own, and what each request waits for."""

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from mlpstorage.config import TraceFormat
from mlpstorage.errors import AccessError, ConfigurationError
from mlpstorage.kvcache.traces import After, TraceRequest, open_trace
from mlpstorage.kvcache.traces.conversation import EARLY_SUBAGENT, THINK_TIME_MISSING, THINK_TIME_TOO_LONG

AGENTIC = Path(__file__).resolve().parents[3] / "shared" / "traces" / "agentic"


def ask(
    t: object,
    ids: object = (1,),
    *,
    api: object = None,
    think: object = None,
    tokens: object = None,
    out: object = 5,
    kind: object = "n",
) -> dict[str, object]:
    """One request; its prompt ends somewhere in the block behind the last full one."""
    row: dict[str, object] = {"t": t, "type": kind, "in": tokens, "out": out, "hash_ids": ids}
    if tokens is None:
        assert isinstance(ids, tuple | list)
        row["in"] = 64 * len(ids) + 7
    if api is not None:
        row["api_time"] = api
    if think is not None:
        row["think_time"] = think
    return row


def agent(t: object, *requests: dict[str, object]) -> dict[str, object]:
    """A sub-agent."""
    return {"t": t, "type": "subagent", "requests": list(requests)}


def talk(path: Path, *requests: object, block_size: object = 64, **more: object) -> Path:
    """A conversation in a file."""
    document = {"id": path.name, "block_size": block_size, "requests": list(requests), **more}
    path.write_text(json.dumps(document))
    return path


def requests_of(path: Path, warnings: Counter[str] | None = None) -> list[TraceRequest]:
    """All requests, merged."""
    return list(open_trace(path).requests(warnings=warnings))


def waits(requests: list[TraceRequest]) -> list[list[tuple[int, float]]]:
    """What each waits for, as pairs."""
    return [[(one.turn, one.pause_s) for one in request.after] for request in requests]


class TestReading:
    """What a request holds."""

    def test_a_request_holds_what_the_document_says(self, tmp_path: Path) -> None:
        """Times count from the conversation's start; the block size is the document's; ids are full blocks."""
        trace = open_trace(talk(tmp_path / "t.json", ask(0, (7, 8)), ask(2.5, (7, 8, 9))))
        assert (trace.format, trace.block_tokens, trace.has_partial_block) == (TraceFormat.AGENTIC, 64, False)
        assert (trace.has_sessions, trace.has_think_times) == (True, True)
        first, second = trace.requests()
        assert (first.place, first.timestamp_s, first.input_tokens, first.output_tokens) == ("request 1", 0.0, 135, 5)
        assert (second.place, second.timestamp_s, second.session, second.turn) == ("request 2", 2.5, 0, 1)
        assert first.block_ids is not None
        assert second.block_ids is not None
        assert second.block_ids[:2] == first.block_ids
        assert len(set(second.block_ids)) == 3

    def test_ids_keep_their_pattern_whatever_the_prefixes(self, tmp_path: Path) -> None:
        """Prompts that grow, shrink, fork or start anew: equal ids of the file stay equal, different ones different."""
        chains = [(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4), (1, 9), (), (5,), (1, 9, 3), (2, 1)]
        path = talk(tmp_path / "t.json", *(ask(place, ids) for place, ids in enumerate(chains)))
        got = [request.block_ids or () for request in requests_of(path)]
        assert [len(ids) for ids in got] == [len(ids) for ids in chains]
        pairs = {pair for ids, block_ids in zip(chains, got, strict=True) for pair in zip(ids, block_ids, strict=True)}
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs}) == 6

    def test_local_ids_belong_to_their_file_and_global_ones_to_all(self, tmp_path: Path) -> None:
        """Block 1 of two conversations is not the same, unless the documents say so; a copy elsewhere is the same."""
        for name, more in (
            ("a", {}),
            ("b", {}),
            ("c", {"hash_id_scope": "global"}),
            ("d", {"hash_id_scope": "global"}),
        ):
            talk(tmp_path / f"{name}.json", ask(0, (1,)), **more)
        local_1, local_2, global_1, global_2 = (request.block_ids for request in requests_of(tmp_path))
        assert global_1 == global_2
        assert len({local_1, local_2, global_1}) == 3
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
        assert [request.block_ids for request in requests_of(elsewhere)] == [local_1]

    def test_conversations_begin_together_and_are_merged_by_time(self, tmp_path: Path) -> None:
        """Files in order of their names; at one moment the earlier file goes first; other files are passed over."""
        talk(tmp_path / "b.json", ask(0), ask(10), ask(20))
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(talk(tmp_path / "x", ask(0), ask(15)).read_bytes()))
        (tmp_path / "x").rename(tmp_path / "readme.txt")
        requests = requests_of(tmp_path)
        assert [(one.timestamp_s, one.session, one.turn) for one in requests] == [
            (0.0, 0, 0),
            (0.0, 1, 0),
            (10.0, 1, 1),
            (15.0, 0, 1),
            (20.0, 1, 2),
        ]
        assert [one.place for one in requests[:2]] == ["a.json.gz, request 1", "b.json, request 1"]

    def test_sessions_are_given_whole(self, tmp_path: Path) -> None:
        """The same requests as in the merged stream, one conversation after the other."""
        for name in ("a", "b"):
            talk(tmp_path / f"{name}.json", ask(0), agent(3, ask(0), ask(9)), ask(10))
        trace = open_trace(tmp_path)
        sessions = list(trace.sessions())
        assert [[one.turn for one in session] for session in sessions] == [[0, 1, 2, 3]] * 2
        merged = list(trace.requests())
        assert [one for one in merged if one.session == 1] == list(sessions[1])
        assert sum(map(len, sessions)) == len(merged) == 8

    def test_a_trace_without_think_times_has_no_sessions_to_play(self, tmp_path: Path) -> None:
        """Only agentic traces can be played closed."""
        path = tmp_path / "t"
        path.write_text('{"timestamp": 7, "input_length": 5, "output_length": 9, "hash_ids": [4]}\n')
        with pytest.raises(ConfigurationError, match="the mooncake format tells no think times"):
            list(open_trace(path).sessions())


class TestWaits:
    """What a request waits for where sessions are played closed."""

    def test_a_request_follows_the_one_before_after_its_think_time(self, tmp_path: Path) -> None:
        """The first waits for nothing; where the think time is missing it is worked out from the answer's time."""
        path = talk(tmp_path / "t.json", ask(0, api=7.5), ask(19, think=12, api=4), ask(30), ask(31, think=0.5))
        warnings: Counter[str] = Counter()
        # 30 - 19 - 4 = 7.
        assert waits(requests_of(path, warnings)) == [[], [(0, 12.0)], [(1, 7.0)], [(2, 0.5)]]
        assert warnings == {}

    def test_amended_pauses_are_counted(self, tmp_path: Path) -> None:
        """Nothing known of the answer's time: the distance; a think time beyond the distance: the distance."""
        path = talk(tmp_path / "t.json", ask(0), ask(8), ask(24, think=28.0), ask(25, think=1.0))
        warnings: Counter[str] = Counter()
        assert waits(requests_of(path, warnings)) == [[], [(0, 8.0)], [(1, 16.0)], [(2, 1.0)]]
        assert warnings == {THINK_TIME_MISSING: 1, THINK_TIME_TOO_LONG: 1}

    def test_an_answer_that_took_longer_than_the_distance_leaves_no_pause(self, tmp_path: Path) -> None:
        """A pause is never negative."""
        assert waits(requests_of(talk(tmp_path / "t.json", ask(0, api=9), ask(5)))) == [[], [(0, 0.0)]]

    def test_a_parent_waits_for_its_sub_agents(self, tmp_path: Path) -> None:
        """Two sub-agents, started 3 s and 4 s after the answer to request 1; the parent goes on when both are done.

        In order of time: request 1 (t 0, answered at 5), 2.1 (t 8), 3.1 (t 9), 2.2 (t 11), request 4 (t 40).
        """
        path = talk(
            tmp_path / "t.json",
            ask(0, api=5),
            agent(8, ask(0, api=1, think=0), ask(3, think=2)),
            agent(9, ask(0, api=20)),
            ask(40, think=35),
            ask(50, think=1),
        )
        requests = requests_of(path)
        assert [one.place.split()[-1] for one in requests] == ["1", "2.1", "3.1", "2.2", "4", "5"]
        assert [one.timestamp_s for one in requests] == [0.0, 8.0, 9.0, 11.0, 40.0, 50.0]
        assert {one.session for one in requests} == {0}
        assert waits(requests) == [[], [(0, 3.0)], [(0, 4.0)], [(1, 2.0)], [(0, 35.0), (3, 0.0), (2, 0.0)], [(4, 1.0)]]

    def test_a_sub_agent_in_the_background_is_waited_for_when_it_was_over(self, tmp_path: Path) -> None:
        """The recording shows request 3 begin while the sub-agent was at work: only request 4 waits for it."""
        path = talk(
            tmp_path / "t.json", ask(0, api=1), agent(2, ask(0), ask(30, think=1)), ask(10, think=9), ask(60, think=5)
        )
        requests = requests_of(path)
        assert [one.place.split()[-1] for one in requests] == ["1", "2.1", "3", "2.2", "4"]
        assert waits(requests) == [[], [(0, 1.0)], [(0, 9.0)], [(1, 1.0)], [(2, 5.0), (3, 0.0)]]

    def test_sub_agents_may_start_others(self, tmp_path: Path) -> None:
        """The inner one begins after the outer one's first request, and the parent waits for the ends of both."""
        path = talk(
            tmp_path / "t.json",
            ask(0, api=1),
            agent(2, ask(0, api=1), agent(4, ask(0), ask(1, think=0))),
            ask(20, think=3),
        )
        requests = requests_of(path)
        assert [one.place.split()[-1] for one in requests] == ["1", "2.1", "2.2.1", "2.2.2", "3"]
        assert [one.timestamp_s for one in requests] == [0.0, 2.0, 6.0, 7.0, 20.0]
        assert waits(requests) == [[], [(0, 1.0)], [(1, 3.0)], [(2, 0.0)], [(0, 3.0), (1, 0.0), (3, 0.0)]]

    def test_a_sub_agent_before_its_starter_begins_together_with_it(self, tmp_path: Path) -> None:
        """Clocks of two recorders differ; nothing may wait for what comes later."""
        warnings: Counter[str] = Counter()
        path = talk(tmp_path / "t.json", ask(0), ask(10, think=1, api=2), agent(9.5, ask(0)), ask(20, think=1))
        requests = requests_of(path, warnings)
        assert [(one.place.split()[-1], one.timestamp_s) for one in requests[1:3]] == [("2", 10.0), ("3.1", 10.0)]
        assert waits(requests)[2] == [(1, 0.0)]
        assert warnings == {EARLY_SUBAGENT: 1}

    def test_a_sub_agent_that_asked_nothing_is_not_waited_for(self, tmp_path: Path) -> None:
        """An empty list of requests is no request."""
        path = talk(tmp_path / "t.json", ask(0, api=1), agent(2), ask(5, think=1))
        assert waits(requests_of(path)) == [[], [(0, 1.0)]]

    @pytest.mark.skipif(not AGENTIC.is_dir(), reason=f"the agentic traces are not at {AGENTIC}")
    def test_the_published_conversations_wait_for_earlier_turns_only(self) -> None:
        """Every request but each session's first waits, in the conversation with sub-agents too, and never for long.

        A session played with answers that take no time, each request begun as early as its waits allow, is never later
        than the recording.
        """
        warnings: Counter[str] = Counter()
        sessions = list(open_trace(AGENTIC).sessions(warnings))
        assert [len(session) for session in sessions] == [41, 7, 8, 4, 4, 7, 4, 32, 7, 8]
        assert warnings == {THINK_TIME_MISSING: 6, THINK_TIME_TOO_LONG: 1}
        for session in sessions:
            begun_s: list[float] = []
            for turn, request in enumerate(session):
                assert request.turn == turn
                assert bool(request.after) == (turn > 0)
                assert all(0 <= wait.turn < turn and wait.pause_s >= 0 for wait in request.after)
                begun_s.append(max((begun_s[wait.turn] + wait.pause_s for wait in request.after), default=0.0))
                assert begun_s[turn] <= request.timestamp_s + 1e-6

    @pytest.mark.skipif(not AGENTIC.is_dir(), reason=f"the agentic traces are not at {AGENTIC}")
    def test_the_published_sub_agents_wait_as_worked_out_by_hand(self) -> None:
        """Request 16 (t 1085, answer 15.64 s) starts two; request 19 waits for the first, 20 for the second."""
        (session,) = (one for one in open_trace(AGENTIC).sessions() if "trace_0291" in one[0].place)
        by_place = {request.place.split()[-1]: request for request in session}
        turn = {place: request.turn for place, request in by_place.items()}
        for place, begun_s in (("17.1", 1148.013), ("18.1", 1180.553)):
            (wait,) = by_place[place].after
            assert wait.turn == turn["16"]
            assert wait.pause_s == pytest.approx(begun_s - 1100.64)
        assert by_place["19"].after == (After(turn=turn["16"], pause_s=108.0), After(turn=turn["17.5"], pause_s=0.0))
        assert by_place["20"].after == (After(turn=turn["19"], pause_s=11.0), After(turn=turn["18.7"], pause_s=0.0))


class TestBadInput:
    """What is refused, with file and place."""

    @pytest.mark.parametrize(
        ("broken", "place", "what"),
        [
            (5, "request 2", "not a JSON object"),
            ({"t": 1, "type": "n", "in": 64, "out": 1}, "request 2", "the key 'hash_ids' is missing"),
            ({"t": 1, "type": "subagent"}, "request 2", "the key 'requests' is missing"),
            ({"t": 1, "type": "subagent", "requests": 5}, "request 2", "requests must be a list"),
            (ask("1"), "request 2", "t must be"),
            (ask(-1), "request 2", "t must be"),
            (ask(0.5), "request 2", "its t lies before that of the request above"),
            (ask(2, kind=7), "request 2", "type must be"),
            (ask(2, (), tokens=0), "request 2", "in must be"),
            (ask(2, (), tokens=-64), "request 2", "in must be"),
            (ask(2, (1,), tokens=64.0), "request 2", "in must be"),
            (ask(2, out=-1), "request 2", "out must be"),
            (ask(2, "ab", tokens=128), "request 2", "hash_ids must be"),
            (ask(2, (1, 2), tokens=127), "request 2", "in 127 makes 1 full blocks of 64 tokens, but hash_ids has 2"),
            (ask(2, (1,), tokens=128), "request 2", "in 128 makes 2 full blocks of 64 tokens, but hash_ids has 1"),
            (ask(2, api=-3), "request 2", "api_time must be"),
            (ask(2, think="1"), "request 2", "think_time must be"),
            (agent(2, ask(0), ask(0, (), tokens=0)), "request 2.2", "in must be"),
            (agent(2, ask(5), ask(4)), "request 2.2", "its t lies before"),
        ],
    )
    def test_a_broken_request_is_refused_with_its_number(
        self, tmp_path: Path, broken: object, place: str, what: str
    ) -> None:
        """Nothing of the conversation is played: it is read whole."""
        path = talk(tmp_path / "t.json", ask(1), broken)
        with pytest.raises(ConfigurationError, match=f"{re.escape(str(path))}, {place}: .*{re.escape(what)}") as caught:
            next(open_trace(path).requests())
        assert caught.value.exit_code == 5

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ('{"block_size": 64,\n "requests": [\n', "line 3: not JSON"),
            ('{"block_size": 64,\n "requests": [}', "line 2: not JSON"),
            ("[]", "line 1: not a JSON object"),
            ("\ufeff{}", "line 1: the key 'block_size' is missing"),
            ('{"block_size": 64}', "line 1: the key 'requests' is missing"),
            ('{"block_size": 0, "requests": []}', "line 1: block_size must be"),
            ('{"block_size": "64", "requests": []}', "line 1: block_size must be"),
            ('{"block_size": 64, "requests": {}}', "line 1: requests must be a list"),
            ('{"block_size": 64, "requests": []}', "line 1: the conversation holds no request"),
            ('{"block_size": 64, "requests": [], "hash_id_scope": "x"}', "line 1: hash_id_scope must be"),
        ],
    )
    def test_a_broken_document_is_refused_with_its_line(self, tmp_path: Path, text: str, what: str) -> None:
        """The line of a syntax error, else the first."""
        path = tmp_path / "t.json"
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=f"{re.escape(str(path))}, {re.escape(what)}") as caught:
            list(open_trace(path, TraceFormat.AGENTIC).requests())
        assert caught.value.exit_code == 5

    def test_a_broken_file_of_a_directory_is_named(self, tmp_path: Path) -> None:
        """A directory is read file by file, and the one that is broken has its own name in the message."""
        talk(tmp_path / "a.json", ask(0))
        talk(tmp_path / "b.json", ask(0), ask(1, out=None))
        with pytest.raises(ConfigurationError, match=r"b\.json, request 2: out must be"):
            requests_of(tmp_path)

    def test_different_block_sizes_do_not_mix(self, tmp_path: Path) -> None:
        """Blocks of one trace have one size; the message names the file that differs."""
        talk(tmp_path / "a.json", ask(0))
        talk(tmp_path / "b.json", ask(0, (1,), tokens=40), block_size=32)
        with pytest.raises(ConfigurationError, match=r"b\.json: block_size is 32, that of the first conversation 64"):
            requests_of(tmp_path)

    def test_a_directory_without_conversations_is_refused(self, tmp_path: Path) -> None:
        """Nothing to play, and the message says which names are looked for."""
        (tmp_path / "t.jsonl").write_text("{}")
        with pytest.raises(ConfigurationError, match=r"no file \*\.json, \*\.json\.gz or \*\.json\.zst"):
            open_trace(tmp_path)
        with pytest.raises(ConfigurationError, match="bailian format is a file, not a directory"):
            open_trace(tmp_path, TraceFormat.BAILIAN)

    def test_a_conversation_both_packed_and_unpacked_is_refused(self, tmp_path: Path) -> None:
        """Twice the same conversation would find all of its blocks."""
        path = talk(tmp_path / "a.json", ask(0))
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(path.read_bytes()))
        with pytest.raises(ConfigurationError, match=r"a\.json and a\.json\.gz are one conversation"):
            open_trace(tmp_path)

    def test_a_directory_that_may_not_be_read_has_its_own_exit_code(self, tmp_path: Path) -> None:
        """No permission: exit code 4, with the path. Root, whom no permission stops, becomes `nobody` for it."""
        place = tmp_path / "place"
        place.mkdir()
        talk(place / "a.json", ask(0))
        place.chmod(0)
        user = os.geteuid()
        if user == 0:
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        try:
            with pytest.raises(AccessError, match="place") as caught:
                open_trace(place)
        finally:
            os.seteuid(user)
            place.chmod(0o700)
        assert caught.value.exit_code == 4
