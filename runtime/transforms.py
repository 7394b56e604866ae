"""The matrices of an artifact's quantiser as one layer of a model needs them."""

from __future__ import annotations

import torch

from kvcompile.artifacts import Quantiser
from kvcompile.kernels import LayerLayout, Turn
from kvcompile.kernels.layout import QUANTISED


def layer_turn(
    quantiser: Quantiser | None, layer: int, order: list[int], layout: LayerLayout, device: torch.device
) -> Turn | None:
    """The turn of a layer whose heads are stored in `order`; None where none is rounded."""
    widths = [(c.k_bits, c.v_bits) for c in layout.classes for _ in range(c.count)]
    if quantiser is None or not any(bits in QUANTISED for pair in widths for bits in pair):
        return None
    parts = []
    for kind, side in (("key", 0), ("value", 1)):
        turn = torch.tensor(getattr(quantiser, f"{kind}_transform")[layer].astype("float64"))[order]
        mean = torch.tensor(getattr(quantiser, f"{kind}_mean")[layer].astype("float32"))[order]
        for head, width in enumerate(widths):
            if width[side] not in QUANTISED:
                turn[head], mean[head] = torch.eye(turn.shape[-1]), 0
        parts += [turn.float(), torch.linalg.inv(turn).float(), mean]
    return Turn(*(part.to(device) for part in parts))
