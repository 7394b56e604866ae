"""The transform in which rounding a head's keys, or values, costs least.

Let y = T x be rounded with steps proportional to the size of y, after a rotation that spreads that size evenly over the
coordinates. With C the covariance of what is stored and S that of what it is multiplied with (queries for keys), the
error is proportional to tr(T C T') tr(T^-T S T^-1), whose least value (Cauchy and Schwarz) is reached by
T'T = C^-1 # S, the geometric mean of the two matrices; a Hadamard matrix does the spreading.

What matters in C and S is where attention goes: the error of logit (t, j) moves the output by p (v_j - o_t), so keys
and queries are weighted with p^2 ||W_O (v_j - o_t)||^2, values and outputs with p^2. Half of C is the plain covariance
all the same, so that what calibration never attended to is not ruined.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Quantiser
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, Packed, judged_rows

ROWS = 128
"""Judged rows of a follow-up that are looked at."""

FLOOR = 1e-3
"""Least eigenvalue, as a share of the largest, before roots are taken."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of one layer, float64: for keys and values x with weights w, `*_weight` [H] sums w, `*_first`
    [H, D] w x, `*_second` [H, D, D] w x x'; the `plain_*` ones have w = 1 and count in `tokens` []; `query` [H, D, D]
    is the weighted second moment of queries, `output` [H, D, D] that of the output's effect on the residual stream."""

    tokens: NDArray[np.float64]
    plain_key_first: NDArray[np.float64]
    plain_key_second: NDArray[np.float64]
    plain_value_first: NDArray[np.float64]
    plain_value_second: NDArray[np.float64]
    key_weight: NDArray[np.float64]
    key_first: NDArray[np.float64]
    key_second: NDArray[np.float64]
    value_weight: NDArray[np.float64]
    value_first: NDArray[np.float64]
    value_second: NDArray[np.float64]
    query: NDArray[np.float64]
    output: NDArray[np.float64]


MOMENTS = tuple(f.name for f in fields(Moments))


def moments(call: Attention, context: Context, packed: Packed, projection: Tensor) -> Moments:
    """Moments of one context in one layer; `projection` [d, Hq * D] is W_O. Token 0 is left out: it is stored as it
    is."""
    keys, values = context.keys[call.layer].float(), context.values[call.layer].float()
    num_kv_heads, length, head_dim = keys.shape
    outward = projection.float().view(len(projection), num_kv_heads, -1, head_dim)
    metric = torch.einsum("dhgi,dhgj->hgij", outward, outward)
    moved = torch.einsum("hgij,hnj->hgni", metric, values)
    energy = (moved * values[:, None]).sum(-1)  # ||W_O v||^2, [H, G, n]

    key_weight = keys.new_zeros(num_kv_heads, length)
    value_weight = torch.zeros_like(key_weight)
    query = keys.new_zeros(num_kv_heads, head_dim, head_dim)
    output = torch.zeros_like(query)
    for rows in judged_rows(call, context, packed, ROWS):
        p = rows.probability[..., :length]
        mixed = p.flatten(1, 2) @ values
        mixed = mixed.view(*p.shape[:3], head_dim)
        # The squared distance of every value's effect from that of the head's output.
        apart = torch.einsum("hgti,hgij,hgtj->hgt", mixed, metric, mixed)[..., None] + energy[:, :, None]
        apart.flatten(0, 1).baddbmm_(mixed.flatten(0, 1), moved.mT.flatten(0, 1), alpha=-2)
        squared = p.square()
        weight = apart.clamp_min_(0).mul_(squared)
        weight[..., 0], squared[..., 0] = 0, 0
        count = p.shape[2]
        key_weight += weight.sum((1, 2)) / count
        value_weight += squared.sum((1, 2)) / count
        query += torch.einsum("hgt,hgti,hgtj->hij", weight.sum(-1) / count, rows.query, rows.query)
        output += torch.einsum("hg,hgij->hij", squared.sum((2, 3)) / count, metric)
    plain = keys.new_ones(num_kv_heads, length)
    plain[:, 0] = 0

    def sums(weight: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weighted = stored * weight[..., None]
        return weight.sum(1), weighted.sum(1), weighted.mT @ stored

    tokens, plain_key_first, plain_key_second = sums(plain, keys)
    _, plain_value_first, plain_value_second = sums(plain, values)
    arrays = (
        tokens[0], plain_key_first, plain_key_second, plain_value_first, plain_value_second,
        *sums(key_weight, keys), *sums(value_weight, values), query, output,
    )  # fmt: skip
    return Moments(*(array.double().cpu().numpy() for array in arrays))


def quantiser(layers: list[Moments]) -> Quantiser:
    """The transforms and means of all heads."""
    tables: dict[str, list[NDArray[np.float64]]] = {name: [] for name in vars(Quantiser)["__dataclass_fields__"]}
    for m in layers:
        for kind, against in (("key", m.query), ("value", m.output)):
            weight, first, second = (getattr(m, f"{kind}_{part}") for part in ("weight", "first", "second"))
            plain_first, plain_second = getattr(m, f"plain_{kind}_first"), getattr(m, f"plain_{kind}_second")
            mean = first / np.maximum(weight, 1e-30)[:, None]
            mean = np.where(weight[:, None] > 0, mean, plain_first / m.tokens)
            about = _about(second, first, weight, mean) + _about(
                plain_second, plain_first, np.full(len(weight), float(m.tokens)), mean
            )
            matrices = [balanced(c, s) for c, s in zip(about, against, strict=True)]
            tables[f"{kind}_transform"].append(np.stack(matrices))
            tables[f"{kind}_mean"].append(mean)
    return Quantiser(**{name: np.stack(parts).astype(np.float16) for name, parts in tables.items()})


def balanced(stored: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """T [D, D] with T'T proportional to `stored`^-1 # `against`, rotated to spread evenly; its largest singular value
    is 1."""
    size = len(stored)
    if not (np.trace(stored) > 0 and np.trace(against) > 0):
        return spread(size)
    root, inverse = _power(stored, 0.5), _power(stored, -0.5)
    middle = _power(root @ against @ root, 0.5)
    transform: NDArray[np.float64] = spread(size) @ _power(inverse @ middle @ inverse, 0.5)
    return transform / np.linalg.norm(transform, 2)


def spread(size: int) -> NDArray[np.float64]:
    """An orthogonal matrix whose entries are as equal as can be: Hadamard where `size` is a power of two, else blocks
    of its largest power of two, mixed by a cosine transform."""
    power = size & -size
    hadamard = scipy.linalg.hadamard(power) / np.sqrt(power)
    cosine = scipy.fft.dct(np.eye(size // power), axis=0, norm="ortho")
    return np.kron(cosine, hadamard)


def _about(
    second: NDArray[np.float64], first: NDArray[np.float64], weight: NDArray[np.float64], mean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Second moments [H, D, D] about `mean`, scaled to trace 1."""
    cross = first[:, :, None] * mean[:, None]
    about = second - cross - cross.swapaxes(1, 2) + weight[:, None, None] * mean[:, :, None] * mean[:, None]
    trace = np.trace(about, axis1=1, axis2=2)
    scaled: NDArray[np.float64] = about / np.maximum(trace, 1e-30)[:, None, None]
    return scaled


def _power(matrix: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = np.maximum(values, FLOOR * values[-1])
    power: NDArray[np.float64] = (vectors * values**exponent) @ vectors.T
    return power
