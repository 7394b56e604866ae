"""What a codec is: one way to store keys or values in fewer bits than the cache dtype has."""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

SCALE_BYTES = 2
"""Bytes of a scale, a float16."""


EIGHTHS = 8
"""Sections are counted in these of a vector's elements."""


class Group(NamedTuple):
    """Neighbouring elements that share a scale: `size` of them from element `start` on, codes of `bits` bits, from byte
    `byte` of the vector's codes on."""

    bits: int
    start: int
    size: int
    byte: int


@dataclass(frozen=True)
class Codec:
    """A vector of D elements is cut into groups of neighbours; each group has a float16 scale, each element a code.

    `id` stands for the codec in a file (`k_bits`, `v_bits`: 1 to 255, and neither 16 nor 32, which mean the cache
    dtype), `name` on the command line (`--kv-dtype`). `bits` is the size of a code, the mean over all elements where
    there are `sections`: pairs of bits and eighths of the elements, in the order of the elements. What no section names
    is not stored and reads as 0. A scale serves at most `group` elements, and a group has a multiple of `pack` elements
    (with sections, of 8 over its bits), so that its codes fill whole bytes.

    `format_version` is the first version of the file format that knows the codec, 0 where none does: no file has it
    then, and it is there to be measured beside others. `needs_transform`: vectors are encoded after the artifact's
    transform, y = T (x - mean), else as they are. `needs_anchor`: heads with sinks keep token 0 in the cache dtype as
    well. `profiled`: profiling measures what the codec loses of keys (`k`), values (`v`) or both, so that the solver
    may choose it; of any other the predicted loss is unknown (NaN), and it is used only where it is asked for by name.

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
    profiled: str = "kv"
    group: int = 64
    pack: int = 2
    sections: tuple[tuple[int, int], ...] = ()

    def groups(self, head_dim: int) -> int:
        """Groups, and scales, of a vector of `head_dim` elements; those of a section are of equal size."""
        if not self.sections:
            return -(-head_dim // self.group)
        return sum(-(-head_dim * eighths // EIGHTHS // self.group) for _, eighths in self.sections)

    def split(self, head_dim: int) -> tuple[Group, ...]:
        """The groups of a vector that `fits`, in the order of elements, codes and scales."""
        return _split(self, head_dim)

    def step(self, head_dim: int) -> int:
        """The number of which `head_dim` has to be a multiple."""
        if not self.sections:
            return self.pack * self.groups(head_dim)
        # A section of e eighths in g groups of whole bytes: head_dim e / 8 has to be a multiple of g 8 / bits.
        steps = [EIGHTHS]
        for bits, eighths in self.sections:
            whole = -(-head_dim * eighths // EIGHTHS // self.group) * 8 // bits * EIGHTHS
            steps.append(whole // math.gcd(whole, eighths))
        return math.lcm(*steps)

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
def _split(codec: Codec, head_dim: int) -> tuple[Group, ...]:
    return split(codec.sections or ((codec.bits, EIGHTHS),), codec.group, head_dim)


def split(sections: tuple[tuple[int, int], ...], group: int, head_dim: int) -> tuple[Group, ...]:
    """The groups of a vector of these sections, of which a scale serves at most `group` elements."""
    found: list[Group] = []
    start, byte = 0, 0
    for bits, eighths in sections:
        elements = head_dim * eighths // EIGHTHS
        count = -(-elements // group)
        for _ in range(count):
            size = elements // count
            found.append(Group(bits, start, size, byte))
            start, byte = start + size, byte + size * bits // 8
    return tuple(found)


@cache
def _has(package: str, implementation: str) -> bool:
    return importlib.util.find_spec(f"{package}.{implementation}") is not None
