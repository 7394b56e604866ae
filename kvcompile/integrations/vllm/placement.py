"""Tensor parallelism: heads brought into the order in which an engine deals them out to its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvcompile.artifacts import DTYPE_BITS, Artifact, ModelError
from kvcompile.artifacts.shapes import shape_of
from kvcompile.integrations.vllm.structure import empty_model
from kvcompile.runtime.parts import attention_modules
from kvcompile.runtime.reorder import ARCHITECTURES
from kvcompile.runtime.tensor_parallel import placed_on

UNPLACED = "give an unquantised checkpoint of the artifact's model, or build the artifact without --tp"
"""What to do with a checkpoint whose heads cannot be moved: the end of a sentence."""


class Cut(NamedTuple):
    """The dimension that the heads of a tensor lie along, and the order i64 to bring its elements into."""

    dim: int
    order: torch.Tensor


def head_orders(artifact: Artifact, ranks: int) -> list[list[int]] | None:
    """For each layer the model's KV heads in the order of their ranks, those of one rank by number: of N ranks, r finds
    its own where an engine looks for them, at the places [r * H / N, (r + 1) * H / N).

    None where the artifact has no placement on so many ranks.
    """
    if artifact.rank is None or not placed_on(artifact, ranks):
        return None
    orders: list[list[int]] = np.argsort(artifact.rank, axis=1, kind="stable").tolist()
    return orders


def placed(
    weights: Iterable[tuple[str, torch.Tensor]], orders: Sequence[Sequence[int]], config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, by transformers' names, with the heads of every layer in the order of `orders`: KV
    head `orders[l][i]` and its group of query heads at place i. One at a time, as they come; others pass untouched.

    Args:
        config: the checkpoint's transformers configuration.

    Raises:
        ModelError: while iterating; an unsupported architecture, tensors of packed or quantised projections, and, at
            the end, a projection that has not come.
    """
    cuts, known = _cuts(orders, config)
    projections = {_module(name) for name in cuts}
    missing = set(cuts)
    for name, tensor in weights:
        if name in cuts:
            missing.discard(name)
            yield name, _moved(name, tensor, cuts[name])
        elif name not in known and _module(name) in projections:
            raise ModelError(f"cannot place the heads of the quantised projection that {name} belongs to: {UNPLACED}")
        else:
            yield name, tensor
    if missing:
        raise ModelError(f"the checkpoint has no {min(missing)}, whose heads the artifact places: {UNPLACED}")


def _cuts(orders: Sequence[Sequence[int]], config: Any) -> tuple[dict[str, Cut], set[str]]:
    """The tensors that heads lie along, by name, and the names of all tensors of the model."""
    shape = shape_of(config, "the checkpoint")
    architecture, head_dim = shape["architecture"], shape["head_dim"]
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"cannot reorder the heads of a {architecture!r} model, expected one of {', '.join(ARCHITECTURES)}"
        )
    model = empty_model(config)
    tensors = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in tensors.items()}
    group = shape["num_attention_heads"] // shape["num_kv_heads"]
    cuts: dict[str, Cut] = {}
    for module, order in zip(attention_modules(model), orders, strict=True):
        # The query heads of a group are neighbours, and move as one.
        q, kv = _elements(order, group * head_dim), _elements(order, head_dim)
        for weight, dim, index in ARCHITECTURES[architecture](module, q, kv):
            cuts[names[id(weight)]] = Cut(dim, index)
    return cuts, set(tensors)


def _moved(name: str, tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BITS or tensor.ndim <= cut.dim or tensor.shape[cut.dim] != len(cut.order):
        raise ModelError(f"cannot place the heads of {name}, {dtype} of shape {list(tensor.shape)}: {UNPLACED}")
    return tensor.index_select(cut.dim, cut.order.to(tensor.device))


def _elements(heads: Sequence[int], size: int) -> torch.Tensor:
    """The elements of heads of `size` elements each, head by head."""
    return (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()


def _module(name: str) -> str:
    return name.rpartition(".")[0]
