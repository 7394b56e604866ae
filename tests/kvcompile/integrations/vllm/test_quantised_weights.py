"""A quantised checkpoint is served with an artifact that was compiled for the 16-bit one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")
from gptq import quantise
from vllm_engines import EXACT, engine, greedy, solved

COUNT = 24


def parted(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def test_gptq(smollm2: Path, text_ids: list[int], tmp_path: Path) -> None:
    """With a full budget answers are plain vLLM's, but where two tokens are as good; with a quarter, those to
    what both caches hold whole."""
    full = solved(EXACT, tmp_path / "full.kvb", "--mem", "100%", "--context", "2048", "--kv-dtype", "bf16")
    folder = quantise(smollm2, tmp_path / "gptq")
    prompts = [text_ids[i : i + n] for i, n in ((0, 5), (30, 60), (100, 700), (900, 300))]
    with engine(folder, None, dtype="bfloat16") as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization == "auto_gptq"
        plain = greedy(llm, prompts, COUNT)
    with engine(folder, full, dtype="bfloat16") as llm:
        whole = greedy(llm, prompts, COUNT)
    with engine(folder, EXACT, dtype="bfloat16") as llm:
        quarter = greedy(llm, prompts, COUNT)
    assert sum(map(parted, whole, plain)) >= 0.6 * COUNT * len(prompts)
    assert sum(map(parted, quarter[:2], plain[:2])) >= 0.6 * COUNT * 2
