"""`kvcache datasize`: what computing a context takes, when reading it is faster, and models of one's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Cli

SMALL = {
    "_name_or_path": "someone/small-1",
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
"""A made-up model: 2 x 10 layers x 2 heads x 128 values x 2 bytes = 10,240 bytes a token."""


def datasize(cli: Cli, *words: object) -> dict[str, Any]:
    """The document of one estimate."""
    ended = cli.run("kvcache", "datasize", *words, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def test_each_context_has_its_own_break_even(cli: Cli) -> None:
    """llama3.1-8b on two H100 at 40 %: [2 P n + 2 L d n^2] / (2 x 989e12 x 0.4) seconds for n x 131,072 bytes."""
    document = datasize(cli, "--model", "llama3.1-8b", "--num-accelerators", "2", "--mfu", "0.4")
    weights = 8_030_261_248 - 128_256 * 4096
    assert (document["weights"], document["active_weights"]) == (8_030_261_248, weights)
    assert (document["accelerator"], document["num_accelerators"], document["mfu"]) == ("h100", 2, 0.4)
    assert document["prefill_tokens_per_s"] is None
    told = {}
    for context in document["contexts"]:
        n = context["context_tokens"]
        seconds = (2 * weights * n + 2 * 32 * 4096 * n * n) / (2 * 989e12 * 0.4)
        told[n] = context["break_even_gib_per_s"]
        assert context["prefill_s"] == pytest.approx(seconds)
        assert told[n] == pytest.approx(n * 131_072 / seconds / 2**30)
    assert list(told) == [2048, 8192, 32768, 131_072]
    assert document["break_even_context_tokens"] == 8192
    assert document["break_even_gib_per_s"] == told[8192]


def test_a_rate_has_one_break_even(cli: Cli) -> None:
    """20,000 tokens a second x 131,072 bytes are 2.44 GiB/s at any length."""
    document = datasize(cli, "--prefill-tokens-per-s", "20000")
    assert (document["accelerator"], document["prefill_tokens_per_s"]) == ("none", 20_000)
    assert document["break_even_gib_per_s"] == pytest.approx(2.44140625)
    assert [context["break_even_gib_per_s"] for context in document["contexts"]] == [pytest.approx(2.44140625)] * 4
    assert document["contexts"][0]["prefill_s"] == pytest.approx(0.1024)


def test_without_a_model_of_compute_there_is_none(cli: Cli) -> None:
    """Null, not 0; the text says so, and names no bandwidth."""
    document = datasize(cli, "--accelerator", "none")
    assert (document["break_even_gib_per_s"], document["prefill_tokens_per_s"]) == (None, None)
    assert {(one["prefill_s"], one["break_even_gib_per_s"]) for one in document["contexts"]} == {(None, None)}
    text = cli.run("kvcache", "datasize", "--accelerator", "none").stdout
    assert "computing is not modelled" in text
    assert "GiB/s" not in text


def test_the_text_names_who_computes(cli: Cli) -> None:
    """And the length that the one number is for: 2.684e9 bytes that eight A100 compute in 0.983 s."""
    text = cli.run(
        "kvcache", "datasize", "--model", "llama3.1-70b-instruct", "--accelerator", "a100", "--num-accelerators", "8"
    ).stdout
    assert "8 x a100, 0.5 of their peak in prefill" in text
    assert "at 8,192 tokens reading beats computing above 2.54 GiB/s, for one request" in text
    assert "70.55e9, 69.50e9 for each token" in text


def test_a_model_of_ones_own(cli: Cli) -> None:
    """Sizes and name come from its config.json; where a path is relative it is so to the place of the call."""
    (cli.place / "config.json").write_text(json.dumps(SMALL))
    document = datasize(cli, "--model-config", "config.json")
    assert (document["model"], document["bytes_per_token"]) == ("small-1", 10_240)
    # 10 x (1,024 x 128 x 2 x 10 + 3 x 1,024 x 2,048) + 21 x 1,024 + 2 x 1,024,000
    assert document["weights"] == 91_198_464


def test_a_plan_of_ones_own_model(cli: Cli) -> None:
    """Its results go under the model's name, and the ranks get the file by its absolute path, and no name."""
    (cli.place / "config.json").write_text(json.dumps(SMALL))
    ended = cli.run("kvcache", "run", "--model-config", "config.json", "--storage-gb", "1", "--what-if", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    assert document["metadata"]["model"] == document["metadata"]["kvcache_model"] == "small-1"
    assert "/kv_cache/small-1/run/" in document["metadata"]["result_dir"]
    words = document["command"]
    assert words[words.index("--model-config") + 1] == str(cli.place / "config.json")
    assert "--model" not in words


@pytest.mark.parametrize(
    ("text", "exit_code", "said"),
    [
        (None, 3, "config.json is not there"),
        ("{", 5, "config.json is not JSON"),
        ("[]", 5, "config.json must hold a JSON object"),
        ('{"num_hidden_layers": 32}', 5, "config.json: the field num_attention_heads is missing"),
        ('{"num_hidden_layers": -1}', 5, "config.json: num_hidden_layers: must be a whole number from 1"),
    ],
)
def test_a_broken_model_of_ones_own_is_refused(cli: Cli, text: str | None, exit_code: int, said: str) -> None:
    """By `datasize` and `run` alike: the file and the field in one line on standard error, nothing on the other."""
    if text is not None:
        (cli.place / "config.json").write_text(text)
    for words in (["datasize"], ["run", "--results-dir", "results"]):
        ended = cli.run("kvcache", *words, "--model-config", "config.json", "--json")
        assert (ended.returncode, ended.stdout) == (exit_code, "")
        assert said in ended.stderr
        assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accelerator", "h100", "--prefill-tokens-per-s", "5"], "--prefill-tokens-per-s 5: takes the place"),
        (["--mfu", "1.5"], "--mfu: must be less than or equal to 1"),
        (["--num-accelerators", "0"], "--num-accelerators: must be greater than or equal to 1"),
        (["--accelerator", "tpu"], "--accelerator"),
        (["--model", "tiny-1b", "--model-config", "x.json"], "give one of the two"),
    ],
)
def test_wrong_compute_flags_are_a_usage_error(cli: Cli, words: list[str], said: str) -> None:
    """Exit code 2, and the flag."""
    ended = cli.run("kvcache", "datasize", *words)
    assert ended.returncode == 2
    assert said in ended.stderr


def test_a_run_of_ones_own_model(cli: Cli) -> None:
    """The rank finds the same shape; without a model of compute the break-even is null, and the run is complete."""
    (cli.place / "config.json").write_text(json.dumps(SMALL))
    words = cli.load("--accelerator", "none", "--model-config", "config.json")
    at = words.index("--model")
    del words[at : at + 2]
    ended = cli.run(*words)
    assert ended.returncode == 0, ended.stderr
    run = cli.only_run()
    assert run.directory.parts[-3:-1] == ("small-1", "run")
    assert (run.metadata["model"], run.metadata["parameter_sources"]["model"]) == ("small-1", "auto")
    # 64 tokens of 10,240 bytes are 160 pages.
    assert run.summary["storage"]["written_bytes"] % 655_360 == 0
    assert run.summary["storage"]["written_bytes"] > 0
    assert (run.summary["breakeven"]["prefill_tokens_per_s"], run.summary["breakeven"]["read_gib_per_s_needed"]) == (
        None,
        None,
    )
