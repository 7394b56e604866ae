"""The matrices of an artifact's quantiser as one layer of a model needs them."""

from __future__ import annotations

import torch

from kvcompile.artifacts import Quantiser
from kvcompile.kernels import LayerLayout, Transform
from kvcompile.kernels.codecs import codec_of, is_quantised


def layer_transform(
    quantiser: Quantiser | None, layer: int, order: list[int], layout: LayerLayout, device: torch.device
) -> Transform | None:
    """The transform of a layer whose heads are stored in `order`; None where no head's codec needs one."""
    pairs = [(c.k_bits, c.v_bits) for c in layout.classes for _ in range(c.count)]
    if quantiser is None or not any(_transformed(bits) for pair in pairs for bits in pair):
        return None
    parts = []
    for kind, side in (("key", 0), ("value", 1)):
        matrix = torch.tensor(getattr(quantiser, f"{kind}_transform")[layer].astype("float64"), device="cpu")[order]
        mean = torch.tensor(getattr(quantiser, f"{kind}_mean")[layer].astype("float32"), device="cpu")[order]
        for head, pair in enumerate(pairs):
            if not _transformed(pair[side]):
                matrix[head], mean[head] = torch.eye(matrix.shape[-1]), 0
        # The inverse in float64: single precision would add its own error to every query and output.
        # Contiguous, for the kernels: an inverse comes column by column.
        parts += [matrix.float(), torch.linalg.inv(matrix).float().contiguous(), mean]
    return Transform(*(part.to(device) for part in parts))


def _transformed(bits: int) -> bool:
    return is_quantised(bits) and codec_of(bits).needs_transform
