"""Quantised checkpoints are served with an artifact that was compiled for the 16-bit one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
import quantised_checkpoints
from vllm_engines import EXACT, engine, greedy, solved, weighed, worse

COUNT = 24

NEEDS_AMX = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's products of fp8 need AMX")


@pytest.mark.parametrize(
    ("quantise", "method", "near"),
    [
        (quantised_checkpoints.gptq, "gptq", 0.25),
        (quantised_checkpoints.awq, "awq", 0.25),
        (quantised_checkpoints.int8, "compressed-tensors", 1.0),
        pytest.param(quantised_checkpoints.fp8, "fp8", 1.0, marks=NEEDS_AMX),
    ],
    ids=["gptq", "awq", "int8", "fp8"],
)
def test_answers(
    quantise: Callable[[Path, Path], Path],
    method: str,
    near: float,
    smollm2: Path,
    text_ids: list[int],
    tmp_path: Path,
) -> None:
    """With a full budget answers are plain vLLM's, but where two tokens are nearly as good; with a quarter, those to
    what both caches hold whole. `near`: nats between tokens of which either may be taken in bfloat16; where
    activations are rounded too, a small difference becomes a larger one."""
    full = solved(EXACT, tmp_path / "full.kvb", "--mem", "100%", "--context", "2048", "--kv-dtype", "bf16")
    folder = quantise(smollm2, tmp_path / "quantised")
    prompts = [text_ids[i : i + n] for i, n in ((0, 5), (30, 60), (100, 700), (900, 300))]
    with engine(folder, None, dtype="bfloat16") as llm:
        # vLLM may call it auto_gptq, say.
        assert method in llm.llm_engine.vllm_config.model_config.quantization
        plain = weighed(llm, prompts, COUNT)
    with engine(folder, full, dtype="bfloat16") as llm:
        whole = greedy(llm, prompts, COUNT)
    with engine(folder, EXACT, dtype="bfloat16") as llm:
        quarter = greedy(llm, prompts, COUNT)
    assert max(map(worse, whole, plain)) < near
    assert max(map(worse, quarter[:2], plain[:2])) < near
