"""Ragged decoding on a GPU: one launch of a work list (`items`), whose last programs join what the others found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
import triton
import triton.language as tl

from kvcompile.kernels.arguments import head_table, in_order, steps, tensors, unit_sizes
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.compiling import compiles, launch
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.overlap import overlap
from kvcompile.kernels.ragged_decode.occupancy import resident
from kvcompile.kernels.ragged_decode.pairs import codecs_of, pairs_of
from kvcompile.kernels.ragged_decode.triton.items import ITEM, OWN, _decode
from kvcompile.kernels.ragged_decode.tuning import Tuning, entry, items_of
from kvcompile.kernels.ragged_decode.work import FAN, work_list

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def constants(
    head_dim: int, pairs: int, window: int, exact: torch.dtype, chosen: Tuning, new: bool = False,
    masked: bool = False,
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    """The constants that a launch is compiled with, and its options: warps, stages, registers."""
    found = {
        "PAIRS": pairs, "D": head_dim, "DP": max(16, triton.next_power_of_2(head_dim)), "R": 8,
        "TB": 16, "N": chosen.block // chosen.halves, "HALVES": chosen.halves,
        "STAGES": chosen.num_stages, "WINDOW": window, "EXACT": TYPES[exact],
        "CODE": tl.float32 if exact == torch.float32 else tl.float16,
        "GROUPS": -(-chosen.most // FAN), "NEW": new, "MASKED": masked,
        "TOGETHER": max(1, min(chosen.together * 128 // triton.next_power_of_2(head_dim), FAN)),
        **unit_sizes(codecs_of(pairs), head_dim),
    }  # fmt: skip
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    return found, options | ({"maxnreg": chosen.registers} if chosen.registers else {})


def ragged_decode(
    query: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    scaling: float,
    new_keys: torch.Tensor | None,
    new_values: torch.Tensor | None,
    new_mask: torch.Tensor | None,
    places: torch.Tensor | None = None,
    chosen: Tuning | None = None,
) -> torch.Tensor:
    """See `api.ragged_decode`. `seen` is best an int32 tensor on the device: a list has to be copied there."""
    batch, num_heads, length, head_dim = query.shape
    device, heads = query.device, layout.num_kv_heads
    used = num_heads // heads * length
    exact = keys.exact.dtype
    pairs = pairs_of((row.k_codec, row.v_codec) for row in layout.rows)
    is_new = new_keys is not None and new_values is not None
    chosen = chosen or entry(head_dim, exact, pairs)
    fixed, options = constants(head_dim, pairs, layout.window, exact, chosen, is_new, new_mask is not None)
    fixed |= overlap(device)
    blocks = triton.cdiv(used, fixed["R"])
    new = (new_keys.contiguous(), new_values.contiguous()) if is_new else (query, query)  # type: ignore[union-attr]
    mask = new_mask.expand(batch, 1, length, length).contiguous().view(torch.uint8) if new_mask is not None else query
    query = query.contiguous()
    out = torch.empty_like(query)
    if not isinstance(seen, torch.Tensor):
        seen = torch.tensor(seen, dtype=torch.int32, device=device)

    constant = places is None  # and not written by the launch before, where it could be anything yet
    places = in_order(layout, batch, device) if places is None else places
    done = _done(layout, batch, blocks, fixed["GROUPS"], device)

    def arguments(items: torch.Tensor, partial: torch.Tensor, stats: torch.Tensor, *sizes: int) -> tuple[Any, ...]:
        return (
            query, partial, stats, items, seen, places, done, out, *new, mask, *tensors(keys), *tensors(values),
            *steps(keys), *steps(values), scaling, heads, used, length, int(new_keys is None), *sizes,
        )  # fmt: skip

    with on_device(device):
        key = ("ragged_decode", device, batch, blocks, chosen, *fixed.values(), *options.values())
        if key not in layout.memo:
            some = torch.empty(1, dtype=torch.float32, device=device)
            like = arguments(seen, some.to(exact), some, FAN, 0)
            if compiles():  # what follows asks the kernel
                launch(_decode, (1,), *like, **fixed, **options)
                return out
            more, programs = _fitted(like, fixed | options) if device.type == "cuda" else ({}, chosen.programs)
            early = chosen.early // programs
            programs = items_of(programs * chosen.waves, device, batch * blocks)
            items, fan = _items(layout, head_dim, exact, programs, chosen, device)
            layout.memo[key] = items, fan, early, options | more
        items, fan, early, options = layout.memo[key]
        partial = torch.empty(batch, len(items), used, head_dim, dtype=exact, device=device)
        stats = torch.empty(batch, len(items), 2, used, dtype=torch.float32, device=device)
        found = arguments(items, partial, stats, fan, early if constant else 0)
        launch(_decode, (batch, len(items), blocks), *found, **fixed, **options)
    return out


def _items(
    layout: LayerLayout, head_dim: int, exact: torch.dtype, programs: int, chosen: Tuning, device: torch.device
) -> tuple[torch.Tensor, int]:
    """The work list on the device, where it never changes: int32 [items, `ITEM`], `items.OWN` and the row of the item's
    head, so that a program has all of it at once; and how many items are joined at a time. The longest items come
    first: where a processor has no room for all, it begins the short ones when others are done."""
    work = work_list(layout, head_dim, exact.itemsize * 8, programs, chosen.block, chosen.most)
    rows = [(*astuple(one), work.counts[one.head], work.blocks[one.head], at) for at, one in enumerate(work.items)]
    rows.sort(key=lambda row: -work.length(row[-1]))
    own = torch.tensor(rows, dtype=torch.int32, device=device)
    found = torch.cat([own, head_table(layout, head_dim, device)[own[:, OWN.index("head")].long()]], 1)
    return torch.nn.functional.pad(found, (0, ITEM.value - found.shape[1])), work.fan


def _done(layout: LayerLayout, batch: int, blocks: int, groups: int, device: torch.device) -> torch.Tensor:
    """Counters int32 [batch, H, blocks of rows, 1 + groups] of groups of items that are joined, and of items of each
    group that are done, which every launch leaves at 0."""
    # One tensor for many batches: an engine has all of them.
    most = 1 << (batch - 1).bit_length()
    key = ("ragged_decode counters", device, most, blocks, groups)
    if key not in layout.memo:
        shape = (most, layout.num_kv_heads, blocks, 1 + groups)
        layout.memo[key] = torch.zeros(shape, dtype=torch.int32, device=device)
    counters: torch.Tensor = layout.memo[key]
    return counters[:batch]


ALL_REGISTERS = {"maxnreg": 255}
"""Left alone, the compiler may spill a register to fit one program more on a processor."""


def _fitted(arguments: Sequence[Any], options: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Options with which the kernel spills nothing, beside those given (as far as these leave it room), and how many
    programs a processor then holds at a time, by what the compiler made of it."""

    def compiled(more: Mapping[str, int]) -> Any:
        kernel = _decode.warmup(*arguments, grid=(1,), **{**options, **more})
        _ = kernel.run  # loads it, which tells its registers
        return kernel

    kernel, more = compiled({}), {}
    if kernel.n_spills and "maxnreg" not in options and (other := compiled(ALL_REGISTERS)).n_spills < kernel.n_spills:
        kernel, more = other, ALL_REGISTERS
    return more, resident(kernel.function, 32 * options["num_warps"], kernel.metadata.shared)
