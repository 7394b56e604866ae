"""Reading vectors back in torch. A codec's `dense` may have a way of its own, without packing codes into bytes."""

from __future__ import annotations

import torch

from kvcompile.kernels.codecs import Codec


def read_back(vectors: torch.Tensor, codec: Codec) -> torch.Tensor:
    """See `read_back.api`."""
    dense = codec.load("dense")
    if hasattr(dense, "read_back"):
        vectors = dense.read_back(vectors)
    else:
        vectors = dense.decode(*dense.encode(vectors), torch.float32)
    return vectors
