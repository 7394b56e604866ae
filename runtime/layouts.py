"""An artifact's budgets as the layouts of stores."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompile.artifacts import DTYPE_BITS, POLICIES, Artifact
from kvcompile.kernels import HeadSpec, LayerLayout

SIZES = ("capacity", "sink", "recent", "k_bits", "v_bits")
"""The numbers that make the shape of a head."""


def layer_layouts(artifact: Artifact, orders: Sequence[Sequence[int]] | None = None) -> list[LayerLayout]:
    """The store's layout, layer by layer, of the heads `orders`; None: of all, in storage order."""
    orders = artifact.budgets.head_order.tolist() if orders is None else orders
    return [layer_layout(artifact, i, order) for i, order in enumerate(orders)]


def layer_layout(artifact: Artifact, layer: int, order: Sequence[int]) -> LayerLayout:
    """The layout of a store of the layer's heads `order`, by the model's numbers and in this order."""
    budgets, window = artifact.budgets, artifact.model.windows[layer]
    tables = {name: getattr(budgets, name)[layer].tolist() for name in SIZES}
    heads = [
        HeadSpec(POLICIES[budgets.policy[layer, h]], **{name: row[h] for name, row in tables.items()}) for h in order
    ]
    return LayerLayout.from_heads(heads, window if window < artifact.target.context else 0)


def window_layout(num_kv_heads: int, window: int, dtype: str) -> LayerLayout:
    """Of a layer that a plan leaves alone: every head keeps the last `window` tokens in the cache dtype."""
    bits = DTYPE_BITS[dtype]
    head = HeadSpec("recent", capacity=window, sink=0, recent=window, k_bits=bits, v_bits=bits)
    return LayerLayout.from_heads([head] * num_kv_heads, window)
