"""Placing the KV heads of every layer on tensor-parallel ranks, so that all carry nearly the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from kvcompile.artifacts import TargetError

GAP = 1e-3
"""How far the fullest rank may be from the smallest possible one, relative to itself."""
NODES = 200
"""Branch-and-bound nodes for one layer: the same heads have to be placed the same way on any machine."""


@dataclass(frozen=True)
class Placement:
    """`rank` i32 [L, H]; `load` i64 [L, N] bytes of every rank in every layer."""

    rank: NDArray[np.int32]
    load: NDArray[np.int64]

    def report(self) -> dict[str, float]:
        """The fullest rank over the mean: of the worst layer, and of the whole model."""
        mean = np.maximum(self.load.mean(axis=1), 1)
        total = self.load.sum(axis=0)
        return {
            "ranks": self.load.shape[1],
            "layer_imbalance": float((self.load.max(axis=1) / mean).max()),
            "total_imbalance": float(total.max() / max(total.mean(), 1)),
        }


def place(size: NDArray[np.int64], ranks: int) -> Placement:
    """Place heads of `size` [L, H] bytes on `ranks` ranks, H / ranks heads of every layer on each.

    In each layer the fullest rank is made as small as can be (`scipy.optimize.milp`); which group of heads goes to
    which rank then evens out the ranks' totals, the fullest group to the emptiest rank.

    Raises:
        TargetError: heads that do not divide evenly.
    """
    num_layers, num_kv_heads = size.shape
    if ranks < 1 or num_kv_heads % ranks:
        raise TargetError(f"{num_kv_heads} KV heads do not divide among {ranks} ranks: expected a divisor with --tp")
    rank = np.zeros(size.shape, np.int32)
    total = np.zeros(ranks, np.int64)
    load = np.zeros((num_layers, ranks), np.int64)
    for layer in range(num_layers):
        group = _groups(size[layer], ranks)
        weight = np.bincount(group, size[layer].astype(np.float64), ranks).astype(np.int64)
        emptiest = np.argsort(total, kind="stable")
        to = np.empty(ranks, np.int64)
        to[np.argsort(-weight, kind="stable")] = emptiest
        rank[layer] = to[group]
        load[layer, to] = weight
        total += load[layer]
    return Placement(rank, load)


def _groups(size: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """The group [H] of each head, groups of equal number, with the least possible largest sum."""
    count = len(size)
    if ranks == 1 or ranks == count:
        return np.arange(count) % ranks
    scale = max(int(size.sum()), 1)
    # Variables: head h in group g, row by row, then the largest sum.
    every = np.arange(count * ranks)
    head, group = every // ranks, every % ranks
    one_each = coo_array((np.ones(len(every)), (head, every)), shape=(count, len(every) + 1))
    equal = coo_array((np.ones(len(every)), (group, every)), shape=(ranks, len(every) + 1))
    rows = np.append(group, np.arange(ranks))
    columns = np.append(every, np.full(ranks, len(every)))
    bytes_in = np.append(size[head] / scale, np.full(ranks, -1.0))
    below = coo_array((bytes_in, (rows, columns)), shape=(ranks, len(every) + 1))
    answer = milp(
        np.append(np.zeros(len(every)), 1.0),
        constraints=[
            LinearConstraint(one_each.tocsr(), 1, 1),
            LinearConstraint(equal.tocsr(), count // ranks, count // ranks),
            LinearConstraint(below.tocsr(), -np.inf, 0),
        ],
        integrality=np.append(np.ones(len(every)), 0),
        bounds=Bounds(0, np.append(np.ones(len(every)), np.inf)),
        options={"node_limit": NODES, "mip_rel_gap": GAP},
    )
    if answer.x is None:  # largest first, always to the lightest group with room
        return _greedy(size, ranks)
    return np.asarray(answer.x[:-1].reshape(count, ranks).argmax(axis=1))


def _greedy(size: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    group, total, room = np.zeros(len(size), np.int64), np.zeros(ranks), np.full(ranks, len(size) // ranks)
    for head in np.argsort(-size, kind="stable"):
        g = int(np.where(room > 0, total, np.inf).argmin())
        group[head], total[g], room[g] = g, total[g] + size[head], room[g] - 1
    return group
