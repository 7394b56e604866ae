"""FlashInfer where it is installed: ragged heads as requests of their own (batch x heads, one KV head each)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from kvcompile.artifacts import ModelIdentity
from kvcompile.bench.subjects import ragged_plan

PAGE = 16


def flashinfer_calls(
    model: ModelIdentity,
    context: int,
    batch: int,
    share: float,
    dtype: str,
    query: torch.Tensor,
) -> dict[str, tuple[Callable[[], Any], int]]:
    """Calls and the bytes they read, for the full cache and for the ragged one; none where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    plan = ragged_plan(model, context, batch, share, dtype, "16")
    capacity = plan.budgets.capacity[model.num_layers // 2].tolist()
    found = {}
    for name, lengths in (("full: FlashInfer", [context] * len(capacity)), ("ragged: FlashInfer", capacity)):
        found[name] = _decode(model, lengths * batch, query)
    return found


def _decode(model: ModelIdentity, lengths: list[int], query: torch.Tensor) -> tuple[Callable[[], Any], int]:
    import flashinfer

    device, head_dim = query.device, model.head_dim
    pages = [-(-length // PAGE) for length in lengths]
    starts = torch.tensor([0, *pages], device=device).cumsum(0).int()
    indices = torch.arange(sum(pages), dtype=torch.int32, device=device)
    last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths], dtype=torch.int32, device=device)
    held = torch.randn(sum(pages), 2, PAGE, 1, head_dim, dtype=query.dtype, device=device)
    group = model.num_attention_heads // model.num_kv_heads
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=True
    )
    kinds = {"q_data_type": query.dtype, "kv_data_type": query.dtype}
    wrapper.plan(starts, indices, last, group, 1, head_dim, PAGE, **kinds)
    rows = query.view(len(lengths), group, head_dim)
    return lambda: wrapper.run(rows, held), sum(lengths) * 2 * head_dim * query.element_size()
