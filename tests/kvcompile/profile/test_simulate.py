from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from profiles import material, with_rotary
from tiny_models import make_artifact

from kvcompile.profile import measure
from kvcompile.profile.simulate import plan_divergence
from kvcompile.runtime import attach
from kvcompile.stages import Plan


@pytest.mark.parametrize("bits", [(), ((8, 4), (4, 8))], ids=["exact", "quantised"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma4_text", "gemma4_text, shared", "qwen3_next"])
@torch.no_grad()
def test_it_is_what_the_runtime_does(tiny: Callable[..., Any], name: str, bits: tuple[tuple[int, int], ...]) -> None:
    """The divergence of a plan that evicts, on one episode: of the runtime's logits from the model's own."""
    model, texts = tiny(name), material()
    measured, episode = measure(model, texts, seed=0), texts.measure[0]
    length = len(episode.context)
    plain = make_artifact(model, 14, policy="scored", sink=4, recent=5, context=length, bits=bits)
    quantiser = measured.quantiser if bits else None
    artifact = with_rotary(dataclasses.replace(plain, scorer=measured.scorer, quantiser=quantiser), model)
    budgets = {n: getattr(artifact.budgets, n) for n in ("policy", "capacity", "sink", "recent", "k_bits", "v_bits")}
    layers = len(artifact.budgets.capacity)
    problem = SimpleNamespace(context=length, limit=np.full(layers, length), fixed=np.zeros(layers, bool))
    simulated = plan_divergence(model, [episode], Plan(**budgets, loss=0.0), measured.parts, problem)

    context, found = torch.as_tensor(episode.context)[None], dict[str, list[float]]()
    with attach(model, artifact) as kv:
        cache = kv.new_cache()
        model(context, past_key_values=cache)
        for one in episode.follow_ups:
            ids = torch.as_tensor(one.ids)[None]
            ours = model(ids, past_key_values=copy.deepcopy(cache)).logits[0].double().log_softmax(-1)
            full = model(torch.cat([context, ids], 1)).logits[0, length:].double().log_softmax(-1)
            lost = (full.exp() * (full - ours)).sum(-1)
            # But for the last row, as what comes next is no part of the follow-up.
            rows = np.linspace(one.first, len(one.ids) - 2, min(64, len(one.ids) - 1 - one.first)).round().astype(int)
            found.setdefault(one.kind, []).append(float(lost[rows].mean()))
    mean = {kind: float(np.mean(values)) for kind, values in found.items()}
    assert simulated > 1e-4
    assert simulated == pytest.approx(
        ((mean["continuation"] + mean["quote"]) / 2 + mean["question"]) / 2, rel=0.02 if bits else 1e-3
    )
