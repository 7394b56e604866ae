"""What a key or value reads as after it has been stored in 4 or 8 bits: FORMAT.md's quantisation, there and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcompile.artifacts import Quantiser, groups
from kvcompile.profile.rotation import rotated, unrotated
from kvcompile.stages import Rotary


def rounded(stored: Tensor, transform: Tensor, mean: Tensor, bits: int) -> Tensor:
    """`stored` [..., n, D] as read back, float32; `transform` [..., D, D], `mean` [..., D]. Token 0 is kept exact."""
    turned = (stored.float() - mean[..., None, :]) @ transform.mT
    parts = turned.reshape(*turned.shape[:-1], groups(turned.shape[-1]), -1)
    scale = (parts.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)).half().float()
    least = torch.finfo(torch.float16).tiny
    scale = scale.clamp_min(least)
    code = (parts / scale).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    decoded = ((code + 0.5) * scale).flatten(-2)
    decoded[..., 0, :] = turned[..., 0, :]
    inverse = torch.linalg.inv(transform.double()).float()
    back: Tensor = decoded @ inverse.mT + mean[..., None, :]
    return back


@dataclass(frozen=True)
class Shift:
    """Reads keys back as if the context began at position `offset` of a longer one: R(offset) turns all of them alike,
    which leaves their products with queries as they are, but not what quantising does to them."""

    rotary: Rotary
    offset: int

    def rounded(self, keys: Tensor, layer: int, transform: Tensor, mean: Tensor, bits: int) -> Tensor:
        """`keys` [..., n, D] of one layer as read back, float32."""
        there = torch.full((1,), self.offset, device=keys.device)
        back = rounded(rotated(keys, there, self.rotary, layer), transform, mean, bits)
        return unrotated(back, there, self.rotary, layer)


def matrices(quantiser: Quantiser, layer: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Transform [H, D, D] and mean [H, D] of one layer's keys or values (`kind`), float32."""
    tables = (getattr(quantiser, f"{kind}_{part}")[layer].astype(np.float32) for part in ("transform", "mean"))
    transform, mean = (torch.from_numpy(table).to(device) for table in tables)
    return transform, mean
