"""FlashInfer where it is installed: heads as requests of their own (batch x heads, one KV head each)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvcompile.artifacts import Artifact
from kvcompile.bench.timing import stores_for

PAGE = 16
"""Tokens of a page."""
WORKSPACE = 256 << 20


def paged(lengths: Sequence[int], group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A call of queries [requests, group, D] and pages (keys, values), each [pages, 1, PAGE, D], for requests of these
    lengths that lie end to end, each beginning on a page."""
    import flashinfer

    pages = [-(-length // PAGE) for length in lengths]
    starts = torch.tensor([0, *pages]).cumsum(0).int().to(device)
    indices = torch.arange(sum(pages), dtype=torch.int32, device=device)
    last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths], dtype=torch.int32, device=device)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(starts, indices, last, group, 1, head_dim, PAGE, q_data_type=dtype, kv_data_type=dtype)
    return wrapper.run


def ragged_calls(plan: Artifact, query: torch.Tensor) -> tuple[list[Callable[[], Any]], int] | None:
    """Attention over the budgets of the plan's middle layer, all in the cache dtype, and the bytes it reads; None where
    FlashInfer is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    model, batch = plan.model, plan.target.batch
    lengths = plan.budgets.capacity[model.num_layers // 2].tolist() * batch
    group = model.num_attention_heads // model.num_kv_heads
    run = paged(lengths, group, model.head_dim, query.dtype, query.device)
    size = sum(lengths) * 2 * model.head_dim * query.element_size()
    rows = query.reshape(len(lengths), group, model.head_dim)
    shape = (sum(-(-length // PAGE) for length in lengths), 1, PAGE, model.head_dim)

    def call() -> Callable[[], Any]:
        held = tuple(torch.randn(shape, dtype=query.dtype, device=query.device) for _ in range(2))
        return lambda: run(rows, held)

    return [call() for _ in range(stores_for(size, query.device))], size
