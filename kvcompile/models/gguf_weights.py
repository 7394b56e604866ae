"""The weights of a GGUF file as safetensors, tensor by tensor: no more than a file of them is in memory."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)

from kvcompile.models.checkpoint import INDEX, SINGLE

SHARD = 1 << 28
"""Bytes after which a file of weights ends."""

ROWS = 1 << 21
"""Elements of a vocabulary's matrix that are dequantised at once."""

VOCABULARY = ("token_embd.weight", "output.weight")
"""The largest tensors. No family mixes or moves their rows, so that some can be dequantised without the others."""

DEPTH = 2
"""How far into a model its names are looked up: some are written as their parts without the head have them."""

BLOCK = re.compile(r"blk\.(\d+)\.")


Writing = Callable[[], contextlib.AbstractContextManager[None]]
"""Gives the block within which a file is written; it says what went wrong."""


def write_weights(file: Path, model: Any, dtype: torch.dtype, folder: Path, writing: Writing) -> None:
    """Write the tensors of `file` into `folder` in `dtype`, under the names that `model` has for them, which may itself
    be without numbers; within `one_reader`, of whose reader the pages are given up tensor by tensor.

    Raises whatever the parser meets in a damaged file, and ValueError for a tensor that comes in pieces far apart.
    """
    shards = _Shards(folder, writing)
    for name, tensor in _tensors(file, model, dtype):
        shards.add(name, tensor)
    shards.finish()


def _tensors(file: Path, model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model has a name for, in `dtype`."""
    from gguf import GGUFReader

    config = load_gguf_checkpoint(str(file), return_tensors=False)["config"]
    reader = GGUFReader(file)
    kind = TENSOR_PROCESSORS.get(read_field(reader, "general.architecture")[0], TensorProcessor)
    reader.fields.clear()  # a vocabulary in pieces, which takes half a gigabyte
    # Where the parser puts experts, which it joins from several tensors of one layer.
    joined: dict[str, Tensor] = {}
    parsed = {"config": config, "tensors": joined}
    processor = kind(config=config)
    names = get_gguf_hf_weights_map(_Named(model, DEPTH), processor)
    layer = None
    for tensor in reader.tensors:
        found = BLOCK.match(tensor.name)
        if found is not None and found[1] != layer:
            yield from _taken(joined, dtype)
            layer = found[1]

        def processed(rows: slice, tensor: Any = tensor) -> tuple[str, NDArray[np.float32]]:
            result = processor.process(
                weights=_numbers(tensor, rows), name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            return result.name, result.weights

        if tensor.name in VOCABULARY:
            if tensor.name in names:
                yield names[tensor.name], _by_rows(tensor, lambda rows: processed(rows)[1], dtype)
        else:
            name, weights = processed(slice(None))
            if name in names:
                yield names[name], torch.from_numpy(np.copy(weights)).to(dtype)
        reader.forget()
    yield from _taken(joined, dtype)


class _Named:
    """A module as the table of names wants it, with no parts further down than `depth`: the table is made anew for
    every part, and a model has hundreds."""

    def __init__(self, module: Any, depth: int) -> None:
        self.module, self.depth = module, depth
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict

    def named_children(self) -> list[tuple[str, _Named]]:
        parts = self.module.named_children() if self.depth else ()
        return [(name, _Named(part, self.depth - 1)) for name, part in parts]


def _taken(joined: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    while joined:
        name, tensor = joined.popitem()
        yield name, tensor.to(dtype)


def _by_rows(tensor: Any, numbers: Callable[[slice], NDArray[np.float32]], dtype: torch.dtype) -> Tensor:
    count, width = (int(size) for size in reversed(tensor.shape))
    whole = torch.empty(count, width, dtype=dtype)
    step = max(1, ROWS // width)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        whole[rows] = torch.from_numpy(np.array(numbers(rows)))
    return whole


def _numbers(tensor: Any, rows: slice) -> NDArray[np.float32]:
    from gguf import dequantize

    numbers: NDArray[np.float32] = dequantize(tensor.data[rows], tensor.tensor_type)
    return numbers


class _Shards:
    """Collects tensors, and writes a file as soon as it is large enough."""

    def __init__(self, folder: Path, writing: Writing) -> None:
        self.folder, self.writing = folder, writing
        self.tensors: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.size = self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.tensors or any(name in names for names in self.files):
            raise ValueError(f"the parts of {name} are not side by side")
        size = tensor.numel() * tensor.element_size()
        self.tensors[name] = tensor.contiguous()
        self.size, self.total = self.size + size, self.total + size
        if self.size >= SHARD:
            self._write()

    def finish(self) -> None:
        if self.tensors:
            self._write()
        names = [f"model-{i + 1:05}-of-{len(self.files):05}.safetensors" for i in range(len(self.files))]
        with self.writing():
            if len(self.files) == 1:
                self._path(0).rename(self.folder / SINGLE)
                return
            for i, name in enumerate(names):
                self._path(i).rename(self.folder / name)
            placed = {key: name for name, keys in zip(names, self.files, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(placed.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _path(self, number: int) -> Path:
        return self.folder / f"unfinished-{number}"

    def _write(self) -> None:
        with self.writing():
            save_file(self.tensors, self._path(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.tensors))
        self.tensors, self.size = {}, 0
