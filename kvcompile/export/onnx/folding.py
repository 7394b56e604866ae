"""Weights of one attention block in the order and the coordinates of the cache.

Values are stored transformed, y = T (x - m), and outputs restored, x = T^-1 y + m: both are linear, and so part of the
projections of values and outputs. Keys get their rotary embedding in between and are transformed in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcompile.artifacts import Artifact
from kvcompile.export.onnx.groups import Group
from kvcompile.export.onnx.parts import Layer, Linear
from kvcompile.kernels.codecs import codec_of, is_quantised


@dataclass(frozen=True)
class Block:
    """Projections with heads in storage order. `into` has the rows of queries, keys, values and scores; keys are
    transformed by `keys` [H, D, D] from the right, after which `shift` [H, 1, D] is subtracted, and queries by
    `queries`."""

    into: Linear
    output: Linear
    keys: Tensor
    shift: Tensor
    queries: Tensor


def quantises_keys(groups: list[Group]) -> bool:
    return any(is_quantised(group.keys.bits) for group in groups)


def has_bias(layer: Layer, groups: list[Group]) -> tuple[bool, bool]:
    """Whether the projections into and out of attention have one."""
    values = any(is_quantised(group.values.bits) for group in groups)
    scores = any(group.scores is not None for group in groups)
    given = any(part.bias is not None for part in (layer.query, layer.key, layer.value))
    return values or scores or given, values or layer.output.bias is not None


def folded(layer: Layer, artifact: Artifact, index: int, groups: list[Group]) -> Block:
    """The attention block of layer `index`, float32."""
    model, order = artifact.model, artifact.budgets.head_order[index].tolist()
    share = model.num_attention_heads // model.num_kv_heads
    heads = torch.tensor(order)
    query_heads = (heads[:, None] * share + torch.arange(share)).flatten()
    query, key, value = (
        _rows(part, chosen, model.head_dim)
        for part, chosen in ((layer.query, query_heads), (layer.key, heads), (layer.value, heads))
    )
    output = layer.output.weight.double().view(model.hidden_size, -1, model.head_dim)[:, query_heads]
    # By KV head and query head of it: [hidden_size, H, query heads of one, D].
    output = output.view(model.hidden_size, len(order), share, model.head_dim)

    transform, inverse, mean = _transforms(
        artifact, "value", index, order, [g.values.bits for g in groups for _ in range(g.count)]
    )
    weight, bias = value
    value = transform @ weight, (transform @ (bias - mean).unsqueeze(2)).squeeze(2)
    shift = torch.einsum("ohgd,hd->o", output, mean)
    output = torch.einsum("ohgd,hde->ohge", output, inverse).flatten(1)
    if layer.output.bias is not None:
        shift = shift + layer.output.bias.double()

    parts = [query, key, value]
    if (scorer := artifact.scorer) is not None:
        chosen = [order[g.start + i] for g in groups if g.scores is not None for i in range(g.count)]
        weight, bias = (torch.tensor(part[index][chosen]).double() for part in (scorer.weight, scorer.bias))
        parts.append((weight, bias))
    into = Linear(
        torch.cat([weight.reshape(-1, model.hidden_size) for weight, _ in parts]).float(),
        torch.cat([bias.flatten() for _, bias in parts]).float(),
    )
    transform, inverse, mean = _transforms(
        artifact, "key", index, order, [g.keys.bits for g in groups for _ in range(g.count)]
    )
    moved = (transform @ mean.unsqueeze(2)).mT
    return Block(into, Linear(output.float(), shift.float()), transform.mT.float(), moved.float(), inverse.float())


def _rows(part: Linear, heads: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Weight [heads, D, in] and bias [heads, D] of some heads, float64."""
    weight = part.weight.double().view(-1, head_dim, part.weight.shape[1])[heads]
    bias = torch.zeros(len(part.weight)).double() if part.bias is None else part.bias.double()
    return weight, bias.view(-1, head_dim)[heads]


def _transforms(
    artifact: Artifact, side: str, index: int, order: list[int], bits: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms and their inverses [H, D, D] and means [H, D] in storage order, float64; of exact heads those that
    change nothing. The rows of a transform are in the order of elements that the codec's graph has."""
    size = artifact.model.head_dim
    transform = np.tile(np.eye(size), (len(order), 1, 1))
    inverse, mean = transform.copy(), np.zeros((len(order), size))
    for position, head in enumerate(order):
        if not is_quantised(bits[position]):
            continue
        codec, matrix = codec_of(bits[position]), np.eye(size)
        if codec.needs_transform:
            assert artifact.quantiser is not None
            matrix = getattr(artifact.quantiser, f"{side}_transform")[index, head].astype(np.float64)
            mean[position] = getattr(artifact.quantiser, f"{side}_mean")[index, head]
        rows = codec.load("onnx").order(size)
        transform[position], inverse[position] = matrix[rows], np.linalg.inv(matrix)[:, rows]
    return torch.tensor(transform), torch.tensor(inverse), torch.tensor(mean)
