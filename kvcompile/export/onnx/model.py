"""The graph of a decoder with its budgeted cache: tokens and buffers in, logits and buffers out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper

from kvcompile.artifacts import Artifact
from kvcompile.export.onnx import blocks
from kvcompile.export.onnx.attention import Attention, Call
from kvcompile.export.onnx.builder import IR_VERSION, OPSET, Builder, value
from kvcompile.export.onnx.groups import Group, layer_groups
from kvcompile.export.onnx.parts import Decoder, Layer
from kvcompile.export.onnx.slots import Clock, next_slots

TOKENS, SEEN, NEW, LOGITS = "input_ids", "seen", "new", "logits"


def decoder_graph(b: Builder, parts: Decoder, artifact: Artifact) -> onnx.ModelProto:
    """All nodes; the weights are still to be written (`b.root.weights`).

    Raises:
        ExchangeError: heads of a policy that learns from attention.
    """
    layers, batch = layer_groups(artifact), artifact.target.batch
    call = _call(b, layers, batch)
    attention = Attention(b, artifact, call)
    positions = b.op("Add", b.op("Unsqueeze", SEEN, b.ints(1)), call.steps)
    embedding = b.weight("embedding", lambda: parts.embedding)
    stream = b.op("Gather", embedding, b.reshape(TOKENS, -1))
    if parts.embedding_factor != 1:
        stream = b.op("Mul", stream, b.scalar(parts.embedding_factor))
    waves: dict[tuple[bytes, float], tuple[str, str]] = {}
    for index, layer in enumerate(parts.layers):
        frequencies = layer.rotary.frequencies.float().cpu().numpy()
        key = frequencies.tobytes(), layer.rotary.factor
        if key not in waves:
            waves[key] = blocks.rotations(b, positions, frequencies, layer.rotary.factor)
        stream = _layer(b, layer, index, layers[index], attention, waves[key], stream, parts.activation)
    _logits(b, parts, stream, call, batch)
    return _model(b, layers, batch, len(parts.head.weight))


def _call(b: Builder, layers: list[list[Group]], batch: int) -> Call:
    length = b.op("Shape", TOKENS, start=1)
    count, one = b.op("Squeeze", length), b.scalar(1, "int64")
    longest = b.op("ReduceMax", SEEN, b.ints(0), keepdims=1)
    clock = Clock(batch, SEEN, b.op("Add", SEEN, NEW), longest, length)
    fewest = b.op("ReduceMin", NEW, b.ints(0), keepdims=0)
    single = b.op("And", b.op("Equal", count, one), b.op("Equal", fewest, one))
    steps = b.op("Range", b.scalar(0, "int64"), count, one)
    causal = b.op("LessOrEqual", steps, b.op("Unsqueeze", steps, b.ints(1)))
    return Call(clock, single, steps, causal, next_slots(b, [group for groups in layers for group in groups], clock))


def _layer(
    b: Builder, layer: Layer, index: int, groups: list[Group], attention: Attention, waves: tuple[str, str],
    stream: str, activation: str,
) -> str:  # fmt: skip
    name = f"layers.{index}"
    x = blocks.normed(b, stream, layer.before_attention, f"{name}.before_attention.weight")
    x = attention(layer, index, groups, waves, x)
    if layer.after_attention is not None:
        x = blocks.normed(b, x, layer.after_attention, f"{name}.after_attention.weight")
    stream = b.op("Add", stream, x)
    x = blocks.normed(b, stream, layer.before_mlp, f"{name}.before_mlp.weight")
    x = blocks.mlp(b, x, layer.mlp, activation, f"{name}.mlp")
    if layer.after_mlp is not None:
        x = blocks.normed(b, x, layer.after_mlp, f"{name}.after_mlp.weight")
    return b.op("Add", stream, x)


def _logits(b: Builder, parts: Decoder, stream: str, call: Call, batch: int) -> None:
    """Of the last real token of every sequence."""
    last = b.op("Max", b.op("Sub", NEW, b.ints(1)), b.ints(0))
    rows = b.op("Add", b.op("Mul", b.array(np.arange(batch)), call.clock.length), last)
    x = blocks.normed(b, b.op("Gather", stream, rows), parts.norm, "norm.weight")
    tied = parts.head.weight.data_ptr() == parts.embedding.data_ptr()
    terms = [x, b.weight("embedding" if tied else "head.weight", lambda: parts.head.weight)]
    if (bias := parts.head.bias) is not None:
        terms.append(b.weight("head.bias", lambda: bias))
    if parts.softcap is None:
        b.into(LOGITS, "Gemm", *terms, transB=1)
    else:
        cap = b.scalar(parts.softcap)
        b.into(LOGITS, "Mul", b.op("Tanh", b.op("Div", b.op("Gemm", *terms, transB=1), cap)), cap)


def _model(b: Builder, layers: list[list[Group]], batch: int, vocabulary: int) -> onnx.ModelProto:
    buffers = [buffer for groups in layers for group in groups for buffer in group.buffers()]
    inputs = [value(TOKENS, "int64", (batch, "T")), value(SEEN, "int64", (batch,)), value(NEW, "int64", (batch,))]
    inputs += [value(buffer.past, buffer.dtype, buffer.shape) for buffer in buffers]
    outputs = [value(LOGITS, "float32", (batch, vocabulary))]
    outputs += [value(buffer.present, buffer.dtype, buffer.shape) for buffer in buffers]
    used = _used(b.nodes)
    constants = [constant for constant in b.root.initializers if constant.name in used]
    graph = helper.make_graph(b.nodes, "kvcompile", inputs, outputs, constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="kvcompile")


def _used(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names of all that the nodes and their branches read."""
    found: set[str] = set()
    for node in nodes:
        found.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _used(attribute.g.node)
    return found
