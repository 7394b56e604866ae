"""Layers of a plan with full stores of random contents, which a measurement goes through in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import Artifact
from kvcompile.bench.timing import stores_for
from kvcompile.kernels import Buffers, LayerLayout, ragged_decode
from kvcompile.runtime.layouts import layer_layouts


@dataclass(frozen=True)
class RaggedLayers:
    """Layers from the middle of a plan on, each with its own budgets and its own memory."""

    layouts: list[LayerLayout]
    keys: list[Buffers]
    values: list[Buffers]
    seen: torch.Tensor
    scaling: float

    @property
    def bytes(self) -> int:
        """Mean bytes of a layer's keys, values and scales, which a step reads once."""
        tensors = [t for side in (self.keys, self.values) for stored in side for t in stored.tensors()]
        return sum(t.numel() * t.element_size() for t in tensors) // len(self.layouts)

    @property
    def tokens(self) -> tuple[int, int]:
        """The smallest and the largest budget of a head."""
        budgets = [cls.capacity for layout in self.layouts for cls in layout.classes]
        return min(budgets), max(budgets)

    def calls(self, query: torch.Tensor) -> list[Callable[[], Any]]:
        """Attention of `query` [B, num_heads, 1, D] over each of the layers."""

        def call(layout: LayerLayout, keys: Buffers, values: Buffers) -> Callable[[], Any]:
            return lambda: ragged_decode(query, keys, values, layout, self.seen, scaling=self.scaling)

        return [call(*one) for one in zip(self.layouts, self.keys, self.values, strict=True)]


def ragged_layers(plan: Artifact, device: torch.device) -> RaggedLayers:
    """As many layers of the plan as have to take turns on the device, after all of its context's tokens."""
    every, target = layer_layouts(plan), plan.target
    count = stores_for(plan.bytes.resident // len(every), device)
    layouts = [every[(len(every) // 2 + i) % len(every)] for i in range(count)]
    keys, values = ([_filled(plan, layout, side, device) for layout in layouts] for side in ("k_bits", "v_bits"))
    seen = torch.full((target.batch,), target.context, dtype=torch.int32, device=device)
    return RaggedLayers(layouts, keys, values, seen, plan.model.head_dim**-0.5)


def _filled(plan: Artifact, layout: LayerLayout, side: str, device: torch.device) -> Buffers:
    dtype, batch = getattr(torch, plan.target.dtype), plan.target.batch
    stored = Buffers(layout, [getattr(c, side) for c in layout.classes], plan.model.head_dim, dtype, device, batch)
    for tensor in stored.tensors():
        tensor.random_(0, 256) if tensor.dtype == torch.uint8 else tensor.normal_()
    return stored
