"""Permuting a model's heads, in place, so that its keys and values come out in storage order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from kvcompile.artifacts import ModelError
from kvcompile.runtime.tensor_parallel import permute

Cut = tuple[torch.Tensor, int, torch.Tensor]
"""A weight, the dimension its heads lie along, and the order to bring that dimension into."""


def split_projections(attention: nn.Module, q: torch.Tensor, kv: torch.Tensor) -> Iterator[Cut]:
    """`q_proj`, `k_proj`, `v_proj` (None where values come from the keys' product, and both are missing where another
    layer's keys and values are attended to), `o_proj`. Norms on queries and keys act on one head at a time and stay."""
    for name, index in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        if (projection := getattr(attention, name, None)) is not None:
            yield from _rows(projection, index)
    yield attention.get_submodule("o_proj").weight, 1, q


def normed_projections(attention: nn.Module, q: torch.Tensor, kv: torch.Tensor) -> Iterator[Cut]:
    """The same with norms over the queries and the keys of all heads together, `q_norm` and `k_norm`: their sums run
    over the heads in another order then."""
    yield from split_projections(attention, q, kv)
    for name, index in (("q_norm", q), ("k_norm", kv)):
        yield attention.get_submodule(name).weight, 0, index


def gated_projections(attention: nn.Module, q: torch.Tensor, kv: torch.Tensor) -> Iterator[Cut]:
    """The same with a gate for every query head, whose rows in `q_proj` follow the head's own."""
    output = attention.get_submodule("o_proj").weight
    gated = attention.get_submodule("q_proj")
    size = 2 * int(attention.head_dim)  # type: ignore[arg-type]
    heads = q[:: size // 2] // (size // 2)
    yield from _rows(gated, _elements(heads, size))
    for name in ("k_proj", "v_proj"):
        yield from _rows(attention.get_submodule(name), kv)
    yield output, 1, q


def projections_with_sinks(attention: nn.Module, q: torch.Tensor, kv: torch.Tensor) -> Iterator[Cut]:
    """The same with `sinks`, a learned logit for every query head."""
    yield from split_projections(attention, q, kv)
    sinks: torch.Tensor = attention.get_parameter("sinks")
    head_dim = len(q) // len(sinks)
    yield sinks, 0, q[::head_dim] // head_dim


def fused_projection(attention: nn.Module, q: torch.Tensor, kv: torch.Tensor) -> Iterator[Cut]:
    """`qkv_proj`, whose rows are all queries, then all keys, then all values, and `o_proj`."""
    rows = torch.cat([q, kv + len(q), kv + len(q) + len(kv)])
    yield from _rows(attention.get_submodule("qkv_proj"), rows)
    yield attention.get_submodule("o_proj").weight, 1, q


def _rows(projection: nn.Module, index: torch.Tensor) -> Iterator[Cut]:
    yield projection.weight, 0, index
    if projection.bias is not None:
        yield projection.bias, 0, index


ARCHITECTURES: dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor], Iterator[Cut]]] = {
    "gemma2": split_projections,
    "gemma3_text": split_projections,
    "gemma4_text": split_projections,
    "gemma4_unified_text": split_projections,
    "gpt_oss": projections_with_sinks,
    "granite": split_projections,
    "llama": split_projections,
    "llama4_text": split_projections,
    "mistral": split_projections,
    "mixtral": split_projections,
    "olmo2": normed_projections,
    "olmo3": normed_projections,
    "phi3": fused_projection,
    "qwen2": split_projections,
    "qwen3": split_projections,
    "qwen3_moe": split_projections,
    "qwen3_5_moe_text": gated_projections,
    "qwen3_5_text": gated_projections,
    "qwen3_next": gated_projections,
    "smollm3": split_projections,
}


def register(architecture: str, cuts: Callable[[nn.Module, torch.Tensor, torch.Tensor], Iterator[Cut]]) -> None:
    """Add a family from outside of the package: `architecture` is the `model_type` of its configuration, `cuts` says
    along which dimensions of an attention module's weights its heads lie (`split_projections` fits most)."""
    ARCHITECTURES[architecture] = cuts


def permute_heads(architecture: str, attention: nn.Module, order: Sequence[int], num_heads: int, head_dim: int) -> None:
    """Bring KV head `order[i]` and its group of query heads to place i. Exact: numbers move and do not change.

    Raises:
        ModelError: an architecture without an entry in `ARCHITECTURES`, or weights that are packed or not loaded.
    """
    heads = torch.tensor(order, device="cpu")
    group = num_heads // len(heads)
    query_heads = (heads[:, None] * group + torch.arange(group, device="cpu")).flatten()
    q, kv = _elements(query_heads, head_dim), _elements(heads, head_dim)
    cuts = list(ARCHITECTURES[architecture](attention, q, kv))
    for weight, dim, index in cuts:
        if not weight.is_floating_point() or weight.is_meta or weight.shape[dim] != len(index):
            raise ModelError(
                f"cannot reorder heads in a {weight.dtype} weight of shape {tuple(weight.shape)} on {weight.device}: "
                "load the model with unpacked floating-point weights"
            )
    moved: list[Cut] = []
    with torch.no_grad():
        try:
            for cut in cuts:
                permute(*cut)
                moved.append(cut)
        except BaseException:  # memory for a copy may have run out
            for weight, dim, index in moved:
                permute(weight, dim, index.argsort())
            raise


def inverse(order: Sequence[int]) -> list[int]:
    """The order that undoes `order`."""
    return torch.tensor(order, device="cpu").argsort().tolist()


def _elements(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim, device="cpu")).flatten()
