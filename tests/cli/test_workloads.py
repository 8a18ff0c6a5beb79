"""What is played and when, from the command line: profiles and mixes, traces, arrivals, rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.trace_files import AgentStep, agentic, burstgpt, mooncake

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Cli, Run

NULL = ("--layout", "null", "--storage-gb", "50", "--block-tokens", "256", "--duration", "0.8", "--warmup", "0.5")
"""Nothing is moved and everything fits, so that hit ratios are the workload's own."""

WHOLE = ("--layout", "null", "--storage-gb", "10", "--warmup", "0", "--duration", "30")
"""The same, to a trace's end."""


@pytest.fixture(scope="module")
def null_run(tmp_path_factory: pytest.TempPathFactory, new_cli: Callable[[Path], Cli]) -> Callable[..., Run]:
    """Plays users without storage; runs of equal words are shared."""
    cli = new_cli(tmp_path_factory.mktemp("null"))
    known: dict[tuple[str, ...], Run] = {}

    def play(*words: str) -> Run:
        if words not in known:
            known[words] = cli.play(*NULL, *words)
        return known[words]

    return play


def tokens(run: Run) -> dict[str, float]:
    """Tokens of a mean prompt and of what was found of it, and the hit ratio."""
    counted = run.rank(0)["requests"]
    assert counted["completed"] >= 20
    found = sum(counted["cached_tokens"].values())
    return {
        "prompt": counted["prompt_tokens"] / counted["completed"],
        "cached": found / counted["completed"],
        "hit_ratio": found / counted["prompt_tokens"],
    }


# Synthetic users


@pytest.mark.parametrize(
    ("profile", "prompt", "hit_ratio"),
    [
        # Bounds around the targets of docs/workloads.md: a short run begins with first turns, and finds less, the less
        # the busier the machine is: of only 30 requests the six users' first ones, which find nothing, are a fifth.
        ("chat", (1_200, 5_000), (0.5, 0.85)),
        ("coding-agent", (40_000, 130_000), (0.75, 0.98)),
        ("document-qa", (5_000, 18_000), (0.1, 0.8)),
        ("rag", (3_500, 7_000), (0.5, 0.9)),
        ("batch", (2_600, 3_100), (0.7, 0.93)),
    ],
)
def test_each_profile_has_its_shape(
    null_run: Callable[..., Run], profile: str, prompt: tuple[float, float], hit_ratio: tuple[float, float]
) -> None:
    """Lengths of prompts and the part that is found tell the profiles apart."""
    run = null_run("--workload", profile)
    found = tokens(run)
    assert prompt[0] < found["prompt"] < prompt[1]
    assert hit_ratio[0] < found["hit_ratio"] < hit_ratio[1]
    assert run.metadata["parameters"]["workload"] == {profile: 1.0}
    assert run.summary["hit_ratio"]["tokens"]["total"] == pytest.approx(found["hit_ratio"])


def test_enable_rag_is_the_profile_rag(null_run: Callable[..., Run]) -> None:
    """The switch reaches the ranks: both play the same, and other than chat does."""
    switched, named, chat = (
        null_run(*words).summary["workload_digest"]
        for words in (
            ("--enable-rag",),
            ("--workload", "rag"),
            ("--workload", "chat"),
        )
    )
    assert switched == named
    assert switched != chat
    fewer = null_run("--enable-rag", "--rag-num-docs", "2")
    assert fewer.summary["workload_digest"] != switched
    assert tokens(fewer)["hit_ratio"] > tokens(null_run("--enable-rag"))["hit_ratio"]


def test_a_mix_in_a_config_file(cli: Cli) -> None:
    """Weights of a YAML mapping, the same as those of the flag."""
    config = cli.place / "mix.yaml"
    config.write_text("workload: {batch: 3, rag: 1}\nrag_num_docs: 5\n")
    from_file = cli.play(*NULL, "--config-file", config)
    assert from_file.metadata["parameters"]["workload"] == {"batch": 3.0, "rag": 1.0}
    assert from_file.metadata["parameter_sources"]["workload"] == "file"
    # Prompts lie between those of the two, by weight.
    assert 2_600 < tokens(from_file)["prompt"] < 5_000
    from_flag = cli.play(*NULL, "--workload", "rag=1,batch=3", "--rag-num-docs", "5")
    assert from_flag.summary["workload_digest"] == from_file.summary["workload_digest"]


def test_single_turns_find_the_system_prompt_alone(null_run: Callable[..., Run]) -> None:
    """15,360 tokens of an agent's prompt are shared, which is 60 blocks: all but the very first requests find these."""
    many, single = (tokens(null_run("--workload", "coding-agent", *more)) for more in ((), ("--disable-multi-turn",)))
    assert 12_000 < single["cached"] <= 15_360 < many["cached"]
    assert single["hit_ratio"] < 0.5 < many["hit_ratio"]


def test_without_prefix_caching_nothing_is_found_and_all_is_stored(null_run: Callable[..., Run]) -> None:
    """The hit ratio is 0, nothing is read, and blocks are written all the same."""
    run = null_run("--workload", "chat", "--disable-prefix-caching")
    assert tokens(run)["hit_ratio"] == 0
    assert run.summary["hit_ratio"]["blocks"]["total"] == 0
    assert run.summary["storage_total"]["read_ops"] == 0
    assert run.summary["storage_total"]["write_ops"] > 0
    assert run.summary["storage_total"]["dedup_skipped_bytes"] > 0, "system prompts that storage had"


def test_a_rate_makes_an_open_loop_of_users(null_run: Callable[..., Run]) -> None:
    """200 requests a second: of 0.8 s 160 are meant, Poisson with deviation 12.6: within five of these."""
    run = null_run("--workload", "chat", "--request-rate", "200")
    assert 97 <= run.summary["requests"]["completed"] <= 223
    assert run.metadata["parameters"]["arrivals"] == "open"
    assert run.metadata["parameter_sources"]["arrivals"] == "auto"
    assert run.summary["workload_digest"] != null_run("--workload", "chat").summary["workload_digest"]


def test_settled_values_have_the_source_auto(null_run: Callable[..., Run]) -> None:
    """What follows from the load; what was given has its flag as source."""
    metadata = null_run("--workload", "chat").metadata
    sources, parameters = metadata["parameter_sources"], metadata["parameters"]
    assert (sources["arrivals"], parameters["arrivals"]) == ("auto", "closed")
    assert (sources["decisions"], parameters["decisions"]) == ("auto", "completion")
    assert (sources["block_tokens"], sources["workload"]) == ("flag", "flag")


# Traces

CHAT = [(100 * n, 2 * 512 + 100, [0, 10 * n + 1, 10 * n + 2]) for n in range(8)]
"""Eight requests in 0.7 s; nine different full blocks."""

AGENTS: list[list[AgentStep]] = [
    [(0.0, None, 128, 5, [1, 2]), (0.5, 0.3, 192, 6, [1, 2, 3]), (1.0, 0.4, 256, 7, [1, 2, 3, 4])],
    [(0.1, None, 64, 5, [1]), (0.8, 0.5, 130, 6, [1, 2])],
    [(0.2, None, 70, 9, [1])],
]
"""Six requests of three conversations, with 4 + 2 + 1 different blocks, in 1.0 s; the longest pauses 0.7 s in all."""


def played_whole(run: Run, requests: int, blocks: int, mode: str, trace_format: str) -> dict[str, Any]:
    """Check that every request was answered and every block written once; returns the summary."""
    summary = run.summary
    assert run.rank(0)["requests"]["completed"] == requests
    assert summary["storage_total"]["write_ops"] == blocks
    parameters = run.metadata["parameters"]
    assert (parameters["arrivals"], parameters["trace_format"]) == (mode, trace_format)
    assert summary["window"]["measured_s"] < 30
    return summary


@pytest.mark.parametrize("mode", [None, "open", "closed"])
def test_modes_of_a_trace_without_pauses(cli: Cli, mode: str | None) -> None:
    """By its own times without a flag; in a closed loop as soon as a user is free."""
    trace = mooncake(cli.place / "trace.jsonl", CHAT)
    run = cli.play(*WHOLE, "--trace", trace, *(("--arrivals", mode) if mode else ()))
    summary = played_whole(run, 8, 9, mode or "open", "mooncake")
    assert run.metadata["parameters"]["block_tokens"] == 512
    sources = run.metadata["parameter_sources"]
    assert (sources["block_tokens"], sources["trace_format"]) == ("auto", "auto")
    assert sources["arrivals"] == ("flag" if mode else "auto")
    if mode != "closed":
        assert summary["window"]["measured_s"] >= 0.7, "the last request comes no earlier"


@pytest.mark.parametrize(("mode", "least_s"), [(None, 0.7), ("session", 0.7), ("open", 1.0), ("closed", 0.9)])
def test_modes_of_conversations(cli: Cli, mode: str | None, least_s: float) -> None:
    """Their pauses are kept where sessions are: 0.3 + 0.4 s, and 0.7 + 0.5 s by one user; by their times 1.0 s."""
    trace = agentic(cli.place / "agents", AGENTS)
    words = ("--accelerator", "none", "--generation-mode", "realistic", "--num-users", "1")
    run = cli.play(*WHOLE, *words, "--trace", trace, *(("--arrivals", mode) if mode else ()))
    summary = played_whole(run, 6, 7, mode or "session", "agentic")
    assert run.metadata["parameters"]["block_tokens"] == 64
    assert summary["window"]["measured_s"] >= least_s
    # Turns of a session find all that was stored before: 2 + 3 blocks and 1.
    assert sum(run.rank(0)["requests"]["hit_blocks"].values()) == 6


def test_time_scale_shortens_pauses(cli: Cli) -> None:
    """A hundredth of the pauses: the run could not end so early with the trace's own 0.7 s."""
    trace = agentic(cli.place / "agents", AGENTS)
    words = ("--accelerator", "none", "--generation-mode", "realistic", "--time-scale", "0.01")
    summary = played_whole(cli.play(*WHOLE, *words, "--trace", trace), 6, 7, "session", "agentic")
    assert summary["latency"]["ttft"]["count"] == 6


def test_a_rate_takes_the_place_of_a_traces_times(cli: Cli) -> None:
    """A trace of a quarter of an hour is over in a moment."""
    trace = mooncake(cli.place / "trace.jsonl", [(1_000 * at_ms, size, ids) for at_ms, size, ids in CHAT])
    run = cli.play(*WHOLE, "--trace", trace, "--request-rate", "100")
    played_whole(run, 8, 9, "open", "mooncake")


def test_a_spread_trace_is_played_whole(cli: Cli) -> None:
    """Four requests at once, twice, become eight at different times."""
    trace = mooncake(cli.place / "trace.jsonl", [(300 * (n // 4), 600, [n, 100 + n]) for n in range(8)])
    run = cli.play(*WHOLE, "--trace", trace, "--spread-arrivals", "0.3")
    played_whole(run, 8, 8, "open", "mooncake")
    plain = cli.play(*WHOLE, "--trace", trace)
    assert plain.summary["workload_digest"] != run.summary["workload_digest"]


def test_a_trace_without_ids_has_made_up_prefixes(cli: Cli) -> None:
    """Lengths are the trace's; blocks have the size that is asked for, and some are found again."""
    trace = burstgpt(cli.place / "b.csv", [(n / 50, 1_300 + 7 * n, 40) for n in range(40)])
    run = cli.play(*WHOLE, "--trace", trace, "--block-tokens", "64")
    counted = run.rank(0)["requests"]
    assert (counted["completed"], counted["prompt_tokens"]) == (40, 40 * 1_300 + 7 * 39 * 40 // 2)
    assert counted["output_tokens"] == 40 * 40
    assert counted["prompt_blocks"] == sum((1_300 + 7 * n) // 64 for n in range(40))
    assert sum(counted["hit_blocks"].values()) > 0
    assert run.metadata["parameters"]["trace_format"] == "burstgpt"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--block-tokens", "256"), "--block-tokens 256 is smaller than the trace's blocks of 512 tokens"),
        (("--block-tokens", "768"), "--block-tokens 768 is not a multiple"),
        (("--arrivals", "session"), "--arrivals session: format mooncake tells no pauses"),
        (("--trace-format", "azure"), "azure"),
    ],
)
def test_what_a_trace_cannot_give_is_refused(cli: Cli, words: tuple[str, ...], said: str) -> None:
    """Exit 5 before any work, with the flag."""
    trace = mooncake(cli.place / "trace.jsonl", CHAT)
    ended = cli.run(*cli.load("--trace", trace, *words))
    assert ended.returncode == 5, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert said in line
    assert cli.runs() == []


# The same again


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, new_cli: Callable[[Path], Cli]) -> list[Run]:
    """Two runs of one trace on real files, with reuse and evictions: 60 requests, of which 40 are played."""
    cli = new_cli(tmp_path_factory.mktemp("twice"))
    # Prompts of two or three blocks of 12 MiB; what comes back does so after 3 to 9 others.
    requests = [(25 * n, 1_100 + 500 * (n % 2), [n % 7, 100 + n % 11, 200 + n % 5, 300 + n]) for n in range(60)]
    trace = mooncake(cli.place / "trace.jsonl", [(at, size, ids[: -(-size // 512)]) for at, size, ids in requests])
    words = ("--max-requests", "40", "--storage-gb", "0.25", "--warmup", "0", "--duration", "60")
    return [cli.play("--trace", trace, *words) for _ in range(2)]


def test_two_runs_of_an_open_loop_do_the_same(twice: list[Run]) -> None:
    """Equal digests of what was asked and of what was done, and equal bytes, whatever the disk's speed was."""
    first, second = (run.summary for run in twice)
    assert first["workload_digest"] == second["workload_digest"]
    assert first["operations_digest"] == second["operations_digest"]
    moved = ("read_bytes", "written_bytes", "deleted_bytes", "read_ops", "write_ops", "delete_ops")
    assert [first["storage_total"][name] for name in moved] == [second["storage_total"][name] for name in moved]
    for name in moved:
        assert first["storage_total"][name] > 0, "reuse and evictions are part of it"
    assert first["hit_ratio"] == second["hit_ratio"]
    assert twice[0].metadata["parameters"]["decisions"] == "arrival"
    assert twice[0].metadata["parameter_sources"]["decisions"] == "auto"
