"""Rotary embedding as it is read from models: every family, scaled, partial, a base a layer, either layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcompile.artifacts.errors import ModelError
from kvcompile.profile.attention import Attention, attending
from kvcompile.profile.context import read_context
from kvcompile.profile.linear import switched_off
from kvcompile.profile.quantised import Shift, quantised
from kvcompile.profile.rotation import read_rotary, rotated, unrotated
from kvcompile.profile.structure import attention_layers, forward, frozen, layers
from kvcompile.runtime.parts import planned

SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 512,
}  # fmt: skip


FAR = 10_485_760
"""Llama-4 Scout's longest context: float32 does not hold the angles of its last positions."""


def unrotated_agree(model: Any, length: int = 40) -> None:
    """A repeated token has the same key everywhere in the first layer once its rotation is undone, and has not before;
    attention later mixes the positions."""
    rotary = read_rotary(model, length)
    with frozen(model), switched_off(layers(model)):
        context = read_context(model, np.full(length, 7))
    keys = context.keys[[planned(layer) for layer in attention_layers(model)].index(True)]
    still = unrotated(keys, torch.arange(length), rotary, 0)
    assert (still - still[:, :1]).abs().max() < 1e-3 * still.abs().max()
    assert (keys - keys[:, :1]).abs().max() > 0.1 * still.abs().max()


def test_every_family(tiny: Callable[..., Any], family: str) -> None:
    unrotated_agree(tiny(family))


@pytest.mark.parametrize("family_", ["llama", "llama4_text"])
def test_contexts_of_millions_of_tokens(tiny: Callable[..., Any], family_: str) -> None:
    rotary = read_rotary(tiny(family_, max_position_embeddings=FAR), 100)
    own = read_rotary(tiny(family_), 100)
    assert np.array_equal(rotary.frequency, own.frequency)
    assert rotary.context == 0


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies(tiny: Callable[..., Any], kind: str) -> None:
    model = tiny(rope_parameters=SCALED[kind])
    rotary = read_rotary(model, 1024)
    own = model.model.rotary_emb.inv_freq.numpy()
    assert np.allclose(rotary.frequency, np.concatenate([own, -own]), rtol=1e-5)
    assert rotary.context == 0
    unrotated_agree(model)


def test_partial_rotation(tiny: Callable[..., Any]) -> None:
    model = tiny("phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    rotary = read_rotary(model, 64)
    assert (rotary.frequency[:, 4:] == 0).all()
    assert (rotary.frequency[:, :4] != 0).all()
    unrotated_agree(model)


def test_neighbouring_components(tiny: Callable[..., Any]) -> None:
    model = tiny("cohere")
    assert read_rotary(model, 64).partner[:4].tolist() == [1, 0, 3, 2]
    unrotated_agree(model)


def test_a_base_a_layer(tiny: Callable[..., Any]) -> None:
    """Gemma-3's sliding layers rotate faster than the others."""
    frequency = read_rotary(tiny("gemma3_text"), 64).frequency
    assert np.array_equal(frequency[0], frequency[1])
    assert (frequency[0, 1:8] > frequency[2, 1:8]).all()


def test_layers_without_rotation(tiny: Callable[..., Any]) -> None:
    rotary = read_rotary(tiny("smollm3", no_rope_layers=[1, 0, 1]), 64)
    assert (rotary.frequency[1] == 0).all()
    assert (rotary.frequency[[0, 2]] != 0).all()


@pytest.mark.parametrize("parameters", [LONG, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}])
def test_frequencies_that_change_with_the_length(tiny: Callable[..., Any], parameters: dict[str, Any]) -> None:
    model = tiny(rope_parameters=parameters, max_position_embeddings=512)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    near, far = read_rotary(model, 64), read_rotary(model, 2000)
    assert (near.context, far.context) == (64, 2000)
    assert far.serves(2000)
    assert not far.serves(64)
    assert (np.abs(far.frequency[0, 1:4]) < np.abs(near.frequency[0, 1:4])).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    unrotated_agree(model)


def test_sixteen_bit_models_have_exact_frequencies(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen2")
    exact = read_rotary(model, 1000).frequency
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()  # as a checkpoint is loaded: the tables' own frequencies stay in float32
    assert np.array_equal(read_rotary(model, 1000).frequency, exact)


def test_a_shift_is_a_later_place_in_a_longer_context(tiny: Callable[..., Any]) -> None:
    """Keys of a text read at positions 500 to 539, without reading what would come before."""
    model, length, offset = tiny("qwen2"), 40, 500
    rotary = read_rotary(model, 1024)
    keys: list[Tensor] = []

    def attend(call: Attention) -> Tensor:
        keys.append(call.key)
        return torch.zeros_like(call.query)

    ids = np.arange(length) % 90
    with frozen(model), attending(model, attend):
        forward(model, ids, positions=np.arange(length))
        forward(model, ids, positions=np.arange(length) + offset)
    near, far = keys[0], keys[3]
    places = torch.full((1,), offset)
    torch.testing.assert_close(rotated(near, places, rotary, 0), far, rtol=1e-4, atol=1e-4)
    transform, mean = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), far[0].mean(0)
    found = Shift(rotary, offset).quantised(near[0], 0, transform, mean, 4)
    expected = unrotated(quantised(far[0], transform, mean, 4), places, rotary, 0)
    # On average: a number at the border of two codes may fall either way.
    assert (found - expected).abs().mean() < 1e-3 < (found - near[0]).abs().mean() / 10


def test_keys_that_rotate_in_another_way_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny()
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def doubled(*args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return forward(*args, position_embeddings=(2 * cos * cos - 1, -2 * sin * cos), **kwargs)

    attention.forward = doubled
    with pytest.raises(ModelError, match="layer 1 rotates its keys"):
        read_rotary(model, 64)
