from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kvcompile.artifacts import heads_of
from kvcompile.profile.attention import attending, causal
from kvcompile.profile.scores import baklava, watching
from kvcompile.profile.structure import attention_layers, forward, last_own


def test_cosines_equal_those_of_the_models_own_attention(tiny: Callable[..., Any], family: str) -> None:
    model, ids = tiny(family), np.random.default_rng(0).integers(3, 61, 50)
    seen = []
    with ExitStack() as stack:
        for layer in attention_layers(model):
            seen.append(stack.enter_context(watching(layer, 4)))
        stack.enter_context(attending(model, lambda call: seen[call.layer].attending(causal)(call)))
        forward(model, ids)

    model.set_attn_implementation("eager")
    values: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    gates: list[torch.Tensor] = []
    own = list(enumerate(model.model.layers))[: last_own(model) + 1]  # a layer that attends to others' has no values
    decoder = [(i, layer) for i, layer in own if hasattr(layer, "self_attn")]
    for _, layer in decoder:
        attention = layer.self_attn
        after_norm = getattr(attention, "v_norm", None)  # Gemma-4's, over every head by itself
        projection = after_norm or getattr(attention, "v_proj", None) or attention.qkv_proj
        projection.register_forward_hook(lambda _, args, out: values.append(out[0].detach()))
        attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0].detach()))
        if family.startswith("qwen3_"):  # half of it are gates on the outputs
            attention.q_proj.register_forward_hook(lambda _, args, out: gates.append(out[0].detach()))
    # The residual stream after the attention block, from the layer's parts.
    with torch.no_grad():
        result = model(torch.as_tensor(ids)[None], output_hidden_states=True)
    for index, (number, layer) in enumerate(decoder):
        head_dim = outputs[index].shape[-1] // 4
        count, _ = heads_of(model.config, number)
        own = values[index].reshape(50, -1)[:, -count * head_dim :]
        value = own.view(50, count, head_dim).repeat_interleave(4 // count, 1)
        mixed = outputs[index].view(50, 4, head_dim)
        if gates and gates[index].shape[-1] == 8 * head_dim:
            mixed = mixed / gates[index].view(50, 4, 2 * head_dim)[..., head_dim:].sigmoid()
        expected = F.cosine_similarity(value, mixed, dim=-1).mean(0)
        np.testing.assert_allclose(seen[index].value, expected.numpy(), atol=1e-5)
        with torch.no_grad():
            before = result.hidden_states[number][0]
            added = layer.self_attn.o_proj(outputs[index]) * getattr(model.config, "residual_multiplier", 1)
            if family.startswith(("gemma", "olmo")):
                added = layer.post_attention_layernorm(added)
        residual = F.cosine_similarity(before, before + added, dim=-1).mean().item()
        np.testing.assert_allclose(seen[index].residual, residual, atol=1e-5)


def test_baklava_is_head_times_layer() -> None:
    value = np.array([[0.5, 0.7, 0.0, 1.0], [1.0, 1.0, -1.0, 0.0]])
    expected = [[0.4 * 0.25, 0.5 * 0.25], [0.0, 1.5 * 0.5]]
    np.testing.assert_allclose(baklava(value, np.array([0.75, 0.5]), 2), expected)
