"""From the projections of a new token to the store: the checked entry point."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.dispatch import takes_kernels
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.new_token import dense
from kvcompile.kernels.new_token.parts import HeadNorms, LinearScorer
from kvcompile.kernels.transform import Transform


def new_token(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    *,
    transform: Transform | None = None,
    norms: HeadNorms | None = None,
    hidden: torch.Tensor | None = None,
    scorer: LinearScorer | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Store one new token a sequence and return its queries [B, Hq, 1, D], ready for `ragged_decode`.

    Norms of heads where there are any, rotary embedding (x cos + half(x) sin, RoFormer, arXiv 2104.09864, in the halves
    that Hugging Face models use), the transform of quantised heads, the compiled scorer, and `append`.

    Args:
        qkv: [B, (Hq + 2 H) D], queries, keys and values side by side, heads in storage order.
        cos, sin: [B, D] for the token's position.
        keys, values, scores, layout, seen: see `append`; every head has a policy that `append` places.
        places: see `ragged_decode`.
        hidden: [B, d], what `scorer` looks at; both where the layer has heads that keep scores.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    batch, head_dim = len(keys.exact) if places is None else len(places), keys.head_dim
    heads = layout.num_kv_heads
    query_heads = qkv.shape[-1] // head_dim - 2 * heads
    if qkv.dim() != 2 or len(qkv) != batch or query_heads < heads or query_heads % heads:
        raise ValueError(f"projections {tuple(qkv.shape)} for {batch} sequences of {heads} KV heads of {head_dim}")
    if cos.shape != (batch, head_dim) or sin.shape != cos.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}, expected {(batch, head_dim)}")
    if layout.scored_slots and (hidden is None or scorer is None):
        raise ValueError("the layer has heads that keep scores: expected `hidden` and `scorer`")
    arguments = (qkv, cos, sin, keys, values, scores, layout, seen, transform, norms, hidden, scorer)
    if in_triton(qkv, layout, head_dim):
        from kvcompile.kernels.new_token import triton

        return triton.new_token(*arguments, places)
    return dense.new_token(*arguments, places)


def in_triton(tensor: torch.Tensor, layout: LayerLayout, head_dim: int) -> bool:
    """Whether Triton does it for a layer, for tensors where this one is."""
    return takes_kernels(tensor, layout) and head_dim % 2 == 0
