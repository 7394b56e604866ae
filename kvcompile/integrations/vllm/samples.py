"""A few numbers of every tensor in a folder of safetensors files, without reading the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from kvcompile.artifacts import ModelError
from kvcompile.artifacts.identity import sample_places

INDEX = "model.safetensors.index.json"
"""The file that says which of several holds a tensor."""

FLOATING = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Element types of safetensors whose numbers an artifact can be compared with, and torch's names of them."""


class Sampled(NamedTuple):
    """One tensor of a checkpoint: its name, torch's name of its element type, and its samples, f32."""

    name: str
    dtype: str
    numbers: NDArray[np.float32]


def samples(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Sampled]:
    """The samples of all tensors in `folder` that have a name and its shape from `shapes`, and a floating-point type;
    others are passed over.

    Raises:
        ModelError: an index or a file that cannot be read.
    """
    path = folder / INDEX
    try:
        for path, names in _files(folder).items():
            with safe_open(path, framework="pt") as file:
                for name in sorted((file.keys() if names is None else names) & shapes.keys()):
                    part = file.get_slice(name)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    if shape == shapes[name] and dtype in FLOATING:
                        yield Sampled(name, FLOATING[dtype], _numbers(part, shape))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} cannot be read ({reason}): expected the checkpoint's safetensors files") from None


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint and the names that each holds by the index, None (all) where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return dict.fromkeys(sorted(folder.glob("*.safetensors")))
    files: dict[Path, set[str] | None] = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        names = files.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return files


def _numbers(part: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The samples of one tensor, f32: slices of one element each are all that is read of a mapped file."""
    places = (np.unravel_index(place, shape) for place in sample_places(math.prod(shape)))
    elements = [part[tuple(slice(int(i), int(i) + 1) for i in place)].reshape(1) for place in places]
    return torch.cat([torch.zeros(0), *(element.float() for element in elements)]).numpy()
