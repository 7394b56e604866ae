"""Learned sinks and capped logits through stores that are quantised, whose keys and values lack their means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model

from kvcompile.runtime import attach

PROMPT = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kernels", ["", "torch"], ids=["C", "torch"])
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
@torch.inference_mode()
def test_eight_bits_say_what_the_model_says(
    family: str, kernels: str, make_artifact: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a prompt, a step, several tokens and another step."""
    monkeypatch.setenv("KVCOMPILE_KERNELS", kernels)
    config = copy.deepcopy(CONFIGS[family])
    if family == "gpt-oss":  # rounding may send a token to another of several experts
        config.num_local_experts = config.num_experts_per_tok = 1
    model = tiny_model(config)
    plain = model(PROMPT).logits
    with attach(model, make_artifact(model, bits=[(8, 8), (32, 8), (8, 32)])) as kv:
        cache, first = kv.new_cache(2), 0
        for length in (40, 1, 12, 1, 6):
            said = model(PROMPT[:, first : first + length], past_key_values=cache).logits
            expected = plain[:, first : first + length]
            first += length
            assert (said - expected).norm() < 0.03 * expected.norm(), length


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
@torch.inference_mode()
def test_what_the_softmax_is_missing_shows(family: str) -> None:
    """The caps and sinks of the tiny models are such that a plain softmax would be seen."""
    model = tiny_model(CONFIGS[family])
    plain = model(PROMPT).logits
    for layer in model.model.layers:
        if family == "gemma2":
            layer.self_attn.attn_logit_softcapping = 1e6
        else:
            layer.self_attn.sinks.fill_(-1e6)
    assert (model(PROMPT).logits - plain).norm() > 0.1 * plain.norm()
