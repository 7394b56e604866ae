"""The parts of a decoder layer that have nothing to do with the cache; streams are [B * T, hidden_size]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvcompile.export.onnx.builder import Builder, value
from kvcompile.export.onnx.parts import Experts, Linear, Mlp, Norm


def normed(b: Builder, x: str, norm: Norm, name: str) -> str:
    return b.op("RMSNormalization", x, b.weight(name, lambda: norm.weight), epsilon=norm.epsilon, axis=-1)


def linear(b: Builder, x: str, name: str, parts: Sequence[Linear]) -> str:
    """One product with several projections, their outputs side by side."""
    return product(b, x, name, lambda: torch.cat([part.weight.float() for part in parts]), joined_bias(parts))


def joined_bias(parts: Sequence[Linear]) -> Callable[[], torch.Tensor] | None:
    if all(part.bias is None for part in parts):
        return None
    return lambda: torch.cat(
        [torch.zeros(len(part.weight)) if part.bias is None else part.bias.float() for part in parts]
    )


def product(
    b: Builder, x: str, name: str, weight: Callable[[], torch.Tensor], bias: Callable[[], torch.Tensor] | None
) -> str:
    """`x` [n, in] times the transpose of a weight [out, in], which stays as checkpoints have it."""
    terms = [x, b.weight(f"{name}.weight", weight)]
    if bias is not None:
        terms.append(b.weight(f"{name}.bias", bias))
    return b.op("Gemm", *terms, transB=1)


def activated(b: Builder, x: str, kind: str) -> str:
    if kind == "silu":
        return b.op("Swish", x)
    return b.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")


def mlp(b: Builder, x: str, parts: Mlp | Experts, activation: str, name: str) -> str:
    if isinstance(parts, Experts):
        return _mixture(b, x, parts, activation, name)
    both = linear(b, x, f"{name}.gate_up", parts.gate_up)
    gate, up = b.several("Split", 2, both, axis=1, num_outputs=2)
    return linear(b, b.op("Mul", activated(b, gate, activation), up), f"{name}.down", [parts.down])


def _mixture(b: Builder, x: str, parts: Experts, activation: str, name: str) -> str:
    """Each expert computes all tokens of the call if any of them chose it, and nothing otherwise."""
    probabilities = b.op("Softmax", product(b, x, f"{name}.router", lambda: parts.router, None), axis=-1)
    shares, chosen = b.several("TopK", 2, probabilities, b.ints(parts.chosen), axis=-1)
    if parts.normalised:
        shares = b.op("Div", shares, b.op("ReduceSum", shares, b.ints(-1), keepdims=1))
    nothing = b.op("Mul", probabilities, b.scalar(0.0))
    table = b.op("ScatterElements", nothing, chosen, shares, axis=1)
    used = b.op("Greater", b.op("ReduceMax", table, b.ints(0), keepdims=0), b.scalar(0.0))
    columns = b.several("Split", len(parts.experts), table, axis=1, num_outputs=len(parts.experts))
    uses = b.several("Split", len(parts.experts), used, axis=0, num_outputs=len(parts.experts))
    total = b.op("Mul", x, b.scalar(0.0))
    for i, expert in enumerate(parts.experts):
        total = _expert(b, x, expert, columns[i], b.op("Squeeze", uses[i]), total, activation, f"{name}.experts.{i}")
    return total


def _expert(b: Builder, x: str, part: Mlp, share: str, used: str, total: str, activation: str, name: str) -> str:
    output, skipped = b.name("expert"), b.branch()
    working = b.branch()
    added = working.op("Mul", mlp(working, x, part, activation, name), share)
    one, other = working.op("Add", total, added), skipped.op("Identity", total)
    shape = ("rows", "hidden")
    b.choose(
        used,
        working.graph(f"{name}.used", [value(one, "float32", shape)]),
        skipped.graph(f"{name}.skipped", [value(other, "float32", shape)]),
        [output],
    )
    return output


def rotations(b: Builder, positions: str, frequencies: np.ndarray, factor: float) -> tuple[str, str]:
    """Cosines and sines float32 [B, T, rotated / 2] of positions int64 [B, T]."""
    place = b.op("Unsqueeze", b.cast(positions, "float32"), b.ints(-1))
    angles = b.op("Mul", place, b.array(frequencies.astype(np.float32)))
    waves = b.op("Cos", angles), b.op("Sin", angles)
    cosines, sines = (wave if factor == 1 else b.op("Mul", wave, b.scalar(factor)) for wave in waves)
    return cosines, sines
