"""What computes, and a model of one's own: what follows from what, what is refused, and what a rank hears."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from mlpstorage.cli.parser import build_parser
from mlpstorage.config import Accelerator, GenerationMode
from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, UsageError
from mlpstorage.kvcache.rank import parse_arguments
from mlpstorage.plan.kvcache import with_settled_io
from mlpstorage.spec.fields import Resolved, resolve
from mlpstorage.spec.kvcache import KVCacheSpec, rank_arguments

SMALL = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
"""A made-up model: 2 x 10 layers x 2 heads x 128 values x 2 bytes = 10,240 bytes a token."""


def resolved(
    *, flags: dict[str, object] | None = None, env: dict[str, str] | None = None, file: Path | None = None
) -> Resolved[KVCacheSpec]:
    """A spec from a script's namespace, an environment and a file."""
    return resolve(KVCacheSpec, Namespace(**(flags or {})), environment=env or {}, config_file=file)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Its configuration, in a directory of its name."""
    path = tmp_path / "small-1" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL))
    return path


# Accelerators and rates


def test_an_h100_computes_unless_something_else_is_said() -> None:
    """One, at half of its peak; no rates."""
    spec = KVCacheSpec()
    assert (spec.accelerator, spec.num_accelerators, spec.mfu) == (Accelerator.H100, 1, 0.5)
    assert (spec.prefill_tokens_per_s, spec.decode_tokens_per_s) == (None, None)
    assert spec.generation_mode is GenerationMode.REALISTIC


@pytest.mark.parametrize("name", ["prefill_tokens_per_s", "decode_tokens_per_s"])
def test_a_rate_takes_the_place_of_the_accelerator(name: str) -> None:
    """And the accelerator's source says that it was worked out, not given."""
    found = resolved(flags={name: 100})
    assert (found.spec.accelerator, found.sources["accelerator"]) == (Accelerator.NONE, "auto")
    given = resolved(flags={name: 100, "accelerator": "none"})
    assert (given.spec.accelerator, given.sources["accelerator"]) == (Accelerator.NONE, "flag")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"accelerator": "h100", "prefill_tokens_per_s": 5},
            "--prefill-tokens-per-s 5: .*leave --accelerator h100 out",
        ),
        ({"accelerator": "a100", "decode_tokens_per_s": 5}, "--decode-tokens-per-s 5: .*or give --accelerator none"),
        ({"accelerator": "none", "mfu": 0.4}, "--mfu 0.4: "),
        ({"prefill_tokens_per_s": 5, "num_accelerators": 2}, "--num-accelerators 2: rates are of all"),
        ({"accelerator": "tpu"}, "--accelerator: must be 'a100', 'h100', .*'none'"),
        ({"num_accelerators": 0}, "--num-accelerators: .*got 0"),
        ({"mfu": 0}, "--mfu: .*got 0"),
        ({"mfu": 1.01}, "--mfu: .*got 1.01"),
        ({"decode_tokens_per_s": "inf"}, "--decode-tokens-per-s: "),
        ({"model": "llama4"}, "--model: must be one of tiny-1b.*--model-config takes others"),
    ],
)
def test_what_does_not_go_together_or_is_out_of_range_is_refused(flags: dict[str, object], said: str) -> None:
    """With the flag, the value and the way out."""
    with pytest.raises(UsageError, match=said):
        resolved(flags=flags)


# A model of one's own


def test_a_model_of_ones_own_has_the_name_and_shape_of_its_file(small: Path) -> None:
    """The name that results go under is worked out; copies keep the shape without reading the file again."""
    found = resolved(flags={"model_config": str(small)})
    spec = found.spec
    assert (spec.model, found.sources["model"], found.sources["model_config_file"]) == ("small-1", "auto", "flag")
    assert spec.bytes_per_token == 10_240
    assert spec.parameters()["model"] == "small-1"
    small.unlink()
    assert with_settled_io(spec).shape == spec.shape
    assert spec.model_copy(update={"num_users": 3}).bytes_per_token == 10_240


def test_the_file_is_called_alike_everywhere(small: Path, tmp_path: Path) -> None:
    """Flag, environment and config file: `model_config` in each."""
    config = tmp_path / "c.yaml"
    config.write_text(f"model_config: {small}\n")
    args = build_parser(["kvcache"]).parse_args(["kvcache", "datasize", "--model-config", str(small)])
    attempts = [
        resolve(KVCacheSpec, args, environment={}),
        resolved(env={"MLPSTORAGE_MODEL_CONFIG": str(small)}),
        resolved(file=config),
    ]
    assert [found.spec.model for found in attempts] == ["small-1"] * 3
    assert [found.sources["model_config_file"] for found in attempts] == ["flag", "env", "file"]
    config.write_text(f"model_config_file: {small}\n")
    with pytest.raises(ConfigurationError, match=r"unknown key model_config_file; known are .*model_config,"):
        resolved(file=config)


def test_a_rank_reads_the_same_file(small: Path) -> None:
    """It gets the file and no name, which its own parser would not know, and comes to an equal spec."""
    spec = KVCacheSpec(model_config_file=small, num_accelerators=2, mfu=0.25)
    words = rank_arguments(spec)
    assert words[:2] == ["--model-config", str(small)]
    assert "--model" not in words
    again, _ = parse_arguments([*words, "--run-id", "r"])
    assert again == spec
    assert again.shape == spec.shape
    assert again != KVCacheSpec(num_accelerators=2, mfu=0.25)


def test_a_name_and_a_file_are_one_too_many(small: Path) -> None:
    """Whichever of the two comes from where."""
    attempts: list[dict[str, object]] = [
        {"model": "tiny-1b", "model_config": small},
        {"model": "small-1", "model_config": str(small)},
    ]
    for found in attempts:
        with pytest.raises(UsageError, match=r"--model-config .* and --model .*: give one of the two"):
            resolved(flags=found)
    with pytest.raises(UsageError, match="give one of the two"):
        resolved(flags={"model": "tiny-1b"}, env={"MLPSTORAGE_MODEL_CONFIG": str(small)})


def test_heads_of_ones_own_model_are_divided_too(small: Path) -> None:
    """2 heads go to 2 ranks or 4, not to 3."""
    assert KVCacheSpec(model_config_file=small, tensor_parallel=4).bytes_per_token == 20_480
    with pytest.raises(UsageError, match="--tensor-parallel 3: small-1 has 2 KV heads"):
        resolved(flags={"model_config": str(small), "tensor_parallel": 3})


def test_a_model_whose_cache_does_not_grow_is_refused(small: Path) -> None:
    """A window in every layer, as in the first Mistral 7B: there is no block that a longer prompt would add."""
    small.write_text(json.dumps(SMALL | {"model_type": "mistral", "sliding_window": 4096}))
    with pytest.raises(ConfigurationError, match=r"config\.json: sliding_window: every layer has one.*4,096 tokens"):
        resolved(flags={"model_config": str(small)})


def test_a_file_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """Missing: 3. A directory: 4. Broken: 5, also where only the environment names it."""
    with pytest.raises(MissingFileError, match=r"--model-config: .*gone\.json is not there"):
        resolved(flags={"model_config": str(tmp_path / "gone.json")})
    with pytest.raises(AccessError, match="--model-config"):
        resolved(flags={"model_config": str(tmp_path)})
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigurationError, match=r"broken\.json is not JSON"):
        resolved(env={"MLPSTORAGE_MODEL_CONFIG": str(broken)})


def test_what_is_no_path_is_refused_by_its_flag() -> None:
    """A number in a script's namespace."""
    with pytest.raises(UsageError, match="--model-config: "):
        resolved(flags={"model_config": 7})
