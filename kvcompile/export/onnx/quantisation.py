"""Quantising new tokens with standard operators: how is the business of each codec's module `onnx`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcompile.export.onnx.builder import Builder
from kvcompile.kernels.codecs import Codec

Encode = Callable[[Builder, Sequence[str], Sequence[int], Sequence[Codec], int], list[tuple[str, str]]]


def encode(
    b: Builder, parts: Sequence[str], sizes: Sequence[int], codecs: Sequence[Codec], head_dim: int
) -> list[tuple[str, str]]:
    """Codes and scales of transformed vectors, `parts` [B, `sizes`[i], T, D] in `codecs`[i]; those whose codecs share
    an encoder in one go."""
    by_encoder: dict[Encode, list[int]] = {}
    for i, codec in enumerate(codecs):
        by_encoder.setdefault(codec.load("onnx").encode, []).append(i)
    made: dict[int, tuple[str, str]] = {}
    for encoder, chosen in by_encoder.items():
        found = encoder(
            b, [parts[i] for i in chosen], [sizes[i] for i in chosen], [codecs[i] for i in chosen], head_dim
        )
        made |= dict(zip(chosen, found, strict=True))
    return [made[i] for i in range(len(parts))]
