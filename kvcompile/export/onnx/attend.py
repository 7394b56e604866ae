"""Attention of one token over quantised keys and values, without restoring them.

Codes are multiplied as the numbers that they are; what makes vectors of them is applied to the query and to the few
sums that come out. That leaves one pass over the store where decoding it would take four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvcompile.export.onnx.builder import Builder
from kvcompile.export.onnx.groups import Buffer, Group, Side
from kvcompile.export.onnx.slots import Clock
from kvcompile.kernels.codecs.base import Group as CodecGroup


@dataclass(frozen=True)
class NewTokens:
    """What a call brings to one group: `query` [B, heads, T, D], `keys` and `values` [B, count, T, D], all transformed
    and none quantised; `rows`, by buffer, what is to be stored of them, [B, count, T, X]."""

    query: str
    keys: str
    values: str
    rows: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """What all groups of a layer share: `window` is that of a sliding layer in tokens, or 0; `steps` int64 [T] numbers
    the places of the call, and `causal` bool [T, T] says which see each other."""

    clock: Clock
    head_dim: int
    scale: float
    window: int
    steps: str
    causal: str


def attend_quantised(b: Builder, group: Group, query: str, written: Mapping[str, str], filled: str, case: Case) -> str:
    """Attention [B, heads, 1, D] of `query` [B, heads, 1, D] over the `filled` slots of a group with quantised keys,
    values or both."""
    batch, size = case.clock.batch, case.head_dim
    columns = b.op("Transpose", b.reshape(query, batch, group.count, -1, size), perm=[0, 1, 3, 2])
    columns = b.op("Mul", columns, b.scalar(case.scale))  # [B, count, D, heads of one]
    logits = _logits(b, group.keys, columns, written, case)
    valid = b.op("Less", b.array(np.arange(group.capacity)), b.reshape(filled, batch, 1, 1, 1))
    penalty = b.op("Where", valid, b.scalar(0.0), b.scalar(-np.inf))
    weights = b.op("Softmax", b.op("Add", logits, penalty), axis=-1)
    return b.reshape(_mixed(b, group.values, weights, written, case), batch, -1, 1, size)


def _logits(b: Builder, side: Side, columns: str, written: Mapping[str, str], case: Case) -> str:
    """Products [B, count, heads of one, capacity] of queries with stored keys. Rows of them are worked on, as numbers
    that lie in a row are many at a time."""
    rows = written[side.rows.name]
    batch, heads, capacity, _ = side.rows.shape
    if side.scales is None:
        rows = rows if side.rows.dtype == "float32" else b.cast(rows, "float32")
        return b.op("Transpose", b.op("MatMul", rows, columns), perm=[0, 1, 3, 2])
    codec, onnx = side.codec, side.codec.load("onnx")
    groups = codec.split(case.head_dim)
    codes, scales = _by_group(b, groups, rows, written[side.scales.name])
    sizes = [group.size for group in groups]
    rest = case.head_dim - sum(sizes)  # elements that are not stored
    asked = b.split(columns, [*sizes, rest] if rest else sizes, 2)[: len(groups)]
    logits = ""
    for group, code, scale, part in zip(groups, codes, scales, asked, strict=True):
        matrix = onnx.restoring(group)
        met, added = b.split(b.op("MatMul", b.array(matrix), part), [len(matrix) - 1, 1], 2)
        product = b.op("Transpose", b.op("MatMul", onnx.plain(b, code, group), met), perm=[0, 1, 3, 2])
        product = b.op("Add", product, b.op("Transpose", added, perm=[0, 1, 3, 2]))
        product = b.op("Mul", product, b.reshape(scale, batch, heads, 1, capacity))
        logits = b.op("Add", logits, product) if logits else product
    if side.anchor is None:
        return logits
    first = b.op("Transpose", b.op("MatMul", exact(b, side.anchor), columns), perm=[0, 1, 3, 2])
    return b.concat([first, b.cut(logits, 1, capacity, 3)], 3)


def _mixed(b: Builder, side: Side, weights: str, written: Mapping[str, str], case: Case) -> str:
    """Stored values weighted with `weights` [B, count, heads of one, capacity]: [B, count, heads of one, D]."""
    rows = written[side.rows.name]
    if side.scales is None:
        return b.op("MatMul", weights, rows if side.rows.dtype == "float32" else b.cast(rows, "float32"))
    batch, heads, capacity, _ = side.rows.shape
    codec, onnx = side.codec, side.codec.load("onnx")
    groups = codec.split(case.head_dim)
    codes, scales = _by_group(b, groups, rows, written[side.scales.name])
    outputs = []
    for group, code, scale in zip(groups, codes, scales, strict=True):
        scale = b.reshape(scale, batch, heads, 1, capacity)
        if side.anchor is not None:  # which takes the place of the first slot
            scale = b.op("Mul", scale, b.array((np.arange(capacity) > 0).astype(np.float32)))
        scaled = b.op("Mul", weights, scale)
        total = b.op("ReduceSum", scaled, b.ints(-1), keepdims=1)
        sums = b.op("MatMul", scaled, onnx.plain(b, code, group))
        outputs.append(b.op("MatMul", b.concat([sums, total], 3), b.array(onnx.restoring(group))))
    output = b.padded(b.concat(outputs, 3), case.head_dim - sum(group.size for group in groups))
    if side.anchor is None:
        return output
    return b.op("Add", output, b.op("MatMul", b.cut(weights, 0, 1, 3), exact(b, side.anchor)))


def _by_group(b: Builder, groups: Sequence[CodecGroup], codes: str, scales: str) -> tuple[list[str], list[str]]:
    """Codes and scales, float32, of each group."""
    parts = b.split(codes, [group.size * group.bits // 8 for group in groups], 3)
    return parts, b.split(b.cast(scales, "float32"), [1] * len(groups), 3)


def exact(b: Builder, anchor: Buffer) -> str:
    """Anchors as float32, after this call's tokens."""
    return b.cast(anchor.present, "float32") if anchor.dtype != "float32" else anchor.present
