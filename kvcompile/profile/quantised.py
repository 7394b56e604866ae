"""What a key or value reads as after it has been stored in 4 or 8 bits: FORMAT.md's quantisation and its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcompile.artifacts import Quantiser, groups
from kvcompile.profile.rotation import rotated, unrotated
from kvcompile.stages import Rotary


def quantised(stored: Tensor, transform: Tensor, mean: Tensor, bits: int) -> Tensor:
    """`stored` [..., n, D] as read back, float32; `transform` [..., D, D], `mean` [..., D]. Token 0 is kept exact."""
    transformed = (stored.float() - mean[..., None, :]) @ transform.mT
    parts = transformed.reshape(*transformed.shape[:-1], groups(transformed.shape[-1]), -1)
    # The largest element of a group is mapped to the end of the codes' range; scales are stored in half precision.
    scale = (parts.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)).half().float()
    least = torch.finfo(torch.float16).tiny
    scale = scale.clamp_min(least)
    # Code c stands for [c, c + 1) and is read back as the middle: errors are half a step at most.
    code = (parts / scale).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    decoded = ((code + 0.5) * scale).flatten(-2)
    decoded[..., 0, :] = transformed[..., 0, :]
    # As the runtime does, which inverts in float64.
    inverse = torch.linalg.inv(transform.double()).float()
    back: Tensor = decoded @ inverse.mT + mean[..., None, :]
    return back


@dataclass(frozen=True)
class Shift:
    """Reads keys back as if the context began at position `offset` of a longer one: R(offset) rotates all of them
    alike, which leaves their products with queries as they are, but not what quantising does to them."""

    rotary: Rotary
    offset: int

    def quantised(self, keys: Tensor, layer: int, transform: Tensor, mean: Tensor, bits: int) -> Tensor:
        """`keys` [..., n, D] of one layer as read back, float32."""
        offset = torch.full((1,), self.offset, device=keys.device)
        back = quantised(rotated(keys, offset, self.rotary, layer), transform, mean, bits)
        return unrotated(back, offset, self.rotary, layer)


def matrices(quantiser: Quantiser, layer: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Transform [H, D, D] and mean [H, D] of one layer's keys or values (`kind`), float32."""
    tables = (getattr(quantiser, f"{kind}_{part}")[layer].astype(np.float32) for part in ("transform", "mean"))
    transform, mean = (torch.from_numpy(table).to(device) for table in tables)
    return transform, mean
