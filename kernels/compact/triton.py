"""`compact` on a GPU: the kept keys and values of all prompts, transformed and quantised on the way, in one launch for
every codec of a side. A kernel for all codecs of a layer at once takes Triton minutes to compile, anew for every set of
them; one for a single codec takes seconds, and serves every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvcompile.kernels.arguments import COLUMNS, head_rows, steps, tensors
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs.integers.triton.storing import fill
from kvcompile.kernels.compiling import launch
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.regions import units
from kvcompile.kernels.tiles import of_head
from kvcompile.kernels.transform import Transform

FIELDS = ("capacity", "slot", "row", "anchor", "codes", "scales")
"""Of a head's row in `COLUMNS`, what filling one side of it takes; before these comes the number of the head."""
ROW = tl.constexpr(1 + len(FIELDS))
BLOCK = 16
"""Slots of a program; more of them, or more stages, and registers spill at head size 96."""
OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 255}
"""Left alone, the compiler spills a register to fit one program more on a processor."""
UNLIKE = [
    "rows", "codes_step", "scales_step", "anchored", "codes_unit", "scales_unit", "slots", "count", "from_sequence",
    "from_head", "from_token",
]  # fmt: skip
"""Numbers that differ from layer to layer and from prompt to prompt: Triton would compile a kernel anew for those that
are a multiple of 16, and those that are 1."""


@triton.jit(do_not_specialize=UNLIKE)
def _compact(
    heads, tokens, seen_by, vectors, matrix, mean, exact, codes, scales, anchors,
    rows, codes_step, scales_step, anchored, codes_unit, scales_unit, slots, count, from_sequence, from_head,
    from_token, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, TRANSFORMED: tl.constexpr,
):  # fmt: skip
    """Program (block of slots, row of `heads`, sequence). A sequence has `slots` slots in `tokens`, and its prompt
    `count` columns; `from_sequence`, `from_head` and `from_token` are rows of `vectors` from one to the next."""
    given = heads + tl.program_id(1) * ROW
    h = tl.load(given).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    kept = tl.minimum(tl.minimum(tl.load(given + 1), count), tl.load(seen_by + b))
    slot = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N >= kept:
        return
    valid = slot < kept
    token = tl.load(tokens + b * slots + tl.load(given + 2) + slot, mask=valid, other=0).to(tl.int64) * from_token
    anchor_row = tl.load(given + 4)
    row, code, scale, anchor = of_head(
        b, exact, codes, scales, anchors, rows, codes_step, scales_step, anchored, tl.load(given + 3),
        tl.load(given + 5), tl.load(given + 6), anchor_row, D, codes_unit, scales_unit,
    )  # fmt: skip
    vectors += (b * from_sequence + h * from_head) * D
    if CODEC == 0:
        d = tl.arange(0, DP)
        inside = valid[:, None] & (d < D)[None, :]
        x = tl.load(vectors + token[:, None] * D + d[None, :], mask=inside, other=0.0)
        tl.store(row + slot[:, None].to(tl.int64) * D + d[None, :], x.to(row.dtype.element_ty), mask=inside)
    else:
        first = valid & (slot == 0) & (anchor_row >= 0)
        fill(vectors, matrix + h * D * D, mean + h * D, code, scale, anchor, token, slot, valid, first, CODEC, D, N,
             TRANSFORMED)  # fmt: skip


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    seen: Sequence[int] | torch.Tensor,
    transform: Transform | None,
) -> None:
    """See `api.compact`. `seen` is best an int32 tensor on the device: a list has to be copied there."""
    batch, _, count, head_dim = new_keys.shape
    device = new_keys.device
    # Every slot of the layer in one list; those of a short prompt that stay empty are not read.
    places = torch.zeros(batch, layout.slots, dtype=torch.int32, device=device)
    for cls, token in zip(layout.classes, tokens, strict=True):
        own = places.narrow(1, layout.rows[cls.start].slot, cls.slots).unflatten(1, (cls.count, cls.capacity))
        own[:, :, : token.shape[2]] = token
    if not isinstance(seen, torch.Tensor):
        seen = torch.tensor(seen, dtype=torch.int32, device=device)
    for side, store, given in (("k", keys, new_keys), ("v", values, new_values)):
        new = given if _in_rows(given) else given.contiguous()
        matrix = mean = new  # never read
        if transform is not None:
            matrix, mean = (
                (transform.key, transform.key_mean) if side == "k" else (transform.value, transform.value_mean)
            )
        unit = units(store.regions, head_dim)
        for part in _parts(layout, side, head_dim, device):
            blocks = triton.cdiv(min(part.most, count), BLOCK)
            with on_device(device):
                launch(
                    _compact, (blocks, len(part.heads), batch),
                    part.heads, places, seen, new, matrix, mean, *tensors(store), *steps(store), unit.codes,
                    unit.scales, layout.slots, count, *(step // head_dim for step in new.stride()[:3]),
                    CODEC=part.codec, **constants(head_dim, transform is not None), **OPTIONS,
                )  # fmt: skip


def constants(head_dim: int, transformed: bool) -> dict[str, int]:
    """What the kernel is compiled for, beside the codec."""
    padded = max(16, triton.next_power_of_2(head_dim))
    return {"D": head_dim, "DP": padded, "N": BLOCK, "TRANSFORMED": transformed}


class _Part(NamedTuple):
    """The heads that have one codec on a side, and the `most` slots of one: `heads` int32 [heads, 1 + FIELDS]."""

    codec: int
    heads: torch.Tensor
    most: int


def _parts(layout: LayerLayout, side: str, head_dim: int, device: torch.device) -> list[_Part]:
    """Those of a layer, made once."""
    key = ("cut", side, head_dim, device)
    if key not in layout.memo:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in head_rows(layout, head_dim)]
        found = []
        for codec in sorted({row[f"{side}_codec"] for row in rows}):
            own = [
                [head, *(row[name if name in row else f"{side}_{name}"] for name in FIELDS)]
                for head, row in enumerate(rows)
                if row[f"{side}_codec"] == codec
            ]
            heads = torch.tensor(own, dtype=torch.int32, device=device)
            found.append(_Part(codec, heads, max(row[1] for row in own)))
        layout.memo[key] = found
    parts: list[_Part] = layout.memo[key]
    return parts


def _in_rows(new: torch.Tensor) -> bool:
    """Whether a prompt's vectors [B, H, n, D] lie in memory as rows of D numbers, in any order: then they are read
    where they are, without a copy of the whole prompt."""
    return new.stride(3) == 1 and all(step % new.shape[3] == 0 for step in new.stride()[:3])
