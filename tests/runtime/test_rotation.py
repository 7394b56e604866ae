"""A model's rotary embedding, to turn queries of a prompt on with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from profiles import with_rotary

from kvcompile.artifacts import Artifact, ArtifactError
from kvcompile.runtime import attach
from kvcompile.runtime.rotation import Rotation, layer_rotation


def test_turning_is_what_the_model_does(any_model) -> None:
    """Of the same token, further on: its keys, by transformers, are those from before, turned."""
    plan = with_rotary(_plan(any_model), any_model)
    near, far = (_keys_at(any_model, offset) for offset in (0, 37))
    for layer, (before, after) in enumerate(zip(near, far, strict=True)):
        rotation = layer_rotation(plan, layer, torch.device("cpu"))
        turned = rotation.turned(before, torch.full((before.shape[1],), 37))
        torch.testing.assert_close(turned, after, atol=1e-3, rtol=1e-3)


def _plan(model) -> Artifact:
    import tiny_models

    return tiny_models.make_artifact(model, 14, policy="scored", recent=3)


def _keys_at(model, offset: int) -> list[torch.Tensor]:
    """Keys [H, 1, D] of one token at a position, by planned layer: nothing else is seen, so that only it matters."""
    from kvcompile.profile.attention import attended
    from kvcompile.profile.calls import Calls, embedded
    from kvcompile.profile.layerwise import through
    from kvcompile.profile.linear import switched_off
    from kvcompile.profile.structure import frozen, last_own, layers
    from kvcompile.runtime.parts import planned

    found: list[torch.Tensor] = []
    with torch.no_grad(), frozen(model), attended(model):
        token, calls = np.array([5]), Calls(model)
        hidden = first = embedded(model, token)
        for number, layer in enumerate(layers(model)[: last_own(model) + 1]):
            arguments = calls.of(number, np.array([offset]), token, first)

            def attend(call, layer=layer):
                if planned(layer):
                    found.append(call.key.float())
                return torch.zeros_like(call.query, dtype=call.value.dtype)

            with switched_off([layer]):
                hidden = through(layer, hidden, arguments, attend)
    return found


def test_arrays_that_do_not_fit_are_refused(llama, make_artifact) -> None:
    artifact = with_rotary(make_artifact(llama, 14, policy="scored", recent=3), llama)
    shifted = artifact.profile["rotary_partner"] + 1
    for name, array in (("rotary_frequency", np.zeros((1, 1), np.float32)), ("rotary_partner", shifted)):
        broken = dataclasses.replace(artifact, profile={**artifact.profile, name: array})
        with pytest.raises(ArtifactError, match=r"carries no usable profile\.rotary_frequency and rotary_partner"):
            attach(llama, broken)
    assert layer_rotation(make_artifact(llama, 14), 0, torch.device("cpu")) is None


def test_turns_add_up() -> None:
    frequency = np.array([0.5, 0.1, -0.5, -0.1, 0.0], np.float32)
    rotation = Rotation.of(frequency, np.array([2, 3, 0, 1, 4], np.int32), torch.device("cpu"))
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    once, more = torch.arange(6), torch.arange(6) * 3
    torch.testing.assert_close(rotation.turned(rotation.turned(x, once), more), rotation.turned(x, once + more))
    torch.testing.assert_close(rotation.turned(x, once).norm(dim=-1), x.norm(dim=-1))
