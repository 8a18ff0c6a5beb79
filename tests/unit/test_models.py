"""The bytes that a model's shape makes of a token, against the published table."""

import pytest

from mlpstorage.config import KVCACHE_MODELS
from mlpstorage.models import MODELS

BYTES_PER_TOKEN = {
    "tiny-1b": 24_576,
    "llama2-7b": 524_288,
    "mistral-7b": 131_072,
    "llama3.1-8b": 131_072,
    "llama3.1-70b-instruct": 327_680,
    "llama3.1-405b": 516_096,
    "qwen3-8b": 147_456,
    "qwen3-32b": 262_144,
    "qwen3-235b-a22b": 192_512,
    "deepseek-v3": 70_272,
    "gpt-oss-20b": 24_576,
    "gpt-oss-120b": 36_864,
    "gemma-3-27b": 81_920,
}
"""Typed from the table, not computed."""

WINDOW_BYTES = {"gpt-oss-20b": 3_145_728, "gpt-oss-120b": 4_718_592, "gemma-3-27b": 436_207_616}
"""3, 4.5 and 416 MiB a sequence."""


@pytest.mark.parametrize(("name", "expected"), BYTES_PER_TOKEN.items())
def test_bytes_per_token_are_those_of_the_table(name: str, expected: int) -> None:
    """Every model keeps as many bytes of a token in bfloat16 as the table of published shapes says."""
    assert MODELS[name].bytes_per_token == expected


@pytest.mark.parametrize("name", BYTES_PER_TOKEN)
def test_only_sliding_window_layers_keep_a_constant_per_sequence(name: str) -> None:
    """Window layers keep their last tokens, whatever the length; models without such layers keep nothing apart."""
    assert MODELS[name].window_bytes_per_sequence == WINDOW_BYTES.get(name, 0)


def test_every_model_is_in_the_table_and_on_the_command_line() -> None:
    """No model can be chosen whose bytes per token this file does not check, and none of the table is missing."""
    assert set(MODELS) == set(BYTES_PER_TOKEN)
    assert sorted(KVCACHE_MODELS) == sorted(BYTES_PER_TOKEN)
    assert all(name == shape.name for name, shape in MODELS.items())


def test_latent_attention_blocks_are_no_multiple_of_a_page() -> None:
    """16 tokens of deepseek-v3 are 1,124,352 B, 274.5 pages: the case for which storage must pad."""
    assert MODELS["deepseek-v3"].bytes_per_token * 16 == 1_124_352
