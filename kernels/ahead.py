"""Every GPU kernel compiled ahead of time, for which no GPU is needed: registers, stack and shared memory.

    python -m kvcompile.kernels.ahead [sm_80 sm_90 ...]

prints one JSON object a kernel, shape and architecture. A register spill shows as stack or local memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcompile.kernels.append import triton as append
from kvcompile.kernels.arguments import groups
from kvcompile.kernels.compact import triton as compact
from kvcompile.kernels.ragged_decode.triton.reduce import _reduce
from kvcompile.kernels.ragged_decode.triton.scan import _decode
from kvcompile.kernels.ragged_decode.tuning import entry

HEAD_DIMS = (64, 96, 128, 256)
PAIRS = {"16/16": 1 << 0, "8/8": 1 << 4, "8/4": 1 << 5, "4/4": 1 << 8, "16/16 8/4 4/4": 1 << 0 | 1 << 5 | 1 << 8}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a block may have (CUDA C++ programming guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel: `registers` a thread, `stack` and `local` bytes a thread, `shared` bytes."""

    kernel: str
    shape: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int


def compile_all(arch: str) -> Iterator[Compiled]:
    """Every kernel for bfloat16 at every head size."""
    for head_dim in HEAD_DIMS:
        sizes = _sizes(head_dim)
        chosen = entry(head_dim, torch.bfloat16)
        for name, pairs in PAIRS.items():
            constants = {
                **sizes, "PAIRS": pairs, "R": 16, "T": 1, "N": chosen.block, "WINDOW": 0, "EXACT": tl.bfloat16,
                "CODE": tl.float16,
            }  # fmt: skip
            yield _compile(_decode, f"{head_dim}, {name}", arch, constants, chosen.num_warps, chosen.num_stages)
        constants = {"D": head_dim, "DP": sizes["DP"], "R": 16, "T": 1, "TP": 16, "NEW": False, "MASKED": False}
        yield _compile(_reduce, f"{head_dim}", arch, constants)
        yield _compile(
            append._append, f"{head_dim}", arch,
            {**sizes, "GP": triton.next_power_of_2(sizes["G"]), "SCORES": True, "BLOCK": 1024},
        )  # fmt: skip
        yield _compile(
            compact._compact, f"{head_dim}", arch, {**sizes, "N": compact.BLOCK, "TRANSFORMED": True}, compact.WARPS,
            compact.STAGES,
        )  # fmt: skip


def _sizes(head_dim: int) -> dict[str, int]:
    part = head_dim // groups(head_dim)
    padded = triton.next_power_of_2
    count = groups(head_dim)
    return {"D": head_dim, "DP": padded(head_dim), "G": count, "P8": padded(part), "P4": max(16, padded(part // 2))}


def _type(name: str) -> str:
    """Type of an argument by its name, in Triton's notation."""
    if name in ("scale",):
        return "fp32"
    if name in ("partial", "stats", "score", "k_matrix", "k_mean", "v_matrix", "v_mean"):
        return "*fp32"
    if name in ("items", "heads", "seen_by", "tokens"):
        return "*i32"
    if name.endswith(("codes8", "codes4")) or name == "new_mask":
        return "*u8"
    if name.endswith(("scales8", "scales4")) or name == "scores":
        return "*fp16"
    if name in ("query", "out", "new_keys", "new_values", "keys", "values") or name.endswith(("exact", "anchors")):
        return "*bf16"
    return "i32"


def _compile(
    kernel: Any, shape: str, arch: str, constants: dict[str, Any], warps: int = 4, stages: int = 3
) -> Compiled:
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else _type(name) for name in names}
    # Tensors begin at addresses that 16 divides, as at run time.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    usage = _usage(made.asm["cubin"])
    return Compiled(
        kernel.fn.__name__.removeprefix("_"), shape, arch, usage["REG"], usage["STACK"], usage["LOCAL"],
        made.metadata.shared,
    )  # fmt: skip


def _usage(cubin: bytes) -> dict[str, int]:
    """Resources of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


if __name__ == "__main__":
    for arch in sys.argv[1:] or SHARED_LIMIT:
        for one in compile_all(arch):
            print(json.dumps(vars(one)), flush=True)
