"""Parameters that a configuration says are one, and a checkpoint has as two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kvcompile.models.checkpoint import Checkpoint

AT_ONCE = 1 << 24
"""Elements that are compared at once: an embedding takes gigabytes."""


def untie(model: Any, checkpoint: Checkpoint, stored: Callable[[str], str | None]) -> None:
    """Part the tied parameters of a model without numbers for which the checkpoint has tensors that differ in the
    model's dtype, as transformers does in a model that is held whole. `stored` gives the tensor that a parameter is, by
    its name, None where there is none."""
    for target, source in list(model.all_tied_weights_keys.items()):
        first, second = stored(source), stored(target)
        if first is None or second is None or _equal(checkpoint, first, second, model.dtype):
            continue
        place, _, name = target.rpartition(".")
        module = model.get_submodule(place)
        own = nn.Parameter(torch.empty_like(module._parameters[name]), requires_grad=False)
        module._parameters[name] = own
        del model.all_tied_weights_keys[target]


def _equal(checkpoint: Checkpoint, first: str, second: str, dtype: torch.dtype) -> bool:
    """Whether two tensors of a checkpoint are the same in `dtype`."""
    size = checkpoint.tensors[first].numel
    if checkpoint.tensors[first].shape != checkpoint.tensors[second].shape:
        return False
    for start in range(0, size, AT_ONCE):
        count = min(AT_ONCE, size - start)
        one, other = (checkpoint.elements(key, [start], count).to(dtype) for key in (first, second))
        if not torch.equal(one, other):
            return False
    return True
