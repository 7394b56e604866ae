"""An attention block around the cache: projections, rotary embedding, what each group of heads gets, two branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvcompile.artifacts import Artifact
from kvcompile.export.onnx import blocks
from kvcompile.export.onnx.attend import Case, NewTokens
from kvcompile.export.onnx.builder import DTYPES, Builder, value
from kvcompile.export.onnx.cache import one_token, several_tokens
from kvcompile.export.onnx.folding import Block, folded, has_bias, quantises_keys
from kvcompile.export.onnx.groups import Group
from kvcompile.export.onnx.parts import Layer
from kvcompile.export.onnx.quantisation import encode
from kvcompile.export.onnx.slots import Clock, Next


@dataclass(frozen=True)
class Call:
    """What all layers of a call share: `single` bool, whether every sequence has one token; `steps` int64 [T], the
    numbers of places; `causal` bool [T, T]; and where a single token goes, by capacity and ring."""

    clock: Clock
    single: str
    steps: str
    causal: str
    places: dict[tuple[int, int], Next]


@dataclass
class Attention:
    """Writes the blocks of all layers."""

    b: Builder
    artifact: Artifact
    call: Call
    _block: tuple[int, Block] | None = field(default=None, init=False)

    def __call__(self, layer: Layer, index: int, groups: list[Group], waves: tuple[str, str], x: str) -> str:
        """The block's output [B * T, hidden_size] for normed input."""
        b, model, batch, name = self.b, self.artifact.model, self.artifact.target.batch, f"layers.{index}.attention"
        heads, kv_heads, size = model.num_attention_heads, model.num_kv_heads, model.head_dim
        weights = self._weights(layer, index, groups)
        with_bias = dict(zip(("into", "output"), has_bias(layer, groups), strict=True))

        def product(x: str, part: str) -> str:
            bias = weights(f"{part}.bias") if with_bias[part] else None
            return blocks.product(b, x, f"{name}.{part}", weights(f"{part}.weight"), bias)

        x, scores = product(x, "into"), ""
        if scored := sum(group.count for group in groups if group.scores is not None):
            x, scores = b.split(x, [(heads + 2 * kv_heads) * size, scored], 1)
            scores = b.op("Transpose", b.reshape(b.cast(scores, "float16"), batch, -1, scored), perm=[0, 2, 1])
        x = b.op("Transpose", b.reshape(x, batch, -1, heads + 2 * kv_heads, size), perm=[0, 2, 1, 3])
        query, key, values = self._rotated(layer, x, waves, f"{name}.")
        if quantises_keys(groups):
            transform, shift, inverse = (
                b.weight(f"{name}.{part}", weights(part)) for part in ("keys", "shift", "queries")
            )
            key = b.op("Sub", b.op("MatMul", key, transform), shift)
            grouped = b.reshape(query, batch, kv_heads, -1, size)
            query = b.reshape(b.op("MatMul", grouped, inverse), batch, heads, -1, size)
        new_tokens = _new_tokens(b, groups, query, key, values, scores, heads // kv_heads, size)
        for group, new in zip(groups, new_tokens, strict=True):
            _anchors(b, group, new, self.call.clock)
        window = model.windows[index] if model.windows[index] < self.artifact.target.context else 0
        case = Case(self.call.clock, size, layer.scale, window, self.call.steps, _causal(b, self.call, window))
        x = self._branches(groups, new_tokens, case, index)
        x = b.reshape(b.op("Transpose", x, perm=[0, 2, 1, 3]), -1, heads * size)
        return product(x, "output")

    def _weights(self, layer: Layer, index: int, groups: list[Group]) -> Callable[[str], Callable[[], Tensor]]:
        """Makers of the block's weights by name; they are written one after another, and one block is kept for that."""

        def make(path: str) -> Tensor:
            if self._block is None or self._block[0] != index:
                self._block = index, folded(layer, self.artifact, index, groups)
            found: Any = self._block[1]
            for part in path.split("."):
                found = getattr(found, part)
            tensor: Tensor = found
            return tensor

        return lambda path: lambda: make(path)

    def _rotated(self, layer: Layer, x: str, waves: tuple[str, str], name: str) -> list[str]:
        """Queries, keys and values [B, heads, T, D] from all of them side by side."""
        b, model = self.b, self.artifact.model
        heads, kv_heads = model.num_attention_heads, model.num_kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key, values = b.split(x, [heads, kv_heads, kv_heads], 1)
            query = blocks.normed(b, query, layer.query_norm, f"{name}query_norm.weight")
            x = b.concat([query, blocks.normed(b, key, layer.key_norm, f"{name}key_norm.weight")], 1)
        else:
            x, values = b.split(x, [heads + kv_heads, kv_heads], 1)
        rotated = layer.rotary.frequencies.numel() * 2
        part = {} if rotated == model.head_dim else {"rotary_embedding_dim": rotated}
        return [*b.split(b.op("RotaryEmbedding", x, *waves, **part), [heads, kv_heads], 1), values]

    def _branches(self, groups: list[Group], new_tokens: list[NewTokens], case: Case, index: int) -> str:
        """One way for a single token and one for several: attention [B, num_heads, T, D]; buffers go to their
        outputs."""
        buffers = [buffer for group in groups for buffer in group.slotted()]
        graphs = []
        for single in (True, False):
            branch, parts = self.b.branch(), []
            written: dict[str, str] = {}
            for group, new in zip(groups, new_tokens, strict=True):
                place = self.call.places[group.capacity, group.recent]
                part, made = (
                    one_token(branch, group, new, case, place) if single else several_tokens(branch, group, new, case)
                )
                parts.append(part)
                written |= made
            shape = (case.clock.batch, "heads", "T", case.head_dim)
            outputs = [value(branch.concat(parts, 1), "float32", shape)]
            outputs += [value(written[buffer.name], buffer.dtype, buffer.shape) for buffer in buffers]
            graphs.append(branch.graph(f"layers.{index}.{'one' if single else 'several'}", outputs))
        attended = self.b.name("attended")
        self.b.choose(self.call.single, graphs[0], graphs[1], [attended, *(buffer.present for buffer in buffers)])
        return attended


def _causal(b: Builder, call: Call, window: int) -> str:
    """Which new tokens see each other: bool [T, T]."""
    if not window:
        return call.causal
    distance = b.op("Sub", b.op("Unsqueeze", call.steps, b.ints(1)), call.steps)
    return b.op("And", call.causal, b.op("Less", distance, b.scalar(window, "int64")))


def _new_tokens(
    b: Builder, groups: list[Group], query: str, key: str, values: str, scores: str, share: int, size: int
) -> list[NewTokens]:
    """What each group gets of all heads' queries, keys and values [B, heads, T, D] and scores [B, scored heads, T]."""
    counts = [group.count for group in groups]
    queries = b.split(query, [count * share for count in counts], 1)
    keys, others = b.split(key, counts, 1), b.split(values, counts, 1)
    scored = [group for group in groups if group.scores is not None]
    marks = b.split(scores, [group.count for group in scored], 1) if scored else []
    rows = {group.scores.name: mark for group, mark in zip(scored, marks, strict=True) if group.scores is not None}
    sides = [
        (group.count, side, x)
        for group, *pair in zip(groups, keys, others, strict=True)
        for side, x in zip(group.sides(), pair, strict=True)
    ]
    exact = [(side.rows, x) for _, side, x in sides if side.scales is None]
    rows |= {rows.name: x if rows.dtype == "float32" else b.cast(x, rows.dtype) for rows, x in exact}
    quantised = [(count, side, x) for count, side, x in sides if side.scales is not None]
    if quantised:
        sizes, stored, vectors = zip(*quantised, strict=True)
        made = encode(b, vectors, sizes, [side.codec for side in stored], size)
        for side, (codes, scales) in zip(stored, made, strict=True):
            rows |= {side.rows.name: codes, side.scales.name: scales}
    return [NewTokens(*parts, rows) for parts in zip(queries, keys, others, strict=True)]


def _anchors(b: Builder, group: Group, new: NewTokens, clock: Clock) -> None:
    """Keep token 0 exactly when it comes."""
    for side, vectors in zip(group.sides(), (new.keys, new.values), strict=True):
        if side.anchor is None:
            continue
        first = b.cut(vectors, 0, 1, 2)
        comes = b.op("Equal", b.reshape(clock.seen, clock.batch, 1, 1, 1), b.scalar(0, "int64"))
        if side.anchor.dtype == "float32":
            b.into(side.anchor.present, "Where", comes, first, side.anchor.past)
            continue
        held = b.op("Where", comes, first, b.cast(side.anchor.past, "float32"))  # not every type has a `Where`
        b.into(side.anchor.present, "Cast", held, to=DTYPES[side.anchor.dtype])
