"""Hybrids: follow-ups that are packed go on from the context in layers of linear attention too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvcompile.profile.attention import Attention, attended, attending
from kvcompile.profile.context import after, follow, over_context, pack, read_context
from kvcompile.profile.fisher import gradients
from kvcompile.profile.layerwise import after as after_layer
from kvcompile.profile.linear import tensors_of
from kvcompile.profile.structure import forward, frozen, layers, place_of


@dataclass(frozen=True)
class Asked:
    kind: str
    first: int
    ids: NDArray[np.int64]


def drawn(*lengths: int) -> list[NDArray[np.int64]]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 61, length) for length in lengths]


@pytest.mark.parametrize("family_", ["llama", "qwen3_next", "qwen3_5_text"])
def test_each_follow_up_sees_the_context_and_no_other(tiny: Callable[..., Any], family_: str) -> None:
    """One of a single token among them, which takes another way through such a layer."""
    model, (ids, *follow_ups) = tiny(family_), drawn(70, 9, 1, 14)
    with frozen(model):
        context = read_context(model, ids)
        packed = pack(len(ids), [Asked("quote", 0, own) for own in follow_ups])
        for _ in range(2):  # nothing of the first pass is left
            final = follow(model, context, packed, over_context(context, packed)).final
            for block, own in zip(packed.blocks, follow_ups, strict=True):
                alone = forward(model, np.concatenate([ids, own])).final[len(ids) :]
                torch.testing.assert_close(final[block.start : block.stop], alone, atol=2e-4, rtol=2e-4)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family_", ["llama", "qwen3_next", "qwen3_5_text"])
def test_gradients_are_those_of_the_whole_pass(tiny: Callable[..., Any], family_: str) -> None:
    model, (ids, one, two) = tiny(family_), drawn(40, 9, 6)
    found, wanted = list[torch.Tensor](), list[torch.Tensor]()
    with frozen(model):
        context = read_context(model, ids)
        packed = pack(len(ids), [Asked("quote", 0, one), Asked("quote", 0, two)])
        attend = over_context(context, packed)
        trace = follow(model, context, packed, attend)
        gradient = torch.randn(trace.final.shape, generator=torch.Generator().manual_seed(1))
        slope, decoder_layers = gradient[None], list(enumerate(layers(model)))
        for number, part in reversed(decoder_layers):
            inputs, arguments = trace.inputs[number], trace.arguments[number]
            one = replace(context, keys=context.keys[place_of(model, number) :][:1],
                          values=context.values[place_of(model, number) :][:1])  # fmt: skip
            # As a profile has it from its disk: tensors, of which a state is made anew.
            left = {name: tensor.clone() for name, tensor in tensors_of(context.states, part).items()}
            with attended(model), after_layer(model, part, packed, left):
                slope, _ = gradients(
                    part, inputs, arguments, slope, lambda call, upstream: found.append(upstream),
                    over_context(one, packed),
                )  # fmt: skip

        def watched(call: Attention) -> torch.Tensor:
            output = attend(call).detach().requires_grad_() if not wanted else attend(call)
            output.retain_grad()
            wanted.append(output)
            return output

        decoder, final = model.get_decoder(), list[torch.Tensor]()
        hook = decoder.norm.register_forward_pre_hook(lambda _, args: final.append(args[0][0]))
        with attending(model, watched), after(model, context, packed), torch.enable_grad():
            places = torch.from_numpy(packed.positions)[None]
            decoder(input_ids=torch.from_numpy(packed.ids)[None], position_ids=places, use_cache=False)
        hook.remove()
        final[0].backward(gradient)
    for ours, output in zip(reversed(found), wanted, strict=True):
        torch.testing.assert_close(ours, output.grad, atol=1e-4, rtol=1e-3)
