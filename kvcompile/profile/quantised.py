"""What a key or value reads as after it has been stored in a codec: transformed, encoded, and all of that undone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcompile.artifacts import Quantiser
from kvcompile.kernels import read_back
from kvcompile.kernels.codecs import codec_of, profiled
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


class Errors:
    """What every codec that is measured does to keys, or to values (`kind`), under a quantiser of one layer."""

    def __init__(self, quantiser: Quantiser, kind: str, device: torch.device) -> None:
        transform, mean = matrices(quantiser, 0, kind, device)
        size, self._mean = transform.shape[-1], mean[..., None, :]
        mixings = {bits: sectioned(bits, size) for bits in profiled(kind[0])}
        self._mixings = {
            bits: torch.eye(size, device=device) if one is None else torch.from_numpy(one.astype(np.float32)).to(device)
            for bits, one in mixings.items()
        }
        self._transform = transform
        # As the runtime does, which inverts in float64.
        self._inverse = {
            bits: torch.linalg.inv((one @ transform).double()).float() for bits, one in self._mixings.items()
        }

    def of(self, stored: Tensor) -> tuple[Tensor, ...]:
        """By codec, what is read back less what was stored, float32 [H, n, D]; see `quantised`."""
        transformed = (stored.float() - self._mean) @ self._transform.mT
        return tuple(self._of(stored, transformed, bits) for bits in self._mixings)

    def _of(self, stored: Tensor, transformed: Tensor, bits: int) -> Tensor:
        codec = codec_of(bits)
        if not codec.fits(stored.shape[-1]):
            return torch.zeros_like(transformed)
        if codec.needs_transform:
            own = transformed if not codec.sections else transformed @ self._mixings[bits].mT
        else:
            own = stored.float()
        error = read_back(own, bits) - own
        if codec.needs_anchor:
            error[..., 0, :] = 0
        return error @ self._inverse[bits].mT if codec.needs_transform else error


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
