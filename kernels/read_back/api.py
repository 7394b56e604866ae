"""What vectors read as once a codec has stored them: the checked entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels import native
from kvcompile.kernels.codecs.api import checked
from kvcompile.kernels.read_back import dense


def read_back(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """What `vectors` [..., D] of any float type read as once the codec whose id is `bits` has stored them: float32.

    Raises:
        ValueError: bits of no codec, or a size that does not split into the codec's groups.
    """
    codec = checked(vectors.shape[-1], bits)
    if native.back.takes(vectors, codec):
        return native.back.read_back(vectors, codec)
    return dense.read_back(vectors, codec)
