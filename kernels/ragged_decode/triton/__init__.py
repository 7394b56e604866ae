"""Ragged decoding on a GPU: split-K over a work list (`scan`), then one small reduction (`reduce`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvcompile.kernels.arguments import groups, tensors
from kvcompile.kernels.arguments import rows as side_rows
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.ragged_decode.triton.reduce import _reduce
from kvcompile.kernels.ragged_decode.triton.scan import CODECS, _decode
from kvcompile.kernels.ragged_decode.tuning import Tuning, entry, items_of
from kvcompile.kernels.ragged_decode.work import work_list


class _Tables(NamedTuple):
    """What never changes about a layer, on the device."""

    items: torch.Tensor
    heads: torch.Tensor
    ranges: torch.Tensor
    pairs: int


def _tables(
    layout: LayerLayout, head_dim: int, exact_bits: int, programs: int, block: int, device: torch.device
) -> _Tables:
    key = ("ragged_decode", head_dim, exact_bits, programs, block, device)
    if key not in layout.memo:
        work = work_list(layout, head_dim, exact_bits, programs, block)
        pairs = {3 * CODECS.index(row.k_codec) + CODECS.index(row.v_codec) for row in layout.rows}
        made = (torch.tensor(t, dtype=torch.int32, device=device) for t in (work.items, layout.rows, work.heads))
        layout.memo[key] = _Tables(*made, sum(1 << pair for pair in pairs))
    tables: _Tables = layout.memo[key]
    return tables


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


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
    chosen: Tuning | None = None,
) -> torch.Tensor:
    """See `api.ragged_decode`. `seen` is best an int32 tensor on the device: a list has to be copied there."""
    batch, num_heads, length, head_dim = query.shape
    device, heads = query.device, layout.num_kv_heads
    used = num_heads // heads * length
    exact = keys.exact.dtype
    chosen = chosen or entry(head_dim, exact)
    programs = items_of(chosen, device, batch)
    tables = _tables(layout, head_dim, exact.itemsize * 8, programs, chosen.block, device)
    items = len(tables.items)
    rows = max(16, triton.next_power_of_2(used))
    partial = torch.empty(batch, items, rows, head_dim, dtype=torch.float32, device=device)
    stats = torch.empty(batch, items, 2, rows, dtype=torch.float32, device=device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    query = query.contiguous()
    if not isinstance(seen, torch.Tensor):
        seen = torch.tensor(seen, dtype=torch.int32, device=device)
    sizes = {
        "D": head_dim, "DP": max(16, triton.next_power_of_2(head_dim)), "R": rows, "T": length,
    }  # fmt: skip
    parts = groups(head_dim)
    _decode[(items, batch)](
        query, partial, stats, tables.items, tables.heads, seen, *tensors(keys), *tensors(values),
        *side_rows(keys), *side_rows(values), scaling, heads, used, int(new_keys is None),
        PAIRS=tables.pairs, G=parts, P8=max(16, triton.next_power_of_2(head_dim // parts)),
        P4=max(16, triton.next_power_of_2(head_dim // parts // 2)), N=chosen.block, WINDOW=layout.window,
        EXACT=TYPES[exact], CODE=tl.float32 if exact == torch.float32 else tl.float16,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages, **sizes,
    )  # fmt: skip
    is_new = new_keys is not None and new_values is not None
    new = (new_keys.contiguous(), new_values.contiguous()) if is_new else (query, query)
    mask = new_mask.expand(batch, 1, length, length).contiguous().view(torch.uint8) if new_mask is not None else query
    _reduce[(heads, batch)](
        partial, stats, tables.ranges, query, *new, mask, out, items, scaling, heads, used,
        TP=max(16, triton.next_power_of_2(length)), NEW=is_new, MASKED=new_mask is not None, num_warps=4, **sizes,
    )  # fmt: skip
    return out
