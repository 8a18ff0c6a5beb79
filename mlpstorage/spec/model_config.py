"""A model of one's own: the `config.json` that Hugging Face models are published with, as a shape.

Understood are decoder-only transformers whose layers keep keys and values of tokens: grouped-query and multi-head
attention, multi-head latent attention, sliding windows, dense and mixture-of-experts MLPs. Fields have the names and
the defaults that the `transformers` library documents for them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError
from mlpstorage.models.architecture import Architecture, Experts, LatentAttention
from mlpstorage.models.shape import BITS_PER_VALUE, ModelShape
from mlpstorage.models.table import FP8_BITS, MXFP4_BITS

FLAG = "--model-config"

MOST_BYTES = 1 << 24
"""A larger file is no such configuration; that of the largest models has some kilobytes."""

MOST = 1_000_000_000
"""Most of anything that is counted."""

_CLEAN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

FULL, SLIDING = "full_attention", "sliding_attention"

PATTERNS: Mapping[str, int] = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}
"""Every so many layers one has full attention and the others a window, where neither the field `layer_types` nor
`sliding_window_pattern` says so."""

_GEMMA_3: Mapping[str, object] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3": _GEMMA_3,
    "gemma3_text": _GEMMA_3,
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {"use_sliding_window": False},
}
"""Defaults of a `model_type` that its published configurations rely on."""

OTHER_LAYERS = (
    "attention_chunk_size",
    "attn_layer_period",
    "attn_type_list",
    "block_types",
    "full_attention_interval",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_attn_config",
    "mamba_d_state",
    "ssm_cfg",
    "state_size",
)
"""Fields of models in which some layers keep a state, or a chunk, in the place of every token or of a window."""


def read_model_config(path: Path) -> ModelShape:
    """The shape of the model that a `config.json` describes.

    Raises:
        MissingFileError: The file is not there.
        AccessError: It cannot be read.
        ConfigurationError: It is not such a configuration, or lacks a field; says which, and in which file.
    """
    document = _document(path)
    inner = document.get("text_config")
    if isinstance(inner, dict):
        fields = _Fields(path, {**_shared(document), **inner}, "text_config.")
    else:
        fields = _Fields(path, document, "")
    _refuse_other_kinds(fields)
    layers = fields.count("num_hidden_layers")
    heads = fields.count("num_attention_heads")
    latent = _latent(fields)
    experts = _experts(fields, layers)
    window_layers, window_tokens = _windows(fields, layers)
    dense_bits, expert_bits = _bits(fields)
    return Architecture(
        name=_name(document, path),
        hidden=fields.count("hidden_size"),
        vocab=fields.count("vocab_size"),
        layers=layers,
        heads=heads,
        kv_heads=0 if latent else _kv_heads(fields, heads),
        head_dim=0 if latent else _head_dim(fields, heads),
        intermediate=0 if experts and experts.layers == layers else fields.count("intermediate_size"),
        window_layers=window_layers,
        window_tokens=window_tokens,
        latent=latent,
        experts=experts,
        tied=fields.switch("tie_word_embeddings", default=False),
        dense_bits=dense_bits,
        expert_bits=expert_bits,
    ).shape()


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a configuration, checked as they are read; one that is null is as one that is not there."""

    path: Path
    values: Mapping[str, Any]
    prefix: str

    def get(self, *names: str) -> tuple[str, Any]:
        """The first of the names that has a value, and the value; the first name and None where none has."""
        defaults = DEFAULTS.get(str(self.values.get("model_type")), {})
        for source in (self.values, defaults):
            for name in names:
                if source.get(name) is not None:
                    return name, source[name]
        return names[0], None

    def count(self, *names: str, least: int = 1) -> int:
        """A whole number, under the first of the names that is there."""
        found = self.count_if_any(*names, least=least)
        if found is None:
            known = f" ({' or '.join(names[1:])})" if len(names) > 1 else ""
            raise ConfigurationError(
                f"{self.path}: the field {self.prefix}{names[0]}{known} is missing; {FLAG} takes the config.json that "
                "a model is published with"
            )
        return found

    def count_if_any(self, *names: str, least: int = 1) -> int | None:
        """The same, or None where it is not there."""
        name, value = self.get(*names)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            raise self.wrong(name, f"must be a whole number from {least} to {MOST:,} (got {value!r})")
        return value

    def switch(self, name: str, *, default: bool) -> bool:
        """True or false."""
        _, value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false (got {value!r})")
        return value

    def wrong(self, name: str, why: str) -> ConfigurationError:
        """The error of a field."""
        return ConfigurationError(f"{self.path}: {self.prefix}{name}: {why}")


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise MissingFileError(f"{FLAG}: {path} is not there") from None
    except OSError as error:
        raise AccessError(f"{FLAG}: {path} cannot be read: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise ConfigurationError(f"{FLAG}: {path} has more than {MOST_BYTES:,} bytes: that is no config.json")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{FLAG}: {path} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{FLAG}: {path} must hold a JSON object, as the config.json of a model does")
    return document


def _shared(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a model of text and images says of itself beside the part on its language model."""
    return {name: document[name] for name in ("tie_word_embeddings", "quantization_config") if name in document}


def _refuse_other_kinds(fields: _Fields) -> None:
    if fields.switch("is_encoder_decoder", default=False):
        raise fields.wrong("is_encoder_decoder", "only decoder-only models can be played")
    for name in OTHER_LAYERS:
        if fields.get(name)[1] is not None:
            raise fields.wrong(name, "layers that keep neither every token nor those of a window cannot be played")


def _latent(fields: _Fields) -> LatentAttention | None:
    rank = fields.count_if_any("kv_lora_rank")
    if rank is None:
        return None
    return LatentAttention(
        kv_lora_rank=rank,
        rope_dim=fields.count("qk_rope_head_dim"),
        nope_dim=fields.count("qk_nope_head_dim"),
        v_dim=fields.count("v_head_dim"),
        q_lora_rank=fields.count_if_any("q_lora_rank"),
    )


def _kv_heads(fields: _Fields, heads: int) -> int:
    kv_heads = fields.count_if_any("num_key_value_heads") or heads
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"{kv_heads} do not divide the {heads} of num_attention_heads")
    return kv_heads


def _head_dim(fields: _Fields, heads: int) -> int:
    head_dim = fields.count_if_any("head_dim")
    if head_dim is not None:
        return head_dim
    hidden = fields.count("hidden_size")
    if hidden % heads:
        raise fields.wrong("head_dim", f"is missing, and hidden_size {hidden} is no multiple of {heads} heads")
    return hidden // heads


def _windows(fields: _Fields, layers: int) -> tuple[int, int]:
    """How many layers have a sliding window, and its tokens; none where it is as long as any prompt."""
    types = fields.get("layer_types")[1]
    listed = None if types is None else _listed_windows(fields, types, layers)
    window_tokens = fields.count("sliding_window") if listed else fields.count_if_any("sliding_window")
    if window_tokens is None or not fields.switch("use_sliding_window", default=True):
        return 0, 0
    if window_tokens >= (fields.count_if_any("max_position_embeddings") or MOST):
        return 0, 0
    window_layers = _windows_by_rule(fields, layers) if listed is None else listed
    return (window_layers, window_tokens) if window_layers else (0, 0)


def _windows_by_rule(fields: _Fields, layers: int) -> int:
    """How many layers have a window where they are not listed."""
    pattern = fields.count_if_any("sliding_window_pattern") or PATTERNS.get(str(fields.values.get("model_type")))
    if pattern is not None:
        return layers - layers // pattern
    if fields.get("use_sliding_window")[1] is not None:
        # Qwen: the first layers are full.
        return max(layers - (fields.count_if_any("max_window_layers", least=0) or 0), 0)
    return layers


def _listed_windows(fields: _Fields, types: object, layers: int) -> int:
    if not isinstance(types, list) or len(types) != layers:
        raise fields.wrong("layer_types", f"must be a list with a text for each of the {layers} layers")
    others = sorted({str(one) for one in types} - {FULL, SLIDING})
    if others:
        raise fields.wrong("layer_types", f"{others[0]}: only layers of {FULL} and {SLIDING} can be played")
    return types.count(SLIDING)


def _experts(fields: _Fields, layers: int) -> Experts | None:
    number = fields.count_if_any("num_experts", "n_routed_experts", "num_local_experts", least=0)
    if not number:
        return None
    per_token = fields.count("num_experts_per_tok", "experts_per_token")
    if per_token > number:
        raise fields.wrong("num_experts_per_tok", f"{per_token} of {number} experts")
    intermediate = fields.count("moe_intermediate_size", "intermediate_size")
    shared = fields.count_if_any("shared_expert_intermediate_size", least=0)
    if shared is None:
        shared = (fields.count_if_any("n_shared_experts", least=0) or 0) * intermediate
    first = fields.count_if_any("first_k_dense_replace", least=0) or 0
    step = fields.count_if_any("decoder_sparse_step") or 1
    dense = fields.get("mlp_only_layers")[1] or []
    if not isinstance(dense, Sequence):
        raise fields.wrong("mlp_only_layers", f"must be a list of layers (got {dense!r})")
    with_experts = [layer for layer in range(first, layers) if layer not in dense and not (layer + 1) % step]
    return Experts(
        count=number,
        per_token=per_token,
        intermediate=intermediate,
        layers=len(with_experts),
        shared_intermediate=shared,
    )


def _bits(fields: _Fields) -> tuple[float, float]:
    """Bits of a weight, outside of routed experts and in them."""
    quantization = fields.get("quantization_config")[1]
    if quantization is None:
        return BITS_PER_VALUE, BITS_PER_VALUE
    if not isinstance(quantization, dict):
        raise fields.wrong("quantization_config", f"must be an object (got {quantization!r})")
    inner = _Fields(fields.path, quantization, f"{fields.prefix}quantization_config.")
    method = quantization.get("quant_method")
    if method == "fp8":
        return FP8_BITS, FP8_BITS
    if method == "mxfp4":
        return BITS_PER_VALUE, MXFP4_BITS
    bits = inner.count_if_any("bits")
    if bits is None:
        raise inner.wrong(
            "quant_method",
            f"{method!r} is none of fp8, mxfp4 or one that gives its bits; take quantization_config out of a copy of "
            "the file to have the weights counted as bfloat16",
        )
    return bits, bits


def _name(document: Mapping[str, Any], path: Path) -> str:
    """The model's name, fit for a directory: what the file says, else the directory it lies in, else its own name."""
    said = document.get("_name_or_path")
    candidates = [said.rstrip("/").rpartition("/")[2] if isinstance(said, str) else "", path.absolute().parent.name]
    for candidate in (*candidates, path.stem):
        if _CLEAN_NAME.fullmatch(candidate):
            return candidate
    return re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-") or "model"
