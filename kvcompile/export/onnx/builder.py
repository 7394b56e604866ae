"""Writing an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
"""The first with `TensorScatter` and with `Attention` over a cache that is written outside of it."""

IR_VERSION = 11
"""An older one than this opset came with, as nothing newer is used and ONNX Runtime 1.24 takes it."""

DTYPES = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8, "int64": TensorProto.INT64, "bool": TensorProto.BOOL,
}  # fmt: skip
"""Element types by their name in torch and numpy."""

Size = int | str
"""A dimension: a number, or the name of one that is known when the graph runs."""


def value(name: str, dtype: str, shape: Sequence[Size]) -> onnx.ValueInfoProto:
    """What an input or output of a graph is."""
    return helper.make_tensor_value_info(name, DTYPES[dtype], list(shape))


class Root:
    """What a graph and its branches share: names, constants and weights."""

    def __init__(self) -> None:
        self.count = 0
        self.constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.initializers: list[TensorProto] = []
        self.weights: dict[str, Callable[[], Any]] = {}
        """What goes into a file of its own: float tensors (torch) by name, made when they are written."""


class Builder:
    """The nodes of one graph, or of one branch of an `If`. Values are known by their names."""

    def __init__(self, root: Root | None = None) -> None:
        self.root = root or Root()
        self.nodes: list[onnx.NodeProto] = []

    def branch(self) -> Builder:
        """Another list of nodes over the same constants and weights; it sees the values of this one."""
        return Builder(self.root)

    def name(self, kind: str) -> str:
        self.root.count += 1
        return f"{kind}_{self.root.count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The output of a new node."""
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """The `count` outputs of a new node."""
        outputs = [self.name(kind) for _ in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs

    def into(self, output: str, kind: str, *inputs: str, **attributes: Any) -> str:
        """A new node whose output has a name already."""
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def choose(self, condition: str, one: onnx.GraphProto, other: onnx.GraphProto, outputs: Sequence[str]) -> None:
        """Run one of two branches, whose outputs are then those of this graph under these names."""
        self.nodes.append(helper.make_node("If", [condition], list(outputs), then_branch=one, else_branch=other))

    def graph(self, name: str, outputs: Sequence[onnx.ValueInfoProto]) -> onnx.GraphProto:
        """This branch as a graph."""
        return helper.make_graph(self.nodes, name, [], list(outputs))

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.array(np.array(values, np.int64))

    def scalar(self, number: int | float, dtype: str = "float32") -> str:
        """A constant without dimensions, of a type that numpy has."""
        return self.array(np.array(number, dtype))

    def array(self, array: NDArray[Any]) -> str:
        """A small constant, kept in the graph itself; equal ones are kept once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.root.constants:
            name = self.name("constant")
            self.root.constants[key] = name
            # `ascontiguousarray` makes a vector of a number.
            laid_out = np.ascontiguousarray(array).reshape(array.shape)
            self.root.initializers.append(numpy_helper.from_array(laid_out, name))
        return self.root.constants[key]

    def weight(self, name: str, tensor: Callable[[], Any]) -> str:
        """A float tensor that is written beside the graph, in float32; a name known already stays what it is."""
        self.root.weights.setdefault(name, tensor)
        return name

    def cast(self, x: str, dtype: str) -> str:
        return self.op("Cast", x, to=DTYPES[dtype])

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        return [x] if len(sizes) == 1 else self.several("Split", len(sizes), x, self.ints(*sizes), axis=axis)

    def padded(self, x: str, count: int) -> str:
        """A value of four dimensions with `count` zeros after the last one's elements."""
        return self.op("Pad", x, self.ints(0, 0, 0, 0, 0, 0, 0, count)) if count else x

    def cut(self, x: str, first: int | str, last: int | str, axis: int) -> str:
        """Elements `first` to `last` (not included) along an axis; numbers, or int64 vectors of one."""
        ends = [end if isinstance(end, str) else self.ints(end) for end in (first, last)]
        return self.op("Slice", x, *ends, self.ints(axis))
