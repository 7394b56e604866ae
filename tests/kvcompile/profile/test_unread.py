from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from layer_walk import walked

from kvcompile.profile.attention import attended, causal
from kvcompile.profile.fisher import gradients
from kvcompile.profile.layerwise import through
from kvcompile.profile.structure import frozen, layers
from kvcompile.profile.unread import unread_output

Tiny = Callable[..., Any]


def test_gradients_are_those_of_the_whole_layer(tiny: Tiny, family: str) -> None:
    model, dtype = tiny(family).bfloat16(), torch.bfloat16
    generator = torch.Generator().manual_seed(3)
    width = model.config.get_text_config().hidden_size
    below, upstream = (torch.randn(1, 20, width, generator=generator).to(dtype) for _ in range(2))
    with frozen(model), attended(model):
        _, every = walked(model, np.arange(20) + 3)
        for part, arguments in zip(layers(model), every, strict=True):
            found, _ = gradients(part, below, arguments, upstream, lambda *_: None)
            inputs = below.clone().requires_grad_()
            with torch.enable_grad():
                output = through(part, inputs, arguments, causal)
            (whole,) = torch.autograd.grad(output, inputs, upstream)
            assert torch.equal(found, whole)


def test_a_layer_computes_what_it_did_afterwards(tiny: Tiny) -> None:
    part = layers(tiny("llama"))[0]
    x = torch.randn(5, part.mlp.down_proj.in_features, generator=torch.Generator().manual_seed(3))
    before = part.mlp.down_proj(x)
    with unread_output(part):
        assert not part.mlp.down_proj(x).any()
    assert torch.equal(part.mlp.down_proj(x), before)
    assert "forward" not in vars(part.mlp.down_proj)


def test_a_layer_whose_output_is_normed_is_left_whole(tiny: Tiny) -> None:
    part = layers(tiny("gemma2"))[0]
    x = torch.randn(5, part.mlp.down_proj.in_features, generator=torch.Generator().manual_seed(3))
    with unread_output(part):
        assert part.mlp.down_proj(x).any()
