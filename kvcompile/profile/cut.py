"""What a plan leaves of one layer of a context, as the runtime would have it, and attention to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import POLICIES, Quantiser
from kvcompile.kernels.codecs import CODECS
from kvcompile.profile.attention import Attention, Handler
from kvcompile.profile.context import Context, Packed, over_context
from kvcompile.profile.eviction import survivors
from kvcompile.profile.quantised import Shift, matrices, quantised
from kvcompile.profile.references import LayerReferences
from kvcompile.stages import Plan, Rotary


@dataclass(frozen=True, eq=False)
class Left:
    """What a context leaves in one layer: keys and values [H, n, D], the scorer's scores [H, n] (None: without one) and
    the `references` [num_heads, r, D] of `Context`."""

    key: Tensor
    value: Tensor
    score: Tensor | None
    references: Tensor


def over_cut(
    left: Left,
    packed: Packed,
    rows: Mapping[str, NDArray[Any]],
    quantiser: Quantiser | None,
    tokens: int,
    rotary: Rotary | None,
    shift: Shift | None = None,
) -> Handler:
    """Attention of a packed pass over what a plan leaves of one layer, as `cut_layer` says; `rotary` is a table of the
    layer (None: without references)."""

    def attend(call: Attention) -> Tensor:
        references = None if rotary is None else LayerReferences.of(call, left.references, left.key.shape[1], rotary)
        cut = cut_layer(left.key, left.value, left.score, rows, quantiser, tokens, shift, references)
        over = over_context(Context([], [cut.key], [cut.value]), packed, [cut.kept])
        return over(replace(call, layer=0))

    return attend


@dataclass(frozen=True)
class LayerCut:
    """A layer's keys and values [H, n, D] as they are read back, and the tokens that are kept, bool [H, n]."""

    key: Tensor
    value: Tensor
    kept: Tensor


def rows_of(plan: Plan, layer: int) -> dict[str, NDArray[Any]]:
    """What a plan says of one layer's heads, [H] each."""
    tables = ("policy", "capacity", "sink", "recent", "k_bits", "v_bits")
    return {name: getattr(plan, name)[layer] for name in tables}


def cut_layer(
    key: Tensor,
    value: Tensor,
    score: Tensor | None,
    rows: Mapping[str, NDArray[Any]],
    quantiser: Quantiser | None,
    tokens: int,
    shift: Shift | None = None,
    references: LayerReferences | None = None,
) -> LayerCut:
    """What a plan for contexts of `tokens` tokens leaves of one layer: `score` [H, n] are the scorer's, `rows` the
    plan's for this layer, quantiser and shift tables of one layer. `references` choose tokens beside the scorer and
    have values fitted, where the runtime's do; None: neither."""
    length, scale = key.shape[1], key.shape[1] / tokens
    alive, values = list[Tensor](), list(value)
    for number in range(key.shape[0]):
        policy = POLICIES[rows["policy"][number]]
        sink = int(rows["sink"][number])
        budget = min(max(round(int(rows["capacity"][number]) * scale), sink + 1), length)
        recent = budget - sink
        if policy == "scored":
            recent = min(max(round(int(rows["recent"][number]) * scale), 1), budget - sink)
        # Without a scorer no head is `scored`, and all scores are equal.
        row = torch.zeros(length, device=key.device) if score is None else score[number].to(key.device)
        asked = references if policy == "scored" and budget < length else None
        look = None if asked is None else asked.of_head(number, key, value)
        if look is not None and score is not None:
            row = look.scores(row)
        alive.append(survivors(row[None], budget, recent, sink)[0])
        if look is not None:
            values[number] = look.values(alive[-1])
    return LayerCut(
        _read_back(key, rows["k_bits"], quantiser, "key", shift),
        _read_back(torch.stack(values), rows["v_bits"], quantiser, "value"),
        torch.stack(alive),
    )


def _read_back(stored: Tensor, bits: Any, quantiser: Quantiser | None, kind: str, shift: Shift | None = None) -> Tensor:
    chosen = np.isin(bits, list(CODECS))
    if quantiser is None or not chosen.any():
        return stored
    transform, mean = matrices(quantiser, 0, kind, stored.device)
    read = quantised if shift is None else partial(shift.quantised, layer=0)
    heads = [
        read(stored[h], transform=transform[h], mean=mean[h], bits=int(bits[h])).to(stored.dtype)
        if chosen[h]
        else stored[h]
        for h in range(len(stored))
    ]
    return torch.stack(heads)
