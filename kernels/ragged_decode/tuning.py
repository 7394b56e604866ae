"""How the GPU kernel is launched: a table, so that nobody waits for a search at the start."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvcompile.kernels.ragged_decode.pairs import codecs_of


@dataclass(frozen=True)
class Tuning:
    """`block` slots a step of a program, in how many `halves`, its warps and stages, how many programs a processor is
    taken to hold where it cannot be asked (`occupancy`), the most items of a head, the `waves` of programs that the
    items make on the device, how many bytes the programs of a processor fetch `early`, while the launch before theirs
    ends, how many results of items a program that joins them has on their way at a time (`together`, for heads of 128
    elements), and with how many `registers` a thread has to do (0: with as many as the compiler likes)."""

    block: int
    halves: int
    num_warps: int = 1
    num_stages: int = 2
    programs: int = 8
    most: int = 128
    waves: int = 1
    early: int = 0
    together: int = 4
    registers: int = 0


ONE_PAIR = {64: Tuning(64, 2, num_stages=3), 96: Tuning(32, 1, num_stages=3), 128: Tuning(64, 2), 256: Tuning(16, 1)}
DEEP = ONE_PAIR | {128: Tuning(64, 2, num_stages=4, together=8)}
SHALLOW = ONE_PAIR | {128: Tuning(32, 1, num_stages=3)}
FETCHED = SHALLOW | {128: replace(SHALLOW[128], early=128 << 10)}
SEVERAL_PAIRS = {size: replace(chosen, waves=2) for size, chosen in SHALLOW.items()}
"""By head size, the next larger one for those between, for layers whose heads have one pair of codecs (exact ones load
`DEEP`er; those with values of 3 bits, those with 8 bits on one side, and 4 bits hold fewer slots in registers; with 4
bits the first ones are `FETCHED`), and several. Those for 128 were measured on an H200 with Triton 3.6
(benchmarks/measured), but for 8 bits with others. The others are not measured; no register is spilled in their loops.

A program is one warp: a second one would exchange logits through shared memory, and a processor holds several programs
anyhow. In two halves, every part of the query has two products in a step; with one product, Triton would put it into
that product's registers anew in every step. One wave of programs is best where all take as long (a second one costs 5
to 40 %, and the launch after it begins later); of several pairs some take longer for their bytes, and processors that
are done take more. To fetch early pays for 4 bits alone."""

THREE, FOUR, EIGHT = 3, 4, 8
"""The ids of int3, int4 and int8."""


def entry(head_dim: int, dtype: torch.dtype, pairs: int) -> Tuning:
    """The line for a shape and for the `pairs` of codecs of a layer, as the bits of a number; float32 has fewer slots a
    step, in one piece, and where codes become float32, two warps for their registers."""
    keys, values = codecs_of(pairs)
    if pairs.bit_count() > 1:
        table = SEVERAL_PAIRS
    elif keys == values == {FOUR}:
        table = FETCHED
    elif THREE in values or (EIGHT in keys | values and keys != values):
        table = SHALLOW
    else:
        table = ONE_PAIR if keys | values else DEEP
    chosen = table[min(size for size in table if size >= head_dim)]
    if dtype != torch.float32:
        return chosen
    block, warps = max(16, chosen.block // 4), 2 if keys | values else 1
    return replace(chosen, block=block, halves=1, num_warps=warps, num_stages=min(chosen.num_stages, 3), together=4)


def items_of(programs: int, device: torch.device, batch: int) -> int:
    """Work items of one sequence, so that all sequences together have `programs` a processor. In
    the interpreter there is nothing to fill, and every program takes its time."""
    if device.type != "cuda":
        return max(1, programs // 2)
    return max(1, programs * torch.cuda.get_device_properties(device).multi_processor_count // batch)
