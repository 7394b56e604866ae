"""Attention to a layer's store as the model expects it, whatever its heads are stored as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvcompile.kernels import ragged_decode
from kvcompile.kernels.ragged_decode.totals import Totals

if TYPE_CHECKING:
    from kvcompile.runtime.store import LayerStore


def weighed(
    store: LayerStore,
    query: torch.Tensor,
    seen: Sequence[int] | torch.Tensor,
    scaling: float,
    **options: torch.Tensor | None,
) -> torch.Tensor:
    """`ragged_decode` of transformed queries [B, num_heads, T, D], restored, and with the caps and learned sinks of the
    layer.

    The kernels know no sinks. What they give is shared out afterwards: a sink takes its part of the weight and has no
    value, so that it takes the same part of the output. Kernels see logits without the keys' mean, which a plain
    softmax ignores, and caps and sinks do not.
    """
    stored, softmax, transform = (store.keys, store.values, store.layout, seen), store.softmax, store.transform
    totals, lacking = None, None
    if not softmax.plain:
        if transform is not None:
            lacking = transform.lacking(query) * scaling
        grouped = None if lacking is None else lacking.unflatten(1, (store.layout.num_kv_heads, -1))
        totals = Totals(softmax.cap, grouped)
    out = ragged_decode(query, *stored, scaling=scaling, totals=totals, **options)
    if transform is not None:
        out = transform.outputs(out)
    if totals is None:
        return out
    total = totals.logarithm
    return softmax.share(out, total if lacking is None or softmax.cap is not None else total + lacking)
