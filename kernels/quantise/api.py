"""Round vectors to 4 or 8 bits with one scale a group, and read them back: the checked entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.quantise import dense

GROUP = 64
"""Most elements that share a scale."""


def groups(head_dim: int) -> int:
    """Parts of equal size that a vector is cut into, each with its own scale."""
    return -(-head_dim // GROUP)


def encode(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D * bits / 8] and scales float16 [..., groups] of `vectors` [..., D] of any float type.

    A group's scale is s = max|x| / 2^(bits-1), rounded to float16 and at least its smallest normal number; an element's
    code is floor(x / s), clamped to what fits, and is stored with 2^(bits-1) added. Of two 4-bit codes the first is the
    low half of the byte.

    Raises:
        ValueError: bits other than 4 and 8, or a size that does not split into groups of pairs.
    """
    _check(vectors.shape[-1], bits)
    return dense.encode(vectors, bits, groups(vectors.shape[-1]))


def decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Vectors [..., D] of `dtype`: (code - 2^(bits-1) + 1/2) times the group's scale.

    Raises:
        ValueError: bits other than 4 and 8, or codes and scales that do not fit each other.
    """
    head_dim = codes.shape[-1] * 8 // bits if bits in (4, 8) else 0
    _check(head_dim, bits)
    if scales.shape != (*codes.shape[:-1], groups(head_dim)):
        raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not fit")
    return dense.decode(codes, scales, bits, dtype)


def _check(head_dim: int, bits: int) -> None:
    if bits not in (4, 8) or head_dim < 1 or head_dim % (2 * groups(head_dim)):
        raise ValueError(f"{head_dim} elements cannot be stored in {bits} bits")
