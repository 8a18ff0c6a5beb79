"""The models that are known by name.

Sources: the `config.json` that each model is published with, and for the precision of the weights its model card.
"""

from types import MappingProxyType

from mlpstorage.models.architecture import Architecture, Experts, LatentAttention
from mlpstorage.models.shape import ModelShape

MXFP4_BITS = 4.25
"""Bits of a weight in MXFP4: 4, and a scale of 8 for each 32 (OCP Microscaling Formats; model card of gpt-oss)."""

FP8_BITS = 8.0

LLAMA_3_VOCAB = 128_256
QWEN_3_VOCAB = 151_936
GPT_OSS_VOCAB = 201_088


def _gpt_oss(name: str, *, layers: int, experts: int) -> Architecture:
    """Every second layer has a window; experts are published in MXFP4, all else in bfloat16."""
    return Architecture(
        name=name,
        hidden=2880,
        vocab=GPT_OSS_VOCAB,
        layers=layers,
        heads=64,
        kv_heads=8,
        head_dim=64,
        intermediate=2880,
        window_layers=layers // 2,
        window_tokens=128,
        experts=Experts(count=experts, per_token=4, intermediate=2880, layers=layers),
        expert_bits=MXFP4_BITS,
    )


def _gqa(
    name: str, *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> Architecture:
    """A dense model whose heads have 128 values."""
    return Architecture(
        name=name,
        hidden=hidden,
        vocab=vocab,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        intermediate=intermediate,
    )


def _table(*architectures: Architecture) -> MappingProxyType[str, ModelShape]:
    return MappingProxyType({one.name: one.shape() for one in architectures})


MODELS = _table(
    _gqa("tiny-1b", hidden=2048, intermediate=8192, layers=12, heads=16, kv_heads=4, vocab=65_536),
    # v0.2 and v0.3: v0.1 had a window of 4,096 tokens in every layer.
    _gqa("mistral-7b", hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, vocab=32_768),
    _gqa("llama2-7b", hidden=4096, intermediate=11_008, layers=32, heads=32, kv_heads=32, vocab=32_000),
    _gqa("llama3.1-8b", hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, vocab=LLAMA_3_VOCAB),
    _gqa(
        "llama3.1-70b-instruct", hidden=8192, intermediate=28_672, layers=80, heads=64, kv_heads=8, vocab=LLAMA_3_VOCAB
    ),
    _gqa("llama3.1-405b", hidden=16_384, intermediate=53_248, layers=126, heads=128, kv_heads=8, vocab=LLAMA_3_VOCAB),
    _gqa("qwen3-8b", hidden=4096, intermediate=12_288, layers=36, heads=32, kv_heads=8, vocab=QWEN_3_VOCAB),
    _gqa("qwen3-32b", hidden=5120, intermediate=25_600, layers=64, heads=64, kv_heads=8, vocab=QWEN_3_VOCAB),
    Architecture(
        name="qwen3-235b-a22b",
        hidden=4096,
        vocab=QWEN_3_VOCAB,
        layers=94,
        heads=64,
        kv_heads=4,
        head_dim=128,
        intermediate=12_288,
        experts=Experts(count=128, per_token=8, intermediate=1536, layers=94),
    ),
    # Published in FP8. Its output head, routers and norms are bfloat16, 0.2 % of the weights: counted as FP8, too.
    Architecture(
        name="deepseek-v3",
        hidden=7168,
        vocab=129_280,
        layers=61,
        heads=128,
        intermediate=18_432,
        latent=LatentAttention(kv_lora_rank=512, rope_dim=64, nope_dim=128, v_dim=128, q_lora_rank=1536),
        experts=Experts(count=256, per_token=8, intermediate=2048, layers=58, shared_intermediate=2048),
        dense_bits=FP8_BITS,
        expert_bits=FP8_BITS,
    ),
    _gpt_oss("gpt-oss-20b", layers=24, experts=32),
    _gpt_oss("gpt-oss-120b", layers=36, experts=128),
    # The language model alone: images have an encoder of their own, of 0.4e9 weights. Every sixth layer is full.
    Architecture(
        name="gemma-3-27b",
        hidden=5376,
        vocab=262_208,
        layers=62,
        heads=32,
        kv_heads=16,
        head_dim=128,
        intermediate=21_504,
        window_layers=52,
        window_tokens=1024,
        tied=True,
    ),
)
"""Every model by name. `tiny-1b` is made up, for small machines and tests."""
