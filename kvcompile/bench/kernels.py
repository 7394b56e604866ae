"""`ragged_decode` of one layer, against the bytes it reads and against attention over the full cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.artifacts import ModelIdentity
from kvcompile.bench.subjects import ragged_plan
from kvcompile.bench.timing import copy_bandwidth, medians


@dataclass(frozen=True)
class KernelRow:
    """One method: `bytes` of keys, values and scales that it has to read once, median `seconds`, what share of the copy
    bandwidth that is, and how many times as fast as the best method on the full cache it is."""

    method: str
    share: float
    bytes: int
    seconds: float
    of_copy: float
    speedup: float


def measure_kernels(
    model: ModelIdentity, context: int, batch: int, share: float, dtype: str, device: torch.device, rounds: int
) -> list[KernelRow]:
    """The middle layer of random ragged plans at `share` of the full cache, and of the full cache; one token each."""
    torch.manual_seed(0)
    heads, group = model.num_kv_heads, model.num_attention_heads // model.num_kv_heads
    kind = getattr(torch, dtype)
    query = torch.randn(batch, heads * group, 1, model.head_dim, dtype=kind, device=device)
    keys, values = (torch.randn(batch, heads, context, model.head_dim, dtype=kind, device=device) for _ in range(2))
    whole = 2 * keys.numel() * keys.element_size()
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}

    rows = query.view(batch, heads, group, model.head_dim)
    calls["full: torch SDPA, groups as rows"] = lambda: scaled_dot_product_attention(rows, keys, values)
    calls["full: torch SDPA, enable_gqa"] = lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention)
        calls["full: flex attention"] = lambda: flex(query, keys, values, enable_gqa=True)
    sizes |= dict.fromkeys(calls, whole)
    for name, bits, uniform in (
        ("ragged", "16", False), ("uniform", "16", True), ("ragged int8", "8", False), ("ragged int4", "4", False),
        ("ragged mixed", "mixed", False),
    ):  # fmt: skip
        calls[name], sizes[name] = _ours(model, context, batch, share, dtype, bits, uniform, query)
    if device.type == "cuda":
        from kvcompile.bench.flashinfer import flashinfer_calls

        for name, (call, size) in flashinfer_calls(model, context, batch, share, dtype, query).items():
            calls[name], sizes[name] = call, size
    with torch.inference_mode():
        seconds = medians(calls, device, rounds)
        copy = copy_bandwidth(device)
    best = min(taken for name, taken in seconds.items() if name.startswith("full"))
    return [
        KernelRow(name, sizes[name] / whole, sizes[name], taken, sizes[name] / taken / copy, best / taken)
        for name, taken in seconds.items()
    ]


def _ours(
    model: ModelIdentity, context: int, batch: int, share: float, dtype: str, bits: str, uniform: bool,
    query: torch.Tensor,
) -> tuple[Callable[[], Any], int]:  # fmt: skip
    """A decode step's attention over a full store, and the bytes of that store's keys and values."""
    from kvcompile.kernels import Buffers, ragged_decode
    from kvcompile.runtime.attach import layer_layouts

    plan = ragged_plan(model, context, batch, share, dtype, bits, uniform=uniform)
    layout = layer_layouts(plan)[model.num_layers // 2]
    keys, values = (
        Buffers(layout, [getattr(c, name) for c in layout.classes], model.head_dim, query.dtype, query.device, batch)
        for name in ("k_bits", "v_bits")
    )
    for stored in (keys, values):
        for tensor in stored.tensors():
            tensor.random_(0, 256) if tensor.dtype == torch.uint8 else tensor.normal_()
    seen = torch.full((batch,), context, dtype=torch.int32, device=query.device)
    size = sum(t.numel() * t.element_size() for stored in (keys, values) for t in stored.tensors())
    return lambda: ragged_decode(query, keys, values, layout, seen, scaling=model.head_dim**-0.5), size
