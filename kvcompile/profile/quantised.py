"""What a key or value reads as after it has been stored in a codec: transformed, encoded, and all of that undone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcompile.artifacts import Quantiser
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.codecs.api import read_back
from kvcompile.profile.rotation import rotated, unrotated
from kvcompile.quantiser import sectioned
from kvcompile.stages import Rotary


def quantised(stored: Tensor, transform: Tensor, mean: Tensor, bits: int) -> Tensor:
    """`stored` [..., n, D] as read back, float32; `transform` [..., D, D], balanced, and `mean` [..., D]. Token 0 is
    kept exact where the codec has anchors. A codec that does not fit the size leaves all as it is, and no plan uses it.
    """
    codec = codec_of(bits)
    if not codec.fits(stored.shape[-1]):
        return stored.float()
    if not codec.needs_transform:
        transform, mean = torch.eye(stored.shape[-1], device=stored.device), torch.zeros_like(mean)
    elif (mixing := sectioned(bits, stored.shape[-1])) is not None:
        transform = torch.from_numpy(mixing.astype(np.float32)).to(stored.device) @ transform
    transformed = (stored.float() - mean[..., None, :]) @ transform.mT
    decoded = read_back(transformed, bits)
    if codec.needs_anchor:
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
