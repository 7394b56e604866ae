"""A checkpoint's safetensors files, of which tensors are read one by one.

The files are read and not mapped: pages of a map count as the process's own memory for as long as it lasts, and one
that ends too early would end the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompile.artifacts.errors import ModelError

INDEX = "model.safetensors.index.json"
"""The file that says which of several files holds a tensor."""

SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Element types of safetensors that weights may have."""

AT_ONCE = 1 << 28
"""Bytes asked of the system in one go, which takes no more than 2 GiB."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, the place of its first byte there, its element type and shape."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """The tensors of a folder by name; `name` is what errors call the model."""

    def __init__(self, folder: Path, name: str) -> None:
        """Read the files' headers. Raises ModelError, which names the file: one that is missing, cut off or no
        safetensors, or an index that does not fit."""
        self.folder, self.name = folder, name
        self.tensors: dict[str, Stored] = {}
        for file, expected in _files(folder, name).items():
            found = _header(file, name)
            if absent := sorted((expected or set()) - found.keys()):
                raise ModelError(
                    f"{name} has a wrong index: by {INDEX}, {absent[0]} is in {file.name}, which does not have it"
                )
            self.tensors |= found if expected is None else {key: found[key] for key in expected}

    @property
    def dtype(self) -> torch.dtype:
        """The element type of a model whose configuration names none, as transformers finds it: that of the first
        tensor of floats, by name, in the first file, else of the first tensor; float32 without tensors."""
        first = min((stored.file for stored in self.tensors.values()), default=None)
        found = [stored.dtype for _, stored in sorted(self.tensors.items()) if stored.file == first]
        return next((dtype for dtype in found if dtype.is_floating_point), (found or [torch.float32])[0])

    def read(self, key: str) -> Tensor:
        """A tensor as it is stored. Raises ModelError where the file has changed or cannot be read."""
        stored = self.tensors[key]
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        self._read_into(stored, _bytes_of(data), stored.start)
        return data.view(stored.dtype).reshape(stored.shape)

    def elements(self, key: str, places: Sequence[int], count: int = 1) -> Tensor:
        """Some elements of a tensor, [len(places) * count], by their places in its flat order: `count` from each place
        on. Nothing else is read."""
        stored, size = self.tensors[key], self.tensors[key].dtype.itemsize
        data = torch.empty(len(places) * count * size, dtype=torch.uint8)
        view, step = _bytes_of(data), count * size
        for i, place in enumerate(places):
            self._read_into(stored, view[i * step : (i + 1) * step], stored.start + place * size)
        return data.view(stored.dtype)

    def ahead(self, keys: Iterable[str]) -> None:
        """Have the system read tensors before they are asked for; where it knows no such thing, nothing happens."""
        if not hasattr(os, "posix_fadvise"):
            return
        by_file: dict[Path, list[Stored]] = {}
        for key in keys:
            by_file.setdefault(self.tensors[key].file, []).append(self.tensors[key])
        for file, several in by_file.items():
            try:
                handle = os.open(file, os.O_RDONLY)
            except OSError:
                continue  # reading it will say why
            try:
                for stored in sorted(several, key=lambda one: one.start):
                    os.posix_fadvise(handle, stored.start, stored.nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def _read_into(self, stored: Stored, view: memoryview, start: int) -> None:
        try:
            handle = os.open(stored.file, os.O_RDONLY)
            try:
                while len(view):
                    count = os.preadv(handle, [view[:AT_ONCE]], start)
                    if count == 0:
                        raise ModelError(f"{self.name} has a file that is cut off, {stored.file.name}: get it anew")
                    view, start = view[count:], start + count
            finally:
                os.close(handle)
        except OSError as error:
            raise ModelError(f"{stored.file} cannot be read ({error.strerror})") from None


def _bytes_of(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


def _files(folder: Path, name: str) -> dict[Path, set[str] | None]:
    """The files, and the tensors that the index says each of them has, None (all) where there is no index."""
    if (folder / SINGLE).is_file():  # Where there is an index too, transformers does not look at it.
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"{name} has no safetensors weights: expected {SINGLE} or {INDEX} in {folder}")
    files: dict[Path, set[str] | None] = {}
    try:
        for key, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            names = files.setdefault(folder / Path(file).name, set())
            assert names is not None
            names.add(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{name} has an index that cannot be read, {INDEX}: expected a JSON object with a weight_map"
        ) from None
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of its {len(files)} files of weights, the first of them {missing[0]}: get "
            "it anew"
        )
    return files


def _header(file: Path, name: str) -> dict[str, Stored]:
    """Where a file's tensors lie."""
    broken = f"{name} has a damaged file of weights, {file.name}"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{broken}: it ends in its header, so get it anew")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found, end = {}, 0
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise ModelError(f"{name} has {key} of type {entry['dtype']}, expected weights that are not packed")
            stored = Stored(file, 8 + length + first, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if first < 0 or last - first != stored.nbytes:
                raise ModelError(f"{broken}: {key} has {last - first} bytes, expected {stored.nbytes}")
            found[key], end = stored, max(end, 8 + length + last)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{broken} ({reason}): expected safetensors") from None
    if size < end:
        raise ModelError(f"{broken}: it is cut off after {size} of {end} bytes, so get it anew")
    return found
