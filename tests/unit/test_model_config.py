"""Hugging Face configurations become shapes: published facts in, published counts out; what is wrong is named."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError
from mlpstorage.models import MODELS, ModelShape
from mlpstorage.spec.model_config import read_model_config

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_2_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
MISTRAL_7B_V1 = LLAMA_8B | {"model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096}
QWEN_25_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
QWEN_3_8B = LLAMA_8B | {
    "model_type": "qwen3",
    "head_dim": 128,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN_3_235B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
MIXTRAL_8X7B = LLAMA_8B | {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "tie_word_embeddings": False,
}
GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "tie_word_embeddings": False,
}
GEMMA_3_27B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}
"""As published: what the text model's defaults say is left out of it."""


def read(tmp_path: Path, config: object) -> ModelShape:
    """The shape of a configuration that was written to a file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return read_model_config(path)


# Bytes of the cache


@pytest.mark.parametrize(
    ("config", "bytes_per_token", "window_bytes"),
    [
        pytest.param(LLAMA_8B, 131_072, 0, id="gqa"),
        pytest.param(LLAMA_2_7B, 524_288, 0, id="mha"),
        pytest.param(
            {name: value for name, value in LLAMA_2_7B.items() if name != "num_key_value_heads"},
            524_288,
            0,
            id="mha by default",
        ),
        pytest.param(QWEN_3_8B, 147_456, 0, id="gqa with a head dim of its own"),
        pytest.param(QWEN_3_235B, 192_512, 0, id="gqa with experts"),
        # 2 x 28 layers x 4 heads x 128 values x 2 bytes.
        pytest.param(QWEN_25_7B, 57_344, 0, id="window that is not used"),
        pytest.param(QWEN_3_8B | {"head_dim": 64, "num_key_value_heads": 2}, 18_432, 0, id="head dim is not derived"),
        pytest.param(DEEPSEEK_V3, 70_272, 0, id="mla"),
        pytest.param(GPT_OSS_120B, 36_864, 4_718_592, id="window in every second layer"),
        pytest.param(GEMMA_3_27B, 81_920, 436_207_616, id="window in five of six layers"),
        # 2 x 32 x 8 x 128 x 2 bytes of 4,096 tokens, and no layer that keeps more.
        pytest.param(MISTRAL_7B_V1, 0, 536_870_912, id="window in every layer"),
        pytest.param(MISTRAL_7B_V1 | {"sliding_window": None}, 131_072, 0, id="window that is null"),
    ],
)
def test_bytes_of_a_token(tmp_path: Path, config: object, bytes_per_token: int, window_bytes: int) -> None:
    """By hand from the published table: what a token adds, and what the windows hold."""
    shape = read(tmp_path, config)
    assert (shape.bytes_per_token, shape.window_bytes_per_sequence) == (bytes_per_token, window_bytes)


@pytest.mark.parametrize(
    ("config", "full", "window"),
    [
        # Gemma 2 has windows in turn; Cohere 2 and the field give every fourth and every third layer full attention.
        ({"model_type": "gemma2", "sliding_window": 4096}, 16, 16),
        ({"model_type": "cohere2", "sliding_window": 4096}, 8, 24),
        ({"sliding_window": 512, "sliding_window_pattern": 3}, 10, 22),
        # Qwen: full up to max_window_layers.
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}, 20, 12),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 40}, 32, 0),
        ({"model_type": "qwen2", "sliding_window": 4096}, 32, 0),
        ({"layer_types": ["full_attention"] * 32, "sliding_window": 4096}, 32, 0),
        # As long as any prompt can be, it is none.
        ({"sliding_window": 8192, "max_position_embeddings": 8192}, 32, 0),
        ({"sliding_window": 8191, "max_position_embeddings": 8192}, 0, 32),
        ({"layer_types": ["full_attention"] * 5 + ["sliding_attention"] * 27, "sliding_window": 10}, 5, 27),
    ],
)
def test_which_layers_have_a_window(tmp_path: Path, config: dict[str, object], full: int, window: int) -> None:
    """A list says it; else a pattern, of the file or of the model's type; else all or none."""
    shape = read(tmp_path, LLAMA_8B | config)
    assert (shape.layers, shape.window_layers) == (full, window)
    assert (shape.window_tokens > 0) is (window > 0)


# Weights


@pytest.mark.parametrize(
    ("config", "weights", "active"),
    [
        (LLAMA_8B, 8.03e9, None),
        (LLAMA_70B, 70.6e9, None),
        (LLAMA_2_7B, 6.74e9, None),
        (QWEN_25_7B, 7.62e9, None),
        (QWEN_3_8B, 8.19e9, None),
        (QWEN_3_235B, 235e9, 22e9),
        (MIXTRAL_8X7B, 46.7e9, 12.9e9),
        (DEEPSEEK_V3, 671e9, 36.6e9),
        (GPT_OSS_120B, 116.83e9, 5.13e9),
        (GEMMA_3_27B, 27.0e9, 27.0e9),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_weights_are_those_that_were_published(
    tmp_path: Path, config: object, weights: float, active: float | None
) -> None:
    """In all within half a percent, active ones within two: not everyone counts the embedding among them."""
    shape = read(tmp_path, config)
    assert shape.weights == pytest.approx(weights, rel=0.005)
    if active is not None:
        assert shape.active_weights == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA_8B, "llama3.1-8b"),
        (LLAMA_70B, "llama3.1-70b-instruct"),
        (LLAMA_2_7B, "llama2-7b"),
        (QWEN_3_8B, "qwen3-8b"),
        (QWEN_3_235B, "qwen3-235b-a22b"),
        (DEEPSEEK_V3, "deepseek-v3"),
        (GPT_OSS_120B, "gpt-oss-120b"),
        (GEMMA_3_27B, "gemma-3-27b"),
    ],
)
def test_a_known_model_from_its_file_is_the_one_of_the_table(
    tmp_path: Path, config: Mapping[str, Any], name: str
) -> None:
    """Field by field."""
    assert read(tmp_path, {**config, "_name_or_path": f"someone/{name}"}) == MODELS[name]


def test_experts_of_some_layers(tmp_path: Path) -> None:
    """Every second layer from the third on, but for one: 2 of 8 experts, and shared ones of a width of their own."""
    tiny = {
        "hidden_size": 10,
        "intermediate_size": 7,
        "moe_intermediate_size": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 5,
        "first_k_dense_replace": 2,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [5],
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
    }
    shape = read(tmp_path, tiny)
    # Layers 3 and 7, of 0 to 7.
    experts = 2 * 8 * 3 * 10 * 3
    # Attention: 10 x 5 x (2 + 1 + 1 + 2). Six dense MLPs, two shared ones, two routers, 17 norms, the head.
    dense = 8 * 300 + 6 * 3 * 10 * 7 + 2 * 3 * 10 * 5 + 2 * 10 * 8 + 17 * 10 + 1000
    assert (shape.expert_weights, shape.dense_weights, shape.embedding_weights) == (experts, dense, 1000)
    assert shape.active_weights == dense + experts // 4


@pytest.mark.parametrize(
    ("quantization", "dense_bits", "expert_bits"),
    [
        (None, 16, 16),
        ({"quant_method": "fp8"}, 8, 8),
        ({"quant_method": "mxfp4"}, 16, 4.25),
        ({"quant_method": "awq", "bits": 4}, 4, 4),
        ({"quant_method": "gptq", "bits": 8}, 8, 8),
    ],
)
def test_precision_of_the_weights(tmp_path: Path, quantization: object, dense_bits: float, expert_bits: float) -> None:
    """bfloat16 unless the file says otherwise."""
    shape = read(tmp_path, LLAMA_8B | {"quantization_config": quantization})
    assert (shape.dense_bits, shape.expert_bits) == (dense_bits, expert_bits)


# Names


@pytest.mark.parametrize(
    ("said", "file", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "m/config.json", "Llama-3.1-8B"),
        ("/data/models/my_model-v2/", "m/config.json", "my_model-v2"),
        ("", "Llama-3.1-8B/config.json", "Llama-3.1-8B"),
        (None, "own.model/config.json", "own.model"),
        ("..", "own/config.json", "own"),
        ("a/b c", "own/config.json", "own"),
        (7, "own/config.json", "own"),
        ("x" * 101, "own/config.json", "own"),
        (None, "with space/mine.json", "mine"),
        (None, "with space/mine (2).json", "mine-2"),
        (None, "with space/§.json", "model"),
    ],
)
def test_a_name_is_fit_for_a_directory(tmp_path: Path, said: object, file: str, name: str) -> None:
    """What the file says if it is clean, else its directory, else the file."""
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(json.dumps({**LLAMA_8B, "_name_or_path": said}))
    assert read_model_config(path).name == name


# What is wrong


@pytest.mark.parametrize(
    "name",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
)
def test_a_field_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    """With the file; null is missing, too."""
    for config in ({key: value for key, value in LLAMA_8B.items() if key != name}, LLAMA_8B | {name: None}):
        with pytest.raises(ConfigurationError, match=rf"config\.json: the field {name} is missing") as refused:
            read(tmp_path, config)
        assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("name", ["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "num_experts_per_tok"])
def test_fields_of_latent_attention_and_experts_are_needed_where_there_are_any(tmp_path: Path, name: str) -> None:
    """DeepSeek-V3 without one of them."""
    with pytest.raises(ConfigurationError, match=f"the field {name}.* is missing"):
        read(tmp_path, {key: value for key, value in DEEPSEEK_V3.items() if key != name})


def test_a_field_of_the_text_model_is_named_with_its_part(tmp_path: Path) -> None:
    """Gemma 3 keeps the language model's fields in a part of its file."""
    inner = {key: value for key, value in GEMMA_3_27B["text_config"].items() if key != "num_hidden_layers"}
    with pytest.raises(ConfigurationError, match=r"the field text_config\.num_hidden_layers is missing"):
        read(tmp_path, {**GEMMA_3_27B, "text_config": inner})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": "32"}, "num_hidden_layers: must be a whole number .*got '32'"),
        ({"num_hidden_layers": 32.5}, "num_hidden_layers: .*got 32.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers: .*got True"),
        ({"hidden_size": 0}, "hidden_size: .*from 1 .*got 0"),
        ({"vocab_size": -1}, "vocab_size: .*got -1"),
        ({"vocab_size": 10**12}, "vocab_size: .*to 1,000,000,000"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5 do not divide the 32"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "head_dim: is missing, and hidden_size 4096 is no"),
        ({"head_dim": -128}, "head_dim: "),
        ({"sliding_window": "wide"}, "sliding_window: .*got 'wide'"),
        ({"use_sliding_window": "no", "sliding_window": 5}, "use_sliding_window: must be true or false"),
        ({"layer_types": "full"}, "layer_types: must be a list"),
        ({"layer_types": ["full_attention"]}, "layer_types: .*each of the 32 layers"),
        ({"layer_types": ["full_attention", "linear_attention"] * 16}, "layer_types: linear_attention: only"),
        ({"layer_types": ["sliding_attention"] * 32}, "the field sliding_window is missing"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok: 5 of 4"),
        ({"num_experts": 4, "num_experts_per_tok": 1, "mlp_only_layers": 3}, "mlp_only_layers: must be a list"),
        ({"quantization_config": 4}, "quantization_config: must be an object"),
        ({"quantization_config": {"quant_method": "new"}}, r"quantization_config\.quant_method: 'new' is none of"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: only decoder-only"),
        ({"full_attention_interval": 4}, "full_attention_interval: layers that keep neither"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size: layers that keep neither"),
        ({"state_size": 16}, "state_size: layers that keep neither"),
    ],
)
def test_a_field_that_is_wrong_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    """With the file, what it may be and what it is, in one line."""
    with pytest.raises(ConfigurationError, match=said) as refused:
        read(tmp_path, LLAMA_8B | changes)
    assert str(refused.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"num_hidden_layers: 32\n", "is not JSON"),
        (b"\xff\xfe\x00\x01", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b"{}", "the field num_hidden_layers is missing"),
        (b'{"n_layer": 12, "n_head": 12}', "the field num_hidden_layers is missing"),
        (b" " * ((1 << 24) + 1), "more than 16,777,216 bytes"),
    ],
    ids=["empty", "broken", "yaml", "binary", "deep", "list", "null", "no fields", "other fields", "large"],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    """Exit code 5, with the file."""
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match=said) as refused:
        read_model_config(path)
    assert str(path) in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, or a directory."""
    with pytest.raises(MissingFileError, match=r"gone\.json is not there"):
        read_model_config(tmp_path / "gone.json")
    with pytest.raises(AccessError, match="cannot be read"):
        read_model_config(tmp_path)
