"""TurboQuant (arXiv 2504.19874): a random rotation, then every coordinate to the nearest level of one fixed codebook.

A vector's norm is taken off, the unit vector is rotated by a matrix that depends on its size alone, and each coordinate
is rounded to the nearest of 2^bits levels: those of Lloyd and Max for the distribution that a coordinate of a random
unit vector has, so that there is nothing to calibrate. Stored are the levels' numbers and one float16.

This is the paper's variant for the least squared error, as vLLM has it for keys (`turboquant_4bit_nc` and
`turboquant_3bit_nc`, vllm/model_executor/layers/quantization/turboquant): without the QJL residual, by which attention
gets worse, and with "nc", norm correction: what is read back has the norm of what was stored. Two things differ from
vLLM: values are stored like keys, as in the paper, where vLLM rounds them unrotated to equal steps between their least
and largest element; and all layers are alike, where vLLM leaves the first two and last two in the cache dtype.
"""

from __future__ import annotations

from kvcompile.kernels.codecs import Codec

PACK = 8
"""Codes that are packed together: 8 codes of b bits fill b bytes."""


def turboquant(bits: int, package: str) -> Codec:
    """The codec of this many bits; its modules are in `package`. Ids from 200 on are far from those of the format."""
    return Codec(
        id=200 + bits, name=f"turboquant{bits}", bits=bits, package=package, format_version=0, needs_transform=False,
        needs_anchor=False, profiled="", group=1 << 16, pack=PACK,
    )  # fmt: skip
