"""The ways to attend to a full cache with one token a sequence, to be compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a query [B, num_heads, 1, D] and keys and values [B, num_kv_heads, N, D] the output [B, num_heads, 1, D]."""


@dataclass(frozen=True)
class CacheShape:
    """A full cache of one layer."""

    batch: int
    heads: int
    context: int
    head_dim: int
    group: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.batch * self.heads * self.context * self.head_dim * self.dtype.itemsize


def grouped(shape: CacheShape) -> Attend:
    """torch's SDPA, with the queries of a group as the rows of one head: no key is read twice."""
    return lambda query, keys, values: _rows(scaled_dot_product_attention, query, keys, values)


def _backend(name: str) -> Callable[[CacheShape], Attend]:
    """The same with one of SDPA's backends, as its own choice need not be the fastest."""

    def make(shape: CacheShape) -> Attend:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(getattr(SDPBackend, name)):
                return _rows(scaled_dot_product_attention, query, keys, values)

        return attend

    return make


def enable_gqa(shape: CacheShape) -> Attend:
    """torch's SDPA, told that heads share keys."""
    return lambda query, keys, values: scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def flex(shape: CacheShape) -> Attend:
    """torch's flex attention, compiled, with the queries of a group as rows."""
    from torch.nn.attention.flex_attention import flex_attention

    # On a CPU, where it is only tried out, the compiler is not worth its time.
    compiled: Any = torch.compile(flex_attention, dynamic=False) if shape.device.type == "cuda" else flex_attention
    return lambda query, keys, values: _rows(compiled, query, keys, values)


def flashinfer(shape: CacheShape) -> Attend:
    """FlashInfer's paged decoding, with every head as a request: a full cache is a row of pages as it lies."""
    from kvcompile.bench.flashinfer import PAGE, paged

    run = paged([shape.context] * (shape.batch * shape.heads), shape.group, shape.head_dim, shape.dtype, shape.device)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        pages = tuple(side.view(-1, 1, PAGE, shape.head_dim) for side in (keys, values))
        rows = query.reshape(shape.batch * shape.heads, shape.group, shape.head_dim)
        out: torch.Tensor = run(rows, pages)
        return out.view(query.shape)

    return attend


def _rows(attention: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = attention(query.reshape(len(query), keys.shape[1], -1, query.shape[-1]), keys, values)
    return out.reshape(query.shape)


PLAIN = "torch SDPA, groups as rows"
COMPILED = "flex attention"


def ways(device: torch.device) -> dict[str, Callable[[CacheShape], Attend]]:
    """What can be tried on the device, by name. What a machine lacks fails when it is first called."""
    found: dict[str, Callable[[CacheShape], Attend]] = {PLAIN: grouped, "torch SDPA, enable_gqa": enable_gqa}
    if device.type == "cuda":
        found["torch SDPA, flash"] = _backend("FLASH_ATTENTION")
        found["torch SDPA, cuDNN"] = _backend("CUDNN_ATTENTION")
        found[COMPILED] = flex
        if importlib.util.find_spec("flashinfer") is not None:
            found["FlashInfer"] = flashinfer
    return found
