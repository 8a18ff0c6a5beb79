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


PUBLISHED_WEIGHTS = {
    "llama2-7b": (6.738e9, None),
    "mistral-7b": (7.248e9, None),
    "llama3.1-8b": (8.030e9, None),
    "llama3.1-70b-instruct": (70.55e9, None),
    "llama3.1-405b": (405.9e9, None),
    "qwen3-8b": (8.19e9, None),
    "qwen3-32b": (32.8e9, None),
    "qwen3-235b-a22b": (235e9, 22e9),
    "deepseek-v3": (671e9, 36.6e9),
    "gpt-oss-20b": (20.91e9, 3.61e9),
    "gpt-oss-120b": (116.83e9, 5.13e9),
    "gemma-3-27b": (27.0e9, None),
}
"""In all and active, from the models' cards; DeepSeek and OpenAI count no input embedding among the active ones."""

ATTENTION_WIDTHS = {
    "tiny-1b": 16 * 128,
    "llama2-7b": 32 * 128,
    "mistral-7b": 32 * 128,
    "llama3.1-8b": 32 * 128,
    "llama3.1-70b-instruct": 64 * 128,
    "llama3.1-405b": 128 * 128,
    "qwen3-8b": 32 * 128,
    "qwen3-32b": 64 * 128,
    "qwen3-235b-a22b": 64 * 128,
    "deepseek-v3": 128 * (192 + 128) // 2,
    "gpt-oss-20b": 64 * 64,
    "gpt-oss-120b": 64 * 64,
    "gemma-3-27b": 32 * 128,
}
"""Query heads x values of a head; under latent attention x the mean of a query's and a value's."""


@pytest.mark.parametrize(("name", "published"), PUBLISHED_WEIGHTS.items())
def test_weights_are_those_of_the_model_cards(name: str, published: tuple[float, float | None]) -> None:
    """Counted from the dimensions, within a quarter of a percent; active ones, which few count alike, within two."""
    weights, active = published
    assert MODELS[name].weights == pytest.approx(weights, rel=0.0025)
    if active is not None:
        assert MODELS[name].active_weights == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(("name", "expected"), ATTENTION_WIDTHS.items())
def test_width_of_the_attention(name: str, expected: int) -> None:
    """It is not the hidden size: Qwen3-235B has 4,096 and gpt-oss 2,880 of that."""
    assert MODELS[name].attention_width == expected


def test_only_an_embedding_that_is_no_head_is_looked_up() -> None:
    """Gemma's is both, and every token is multiplied by it; the others have a vocabulary x hidden size apart."""
    assert MODELS["gemma-3-27b"].active_weights == MODELS["gemma-3-27b"].weights
    assert MODELS["llama3.1-8b"].weights - MODELS["llama3.1-8b"].active_weights == 128_256 * 4096


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
    assert set(MODELS) == set(BYTES_PER_TOKEN) == set(ATTENTION_WIDTHS) == {*PUBLISHED_WEIGHTS, "tiny-1b"}
    assert sorted(KVCACHE_MODELS) == sorted(BYTES_PER_TOKEN)
    assert all(name == shape.name for name, shape in MODELS.items())


def test_latent_attention_blocks_are_no_multiple_of_a_page() -> None:
    """16 tokens of deepseek-v3 are 1,124,352 B, 274.5 pages: the case for which storage must pad."""
    assert MODELS["deepseek-v3"].bytes_per_token * 16 == 1_124_352


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "kv_ranks", "bytes_of_one"),
    [
        ("llama3.1-8b", 1, 1, 131_072),
        # 8 heads: 4 of them are 2 x 32 layers x 4 x 128 x 2 bytes.
        ("llama3.1-8b", 2, 2, 65_536),
        ("llama3.1-8b", 8, 8, 16_384),
        # One head each, and each head twice: twice the bytes in all.
        ("llama3.1-8b", 16, 16, 16_384),
        # Every attention head has its own key and value head: 8 of 32 are 2 x 32 x 8 x 128 x 2.
        ("llama2-7b", 4, 4, 131_072),
        # 4 heads on 8 ranks: 2 x 94 x 1 x 128 x 2 bytes each.
        ("qwen3-235b-a22b", 8, 8, 48_128),
        # Layers of full attention alone: 2 x 12 x 1 x 64 x 2, and 2 x 10 x 1 x 128 x 2.
        ("gpt-oss-20b", 8, 8, 3_072),
        ("gemma-3-27b", 16, 16, 5_120),
        ("tiny-1b", 2, 2, 12_288),
        # Latent attention: every rank needs all of it, one keeps it.
        ("deepseek-v3", 8, 1, 70_272),
        ("deepseek-v3", 7, 1, 70_272),
    ],
)
def test_a_token_is_divided_among_kv_ranks(name: str, tensor_parallel: int, kv_ranks: int, bytes_of_one: int) -> None:
    """Each part holds its share of the heads, one at least; under latent attention there is one part."""
    shape = MODELS[name]
    assert shape.kv_ranks(tensor_parallel) == kv_ranks
    assert shape.kv_rank_bytes_per_token(tensor_parallel) == bytes_of_one


@pytest.mark.parametrize(
    ("name", "divisors"),
    [("tiny-1b", {1, 2, 4, 8, 12, 16}), ("llama3.1-8b", {1, 2, 4, 8, 16}), ("deepseek-v3", set(range(1, 17)))],
)
def test_heads_are_divided_whole_and_alike(name: str, divisors: set[int]) -> None:
    """Ranks divide the heads, or are a multiple of them; latent attention goes with any number of ranks."""
    assert {number for number in range(1, 17) if MODELS[name].splits_over(number)} == divisors
