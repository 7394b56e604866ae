"""Every family that vLLM's CPU build runs, with heads of every kind: the engine's answers are our runtime's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, SHAPE, configs, make_artifact, tiny_model
from transformers import AutoModelForCausalLM

from kvcompile.artifacts import write
from kvcompile.integrations.vllm import refusals

pytest.importorskip("vllm")
from vllm_engines import engine, greedy

# Heads of 32 elements, the smallest that vLLM's own attention for CPUs is made for.
WIDE = SHAPE | {"hidden_size": 192, "intermediate_size": 128, "vocab_size": 128}
UNTRIED = {name for name, config in configs(WIDE, 32, 64).items() if config.model_type in refusals.UNTRIED}
FAMILIES = {name: config for name, config in configs(WIDE, 32, 64).items() if name not in UNTRIED}
PLANS: dict[str, dict[str, Any]] = {
    "recent": {"capacity": 20},
    "scored": {"capacity": 20, "policy": "scored", "recent": 8},
    "scored, rounded": {"capacity": 24, "policy": "scored", "recent": 8, "bits": [(8, 8), (8, 4), (32, 8)]},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_model(FAMILIES[request.param]).save_pretrained(folder)
    return request.param, folder


def test_every_family_is_here() -> None:
    kinds = {config.model_type for config in CONFIGS.values()} - refusals.UNTRIED
    assert {config.model_type for config in FAMILIES.values()} == kinds


@pytest.mark.parametrize("plan", PLANS)
def test_answers_are_the_runtimes(
    family: tuple[str, Path], plan: str, ours: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Prompts of which most are cut, in chunks of 32 tokens, five at once."""
    _, folder = family
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    artifact = tmp_path / "tiny.kvb"
    write(make_artifact(model, **PLANS[plan]), artifact)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 120, (n,), generator=generator).tolist() for n in (5, 40, 1, 90, 33)]
    expected = [ours(folder, artifact, prompt, 12) for prompt in prompts]
    settings = {"max_model_len": 128, "max_num_batched_tokens": 32, "max_num_seqs": 8, "skip_tokenizer_init": True}
    with engine(folder, artifact, **settings) as llm:
        found = greedy(llm, prompts, 12, detokenize=False)
    if "rounded" not in plan:
        assert found == expected
        return
    agreed = sum(a == b for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True))
    assert agreed >= 0.7 * 12 * len(prompts)


def test_a_compiled_model_keeps_its_scorer(ours: Callable[..., list[int]], tmp_path: Path) -> None:
    """With torch.compile, answers are our runtime's too, though nothing in the model reads what the scorer's operator
    returns."""
    folder, artifact = tmp_path / "model", tmp_path / "tiny.kvb"
    model = tiny_model(FAMILIES["llama"])
    model.save_pretrained(folder)
    write(make_artifact(model, **PLANS["scored"]), artifact)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 120, (n,), generator=generator).tolist() for n in (5, 40, 1, 90, 33)]
    settings = {"max_model_len": 128, "max_num_batched_tokens": 32, "max_num_seqs": 8, "skip_tokenizer_init": True}
    with engine(folder, artifact, enforce_eager=False, **settings) as llm:
        found = greedy(llm, prompts, 12, detokenize=False)
    assert found == [ours(folder, artifact, prompt, 12) for prompt in prompts]
