"""A sequence through a model's layers one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvcompile.profile.attention import attended, causal
from kvcompile.profile.layerwise import Calls, embedded, through
from kvcompile.profile.structure import layers, lends, source_layer


@torch.no_grad()
def walked(model: Any, ids: np.ndarray) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """The residual streams [1, n, d] of tokens [n], before every layer and after the last, and what layers are called
    with."""
    calls, states, lent = Calls(model), [embedded(model, ids)], dict[int, Any]()

    def given(number: int) -> dict[str, Any]:
        source = source_layer(model, number)
        known = lent[source] if source != number else None
        return calls.of(number, np.arange(len(ids)), ids, states[0], known)

    with attended(model):
        for number, layer in enumerate(layers(model)):
            own = given(number)
            states.append(through(layer, states[-1], own, causal))
            if lends(model, number):
                lent[number] = calls.lent(number, own)
    return states, [given(number) for number in range(len(layers(model)))]
