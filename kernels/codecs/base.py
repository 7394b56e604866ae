"""What a codec is: one way to store keys or values in fewer bits than the cache dtype has."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

SCALE_BYTES = 2
"""Bytes of a scale, a float16."""


@dataclass(frozen=True)
class Codec:
    """A vector of D elements is cut into groups of neighbours; each group has a float16 scale, each element a code.

    `id` stands for the codec in a file (`k_bits`, `v_bits`: 1 to 255, and neither 16 nor 32, which mean the cache
    dtype), `name` on the command line (`--kv-dtype`). `bits` is the size of a code; a scale serves at most `group`
    elements, and a group has a multiple of `pack` elements, so that its codes fill whole bytes.

    `format_version` is the first version of the file format that knows the codec, 0 where none does: no file has it
    then, and it is there to be measured beside others. `needs_transform`: vectors are encoded after the artifact's
    transform, y = T (x - mean), else as they are. `needs_anchor`: heads with sinks keep token 0 in the cache dtype as
    well. `profiled`: profiling measures what the codec loses, so that the solver may choose it; of any other the
    predicted loss is unknown (NaN), and it is used only where it is asked for by name.

    `package` is the Python package of the implementations, each a module of it that is imported when it is needed:
    `reference` (defines the codec, one vector at a time), `dense` (torch), and, where the codec has them, `triton`,
    `native` (C) and `onnx`. docs/kernels.md says what is in each.
    """

    id: int
    name: str
    bits: int
    package: str
    format_version: int
    needs_transform: bool = True
    needs_anchor: bool = True
    profiled: bool = True
    group: int = 64
    pack: int = 2

    def groups(self, head_dim: int) -> int:
        """Groups of equal size that a vector of `head_dim` elements is cut into."""
        return -(-head_dim // self.group)

    def step(self, head_dim: int) -> int:
        """The number of which `head_dim` has to be a multiple."""
        return self.pack * self.groups(head_dim)

    def fits(self, head_dim: int) -> bool:
        """Whether vectors of this many elements can be stored."""
        return head_dim > 0 and head_dim % self.step(head_dim) == 0

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of one vector's codes."""
        return head_dim * self.bits // 8

    def vector_bytes(self, head_dim: int) -> int:
        """Bytes of one stored vector: its codes, and the scale of every group."""
        return self.code_bytes(head_dim) + SCALE_BYTES * self.groups(head_dim)

    def elements(self, code_bytes: int) -> int:
        """Elements of the vector whose codes take this many bytes."""
        return code_bytes * 8 // self.bits

    def has(self, implementation: str) -> bool:
        """Whether the codec's package has this module; nothing but the package itself is imported."""
        return _has(self.package, implementation)

    def load(self, implementation: str) -> Any:
        """A module of the codec's package, imported now if it has not been. Raises ImportError where it has none."""
        return importlib.import_module(f"{self.package}.{implementation}")


@cache
def _has(package: str, implementation: str) -> bool:
    return importlib.util.find_spec(f"{package}.{implementation}") is not None
