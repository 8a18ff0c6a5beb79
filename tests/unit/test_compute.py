"""How long the modelled accelerators take, worked by hand from the formulas and the data sheets."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlpstorage.config import Accelerator
from mlpstorage.models import MODELS, ModelShape
from mlpstorage.plan.compute import (
    PEAKS,
    ConstantCompute,
    FormulaCompute,
    Peak,
    break_even_bytes_per_s,
    compute_model,
    prefill_tokens_per_s,
)
from mlpstorage.spec.kvcache import KVCacheSpec

PAGE = (Path(__file__).parents[2] / "docs" / "compute.md").read_text(encoding="utf-8")

LLAMA_70B = ModelShape(
    name="llama3.1-70b", layers=80, kv_heads=8, head_dim=128, attention_width=8192, dense_weights=70_600_000_000
)
"""As one would write it down: 80 layers, 64 x 128 values of queries, 8 key/value heads, 70.6e9 parameters."""

ROUND = FormulaCompute(
    shape=ModelShape(name="r", layers=2, kv_heads=1, head_dim=25, attention_width=50, dense_weights=1000),
    peak=Peak(flop_per_s=1e6, memory_bytes_per_s=1e4),
    accelerators=4,
    mfu=0.5,
)
"""2e6 operations a second, and 4 x 1e4 x 0.8 = 32,000 bytes; 200 bytes a token, 2,000 bytes of weights."""


def h100s(shape: ModelShape, number: int) -> FormulaCompute:
    """So many H100 at their peak."""
    return FormulaCompute(shape=shape, peak=PEAKS[Accelerator.H100], accelerators=number, mfu=1.0)


# Prefill


@pytest.mark.parametrize(
    ("tokens", "expected_s"),
    [
        # [2 x 70.6e9 x 128,000 + 2 x 80 x 8192 x 128,000^2] / (4 x 989e12) = 3.9548e16 / 3.956e15
        (128_000, 9.997),
        # The same of 2^17 tokens: (1.85074e16 + 2.25180e16) / 3.956e15
        (131_072, 10.370),
    ],
)
def test_a_long_prompt_of_a_large_model(tokens: int, expected_s: float) -> None:
    """llama3.1-70b on four H100 at their peak, with all of its parameters as active ones."""
    assert h100s(LLAMA_70B, 4).prefill_s(tokens, 0) == pytest.approx(expected_s, abs=0.0005)


def test_the_table_counts_no_embedding() -> None:
    """Its 70b has 128,256 x 8,192 active weights less: 0.7 % of the time of a long prompt."""
    shape = MODELS["llama3.1-70b-instruct"]
    assert shape.active_weights == 70_553_706_496 - 128_256 * 8192
    assert h100s(shape, 4).prefill_s(128_000, 0) == pytest.approx(9.997, rel=0.008)


@pytest.mark.parametrize(
    ("new", "cached", "flop"),
    [
        (0, 0, 0),
        # 2 x 1,000 x 10 + 4 x 2 x 50 x (0 + 50)
        (10, 0, 40_000),
        # 2 x 1,000 x 10 + 4 x 2 x 50 x (10 x 30 + 50)
        (10, 30, 160_000),
        # 2 x 1,000 + 4 x 2 x 50 x (40 + 1/2)
        (1, 40, 18_200),
    ],
)
def test_new_tokens_attend_to_all_before_them(new: int, cached: int, flop: int) -> None:
    """The matrices for the new ones alone, the attention for the cached ones, too."""
    assert ROUND.prefill_s(new, cached) == pytest.approx(flop / 2e6)


def test_a_prompt_in_two_parts_takes_as_long_as_in_one() -> None:
    """What is cached saves exactly its own prefill, with windows and without."""
    for shape in MODELS.values():
        compute = h100s(shape, 1)
        for cached, new in ((100, 50), (1000, 3000), (64, 64), (5000, 1)):
            parts_s = compute.prefill_s(cached, 0) + compute.prefill_s(new, cached)
            assert parts_s == pytest.approx(compute.prefill_s(cached + new, 0), rel=1e-12)


@pytest.mark.parametrize(("new", "cached"), [(1, 0), (7, 0), (8, 0), (9, 0), (50, 0), (3, 4), (10, 5), (5, 8), (5, 90)])
def test_a_window_bounds_what_a_token_sees(new: int, cached: int) -> None:
    """Summed up token by token over small steps, with a window of 8 in one of three layers."""
    shape = replace(ROUND.shape, window_layers=1, window_tokens=8)
    steps = 1000
    seen = 0.0
    for step in range(new * steps):
        before = cached + (step + 0.5) / steps
        seen += (2 * before + min(before, 8)) / steps
    expected_s = (2 * 1000 * new + 4 * 50 * seen) / 2e6
    assert replace(ROUND, shape=shape).prefill_s(new, cached) == pytest.approx(expected_s, rel=1e-6)


def test_a_small_window_makes_long_prompts_cheap() -> None:
    """gemma-3-27b: a prompt of 131,072 tokens costs little more than 16 of 8,192; llama's attention dominates."""
    gemma, llama = (h100s(MODELS[name], 1) for name in ("gemma-3-27b", "llama3.1-8b"))
    assert gemma.prefill_s(131_072, 0) < 1.2 * 16 * gemma.prefill_s(8192, 0)
    assert llama.prefill_s(131_072, 0) > 2.5 * 16 * llama.prefill_s(8192, 0)


def test_latent_attention_is_computed_head_by_head() -> None:
    """deepseek-v3: a head's query has 128 + 64 values and its value 128: 2 x 320 operations for a pair."""
    shape = MODELS["deepseek-v3"]
    pairs = 4096 * 4096 / 2
    attention_s = 61 * 128 * 2 * (192 + 128) * pairs / 989e12
    weights_s = 2 * shape.active_weights * 4096 / 989e12
    assert h100s(shape, 1).prefill_s(4096, 0) == pytest.approx(attention_s + weights_s)


# Decode


@pytest.mark.parametrize(
    ("batch", "context", "expected_s"),
    [
        # (2,000 + 0) / 32,000, and 2 x 1,000 / 2e6 = 1 ms
        (1, 0, 0.0625),
        # (2,000 + 300 x 200) / 32,000
        (3, 300, 1.9375),
        # 2 x 1,000 x 100 / 2e6 against 2,000 / 32,000: now the operations decide.
        (100, 0, 0.1),
        (100, 5, 0.1),
        # (2,000 + 50 x 200) / 32,000
        (100, 50, 0.375),
    ],
)
def test_a_decode_step_reads_weights_and_contexts(batch: int, context: float, expected_s: float) -> None:
    """Memory decides, until the batch is so large that the operations do."""
    assert ROUND.decode_step_s(batch, context) == pytest.approx(expected_s)


def test_a_step_reads_the_experts_that_its_tokens_go_to() -> None:
    """Of 4 experts with 1 a token: a quarter for one token, 7/16 for two, all of them for many."""
    shape = replace(ROUND.shape, expert_weights=1600, experts=4, experts_per_token=1, expert_bits=4, dense_bits=8)
    assert shape.active_weights == 1400
    assert [shape.step_weight_bytes(batch) for batch in (1, 2)] == [1000 + 200, 1000 + 350]
    assert shape.step_weight_bytes(1000) == pytest.approx(1000 + 800)


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        # 7.505e9 weights of two bytes, whatever the batch.
        ("llama3.1-8b", 15.01e9, 15.01e9),
        # 21.6e9 active ones; 235.1e9 without the embedding of 0.6e9.
        ("qwen3-235b-a22b", 43.1e9, 468.9e9),
        # One byte each: 36.6e9 and 670.1e9.
        ("deepseek-v3", 36.6e9, 670.1e9),
        # 114.7e9 of experts at 4.25 bits are 60.9e9 bytes, of which 4 of 128; the other 1.55e9 weights have two bytes.
        ("gpt-oss-120b", 5.0e9, 64.0e9),
    ],
)
def test_bytes_of_weights_of_a_step(name: str, one: float, many: float) -> None:
    """In the precision that the model ships in, for one token and for very many."""
    assert MODELS[name].step_weight_bytes(1) == pytest.approx(one, rel=0.005)
    assert MODELS[name].step_weight_bytes(10_000) == pytest.approx(many, rel=0.005)


def test_a_windowed_layer_reads_no_more_than_its_window() -> None:
    """Two sequences of 5 tokens read them all, of 50 tokens 8 each: 100 bytes a token in that layer."""
    compute = replace(ROUND, shape=replace(ROUND.shape, window_layers=1, window_tokens=8))
    assert compute.decode_step_s(2, 10) == pytest.approx((2000 + 10 * 200 + 10 * 100) / 32_000)
    assert compute.decode_step_s(2, 100) == pytest.approx((2000 + 100 * 200 + 16 * 100) / 32_000)


# Break-even


@pytest.mark.parametrize(
    ("accelerator", "flop_per_s", "bytes_per_s"),
    [(Accelerator.A100, 312e12, 5.86e9), (Accelerator.H100, 989e12, 18.57e9)],
    ids=["8 x A800", "8 x H800"],
)
def test_equation_2_of_the_mooncake_paper(accelerator: Accelerator, flop_per_s: float, bytes_per_s: float) -> None:
    """LLaMA3-70B, a prefix of 8,192 tokens: the published 6 and 19 GB/s.

    Equation 1 counts `l (a n^2 d + b n d^2)` operations with a = 4, b = 22. Here b d^2 per layer are two operations for
    each active weight, and a = 4 is attention over the whole square, where the formula here takes the causal half:
    twice the width makes up for it. A800 and H800 compute as fast as A100 and H100.
    """
    layers, d, gqa, p = 80, 8192, 8, 8192
    shape = replace(LLAMA_70B, dense_weights=22 * layers * d * d // 2, attention_width=2 * d)
    compute = FormulaCompute(shape=shape, peak=PEAKS[accelerator], accelerators=8, mfu=1.0)
    found = break_even_bytes_per_s(compute, bytes_per_token=shape.bytes_per_token, context_tokens=p)
    assert found is not None
    assert found == pytest.approx(2 * d * 2 * 8 * flop_per_s / (gqa * (4 * p * d + 22 * d * d)))
    assert found == pytest.approx(bytes_per_s, abs=0.005e9)


def test_break_even_of_a_constant_rate_does_not_hang_on_length() -> None:
    """20,000 tokens a second x 131,072 bytes."""
    compute = ConstantCompute(prefill_tokens_per_s=20_000, decode_tokens_per_s=None)
    for tokens in (1, 2048, 131_072):
        found = break_even_bytes_per_s(compute, bytes_per_token=131_072, context_tokens=tokens)
        assert found == pytest.approx(2_621_440_000)


# What the spec makes of it


def test_the_specs_accelerators_compute() -> None:
    """Model, number, kind and MFU as given."""
    compute = compute_model(KVCacheSpec(model="qwen3-8b", accelerator=Accelerator.H200, num_accelerators=2, mfu=0.4))
    assert compute == FormulaCompute(
        shape=MODELS["qwen3-8b"], peak=Peak(flop_per_s=989e12, memory_bytes_per_s=4.8e12), accelerators=2, mfu=0.4
    )


def test_rates_are_taken_as_they_are() -> None:
    """1,000 tokens at 20,000 a second; 50 tokens a second, in any company."""
    compute = compute_model(KVCacheSpec(prefill_tokens_per_s=20_000, decode_tokens_per_s=50))
    assert (compute.prefill_s(1000, 0), compute.prefill_s(1000, 5000)) == (0.05, 0.05)
    assert (compute.decode_step_s(1, 10), compute.decode_step_s(100, 1e6)) == (0.02, 0.02)


def test_what_is_not_modelled_is_none() -> None:
    """Never 0: no time and no bandwidth follows from it."""
    compute = compute_model(KVCacheSpec(accelerator=Accelerator.NONE))
    assert compute.prefill_s(1000, 0) is None
    assert compute.decode_step_s(1, 1000) is None
    assert prefill_tokens_per_s(compute, 1000) is None
    assert break_even_bytes_per_s(compute, bytes_per_token=1, context_tokens=1) is None
    half = compute_model(KVCacheSpec(decode_tokens_per_s=50))
    assert (half.prefill_s(1000, 0), half.decode_step_s(1, 1000)) == (None, 0.02)


def test_peaks_are_those_of_the_data_sheets() -> None:
    """Every accelerator of the command line has one; dense bfloat16, in TFLOPS and TB/s."""
    shown = {name.value: (peak.flop_per_s / 1e12, peak.memory_bytes_per_s / 1e12) for name, peak in PEAKS.items()}
    assert shown == {
        "a100": (312, 2.039),
        "h100": (989, 3.35),
        "h200": (989, 4.8),
        "b200": (2250, 7.7),
        "mi355x": (2516.6, 8),
    }
    assert {*PEAKS, Accelerator.NONE} == set(Accelerator)


# The documentation


def rows(section: str) -> dict[str, list[str]]:
    """The rows of the table of a section by the name in their first cell."""
    body = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([^`]+)` \| (.+) \|$", body, flags=re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in found}


def test_the_documented_peaks_are_those_that_are_used() -> None:
    """In the units of the table."""
    assert {name: tuple(cells[:2]) for name, cells in rows("Accelerators").items()} == {
        name.value: (f"{peak.flop_per_s / 1e12:g}", f"{peak.memory_bytes_per_s / 1e12:g}")
        for name, peak in PEAKS.items()
    }


def test_the_documented_models_are_those_that_are_played() -> None:
    """Layers, width, bytes of a token and weights of each."""
    shown = {name: (int(cells[0].split()[0]), *cells[2:6]) for name, cells in rows("Models").items()}
    assert shown == {
        name: (
            shape.layers + shape.window_layers,
            f"{shape.attention_width:,}",
            f"{shape.bytes_per_token:,}",
            f"{shape.weights / 1e9:.2f}e9",
            f"{shape.active_weights / 1e9:.2f}e9",
        )
        for name, shape in MODELS.items()
    }
