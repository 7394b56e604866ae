"""The codecs that keys and values can be stored with; a new one is a folder here and a line in `_BUILT_IN`.

All of the format, the byte account, profiling, the solver, the runtime and the kernels ask here. Neither torch nor
numpy is imported: readers of the format need none of the implementations.
"""

from __future__ import annotations

import importlib

from kvcompile.kernels.codecs.base import Codec

CODECS: dict[int, Codec] = {}
"""By id, in the order in which they were registered."""

_BUILT_IN = ("int8", "int4", "int3", "int2", "mix3", "mix2", "mix1", "fp8")
"""Folders of this package."""

_CACHE_DTYPES = (16, 32)
"""Ids that mean elements of the cache dtype (its bits)."""


def register(codec: Codec) -> Codec:
    """Add a codec, from inside or outside of this package; the same one may be added again.

    Raises:
        ValueError: an id or name that is taken, or an id that no byte of a file can hold.
    """
    if not 0 < codec.id < 256 or codec.id in _CACHE_DTYPES:
        raise ValueError(f"the codec {codec.name} has the id {codec.id}: expected 1 to 255, and neither 16 nor 32")
    for other in CODECS.values():
        if other != codec and (other.id == codec.id or other.name == codec.name):
            raise ValueError(f"the codec {codec.name} ({codec.id}) is taken by {other.name} ({other.id})")
    CODECS[codec.id] = codec
    return codec


def codec_of(id: int) -> Codec:
    """The codec of an id (`k_bits` or `v_bits` of a quantised head).

    Raises:
        ValueError: an id of no codec, those of the cache dtypes included.
    """
    if id not in CODECS:
        known = ", ".join(f"{codec.id} ({codec.name})" for codec in CODECS.values())
        raise ValueError(f"there is no codec {id}: expected one of {known}")
    return CODECS[id]


def is_quantised(id: int) -> bool:
    """Whether `k_bits` or `v_bits` of a head stands for a codec, and not for elements of the cache dtype."""
    return int(id) in CODECS


def label(bits: int) -> str:
    """`k_bits` or `v_bits` for people: the number, or the name of a codec whose id is not its bits."""
    return CODECS[bits].name if is_quantised(bits) and CODECS[bits].bits != bits else str(bits)


def names() -> dict[str, int]:
    """Ids by name, as `--kv-dtype` takes them."""
    return {codec.name: codec.id for codec in CODECS.values()}


def profiled(side: str) -> tuple[int, ...]:
    """Ids of the codecs whose loss profiling measures for keys (`side` is `k`) or values (`v`), those of more bits
    first."""
    return tuple(c.id for c in sorted(CODECS.values(), key=lambda c: -c.bits) if side in c.profiled)


for _folder in _BUILT_IN:
    register(importlib.import_module(f"{__name__}.{_folder}").CODEC)

__all__ = ["CODECS", "Codec", "codec_of", "is_quantised", "label", "names", "profiled", "register"]
