"""Every GPU kernel compiled ahead of time, for which no GPU is needed: registers, stack, shared memory, instructions.

    python -m kvcompile.kernels.ahead [sm_80 sm_90 ...] [64 96 128 256 ...] [16/16 "8/4 4/4" ...]

prints one JSON object a kernel, shape and architecture, for these head sizes and pairs of codecs. A register spill
shows as stack or local memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcompile.kernels import machine_code
from kvcompile.kernels.add_norm import triton as add_norm
from kvcompile.kernels.append import triton as append
from kvcompile.kernels.arguments import ORDER
from kvcompile.kernels.codecs import names
from kvcompile.kernels.compact import triton as compact
from kvcompile.kernels.layout import EXACT
from kvcompile.kernels.new_token import triton as new_token
from kvcompile.kernels.ragged_decode import triton as ragged_decode
from kvcompile.kernels.ragged_decode.tuning import entry
from kvcompile.kernels.restore import triton as restore
from kvcompile.kernels.silu_mul import triton as silu_mul

HEAD_DIMS = (64, 96, 128, 256)
PAIRS = (
    "16/16", "8/8", "8/4", "4/4", "16/16 8/4 4/4", "4/3", "4/2", "mix3/4", "mix3/3", "mix2/3", "mix2/2", "mix1/2",
    "4/4 4/3 mix3/3 mix2/2",
)  # fmt: skip
"""Of keys and values."""
STORED = {"": ((8, 4), (8, 4)), ", few bits": ((8, 4, 67, 66, 65), (4, 3, 2))}
"""Codecs of keys and of values in kernels that store, by a name."""
VECTORS = {
    "query", "out", "new_keys", "new_values", "keys", "values", "qkv", "cos", "sin", "hidden", "output", "residual",
    "delta", "weight", "total", "gate_up", "partial", "vectors",
}  # fmt: skip
"""Arguments in the cache dtype."""
SLOTS = 64
"""Slots to which instructions are counted."""
WARPS = 4
"""Warps among which these slots are shared in the count: programs of one warp count a quarter."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel: `registers` a thread, `stack` and `local` bytes a thread, `shared` bytes. Of
    the longest loop with products, `instructions` a warp for `SLOTS` slots shared by `WARPS` warps, and how many of
    them are `short_loads`, reads of less than 32 bits from global memory, and `spills` (0 where there is no such loop).
    `waits`: how often it waits for the launch before it, with which it overlaps (see `overlap`); `fetches`: how many
    instructions fetch memory before that, and how many after it.
    """

    kernel: str
    shape: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int
    instructions: int = 0
    short_loads: int = 0
    spills: int = 0
    waits: int = 0
    fetches: tuple[int, int] = (0, 0)


def compile_all(arch: str, head_dims: Sequence[int] = HEAD_DIMS, pairs: Sequence[str] = PAIRS) -> Iterator[Compiled]:
    """Every kernel at these head sizes, for bfloat16 and one token a step, and for sm_90 at 128 the others,
    and `ragged_decode` with new tokens and for float32."""
    for head_dim in head_dims:
        for name in pairs:
            yield decode(head_dim, name, arch)
        four, rows = {"num_warps": 4}, {"GROUP": 7, "R": 16}
        sizes = {"D": head_dim, "DP": triton.next_power_of_2(head_dim)}
        for name, codecs in STORED.items():
            shape, storing = f"{head_dim}{name}", {**append.constants(head_dim, codecs), "SCORES": True}
            yield _compile(append._append, shape, arch, storing, {"num_warps": append.WARPS})
            step = {**storing, **rows, "NORMS": True, "TRANSFORMED": True}
            yield _compile(new_token._new_token, shape, arch, step, new_token.OPTIONS)
        for codec in (EXACT, *(one.id for one in ORDER if one.fits(head_dim))):
            cut = {"CODEC": codec, **compact.constants(head_dim, transformed=True)}
            yield _compile(compact._compact, f"{head_dim}, codec {codec}", arch, cut, compact.OPTIONS)
        yield _compile(restore._restore, str(head_dim), arch, {**rows, **sizes}, four)
        if head_dim != 128 or arch != "sm_90":
            continue
        yield _compile(add_norm._add_norm, "4096", arch, {"ADDED": True, "BLOCK": 4096}, four)
        yield _compile(silu_mul._silu_mul, "", arch, {"BLOCK": silu_mul.BLOCK}, four)
        for name in ("16/16", "8/8", "4/4"):
            yield decode(head_dim, name, arch, used=64, length=8)
            yield decode(head_dim, name, arch, exact=torch.float32)


def decode(
    head_dim: int, name: str, arch: str, used: int = 7, length: int = 1, exact: torch.dtype = torch.bfloat16
) -> Compiled:
    """`ragged_decode` for the pairs of codecs of this name, `used` queries of a head of which each asks `length` new
    tokens."""
    pairs = ragged_decode.pairs_of((_id(k), _id(v)) for k, v in (pair.split("/") for pair in name.split()))
    chosen = entry(head_dim, exact, pairs)
    fixed, options = ragged_decode.constants(head_dim, pairs, 0, exact, chosen, new=length > 1)
    shape = f"{head_dim}, {name}, {used} rows, {str(exact).removeprefix('torch.')}"
    found = _compile(ragged_decode._decode, shape, arch, fixed, options, exact)
    if found.stack:  # as when it is launched
        options |= ragged_decode.ALL_REGISTERS
        found = min(found, _compile(ragged_decode._decode, shape, arch, fixed, options, exact), key=lambda c: c.stack)
    return found


def _id(name: str) -> int:
    """A codec's id by its name or bits, EXACT for 16."""
    return EXACT if name == "16" else names().get(name) or int(name)


def _type(name: str, exact: torch.dtype) -> str:
    """Type of an argument by its name, in Triton's notation."""
    if name in ("scale", "epsilon"):
        return "fp32"
    if name in ("stats", "score", "scorer", "bias", "matrix", "mean", "k_inverse") or name.endswith(
        ("_matrix", "_mean")
    ):
        return "*fp32"
    if name in ("items", "heads", "seen_by", "places", "done", "tokens"):
        return "*i32"
    if name in ("codes", "k_codes", "v_codes", "new_mask"):
        return "*u8"
    if name in ("scales", "k_scales", "v_scales", "scores"):
        return "*fp16"
    if name in VECTORS or name.endswith(("exact", "anchors", "_norm")):
        return "*bf16" if exact == torch.bfloat16 else "*fp32"
    return "i32"


def _compile(
    kernel: Any, shape: str, arch: str, constants: dict[str, Any], options: dict[str, int],
    exact: torch.dtype = torch.bfloat16,
) -> Compiled:  # fmt: skip
    names = [parameter.name for parameter in kernel.params]
    if "OVERLAP" in names:
        constants = {**constants, "OVERLAP": arch >= "sm_90"}
    signature = {name: "constexpr" if name in constants else _type(name, exact) for name in names}
    # Tensors begin at addresses that 16 divides, as at run time.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    made = triton.compile(source, target=target, options=options)
    used = machine_code.usage(made.asm["cubin"])
    body = max(machine_code.main_loops(made.asm["cubin"]), key=len, default=[]) if "STAGES" in constants else []
    share = SLOTS * options["num_warps"]
    counted = len(body) * share // (constants["N"] * constants["HALVES"] * WARPS) if body else 0
    return Compiled(
        kernel.fn.__name__.removeprefix("_"), shape, arch, used.registers, used.stack, used.local, made.metadata.shared,
        counted, sum(map(machine_code.is_short_load, body)), sum(map(machine_code.is_spill, body)),
        machine_code.waits(made.asm["cubin"]), machine_code.fetches(made.asm["cubin"]),
    )  # fmt: skip


if __name__ == "__main__":
    sizes = [int(argument) for argument in sys.argv[1:] if argument.isdigit()] or HEAD_DIMS
    codecs = [argument for argument in sys.argv[1:] if "/" in argument] or PAIRS
    for arch in [argument for argument in sys.argv[1:] if argument.startswith("sm_")] or ("sm_80", "sm_90"):
        for one in compile_all(arch, sizes, codecs):
            print(json.dumps(vars(one)), flush=True)
