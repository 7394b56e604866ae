"""What tests with vLLM share. They run in an environment of its own (`make vllm`); everywhere else they are skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M in float32."""
    pytest.importorskip("vllm")
    if "KVCOMPILE_SMOLLM2" not in os.environ:
        pytest.skip("KVCOMPILE_SMOLLM2 names no folder with the model (`make vllm` does)")
    return Path(os.environ["KVCOMPILE_SMOLLM2"])


@cache
def loaded(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="session")
def margin() -> Callable[..., float]:
    """`margin(model, artifact, prompt, answer, token)`: by how much our runtime prefers the last token of its answer
    to another one in the same place, in nats."""
    from kvcompile.runtime import attach

    def preferred(model: Path, artifact: Path, prompt: Sequence[int], answer: Sequence[int], token: int) -> float:
        with attach(loaded(model), artifact) as attachment, torch.no_grad():
            cache = attachment.new_cache()
            logits = attachment.model(torch.tensor([list(prompt)]), past_key_values=cache).logits
            for fed in answer[:-1]:
                logits = attachment.model(torch.tensor([[fed]]), past_key_values=cache).logits
        return float(logits[0, -1, answer[-1]] - logits[0, -1, token])

    return preferred


@pytest.fixture(scope="session")
def ours() -> Callable[..., list[int]]:
    """`ours(model, artifact, prompt, count, shared=0)`: what our runtime answers; `shared` prompt tokens are read and
    cut first."""
    from kvcompile.runtime import attach

    @cache
    def answer(model: Path, artifact: Path, prompt: tuple[int, ...], count: int, shared: int) -> list[int]:
        with attach(loaded(model), artifact) as attachment, torch.no_grad():
            cache = attachment.new_cache()
            if shared:
                attachment.model(torch.tensor([prompt[:shared]]), past_key_values=cache)
            ids = attachment.model.generate(
                torch.tensor([prompt]), past_key_values=cache, max_new_tokens=count, min_new_tokens=count,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return [int(t) for t in ids[0, len(prompt) :]]

    def asked(model: Path, artifact: Path, prompt: Sequence[int], count: int, shared: int = 0) -> list[int]:
        return answer(model, artifact, tuple(prompt), count, shared)

    return asked


@pytest.fixture(scope="session")
def text_ids(smollm2: Path) -> list[int]:
    """Tokens of the handbook in examples/."""
    from transformers import AutoTokenizer

    text = (ROOT / "examples" / "handbook.txt").read_text(encoding="utf-8")
    found: list[int] = AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]
    return found
