"""A sequence through a model's layers one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvcompile.profile.attention import attended, causal
from kvcompile.profile.calls import Calls, embedded
from kvcompile.profile.layerwise import OnTheWay
from kvcompile.profile.structure import layers


@torch.no_grad()
def walked(model: Any, ids: np.ndarray) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """The residual streams [1, n, d] of tokens [n], before every layer and after the last, and what layers are called
    with."""
    run = OnTheWay(Calls(model), ids, np.arange(len(ids)), embedded(model, ids))
    states = [run.embedded]
    with attended(model):
        for number in range(len(layers(model))):
            states.append(run.through(number, states[-1], causal))
    return states, [run.arguments(number) for number in range(len(layers(model)))]
