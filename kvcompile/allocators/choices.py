"""Every choice that a head has: policy x tokens x key bits x value bits, with its bytes and losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.predicted import evicted, grid, quantised
from kvcompile.artifacts import POLICIES
from kvcompile.stages import Plan, Problem


@dataclass(frozen=True)
class Choices:
    """N heads with X choices each, in the order (share, tokens, key bits, value bits).

    `heads` i64 [N, 2]: layer and KV head. `tokens` i64 [T] and `shape` = (P, T, Wk, Wv) unravel a choice. `size` i64
    [X] bytes; `loss` float64 [F, N, X] nats a token.
    """

    heads: NDArray[np.int64]
    tokens: NDArray[np.int64]
    shape: tuple[int, int, int, int]
    size: NDArray[np.int64]
    loss: NDArray[np.float64]

    def unravel(self, choice: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Share, tokens (not their place), key bits and value bits of choices, the last two as places."""
        share, place, k, v = np.unravel_index(choice, self.shape)
        return share, self.tokens[place], k, v


def choices(problem: Problem) -> Choices:
    """All choices of all heads that are not bound to their own window."""
    active = np.flatnonzero(~problem.fixed)
    heads = np.array([(layer, h) for layer in active for h in range(problem.num_kv_heads)], np.int64).reshape(-1, 2)
    floor, limit = min(problem.sink + 1, problem.context), problem.context
    around = np.concatenate([np.floor(grid(problem)), np.ceil(grid(problem)), [floor, limit]])
    tokens = np.unique(np.clip(around, floor, limit)).astype(np.int64)
    loss = evicted(problem, tokens)[:, heads[:, 0], heads[:, 1]][..., None, None]
    keys = quantised(problem, "key", tokens)[:, heads[:, 0], heads[:, 1]][:, :, None, :, :, None]
    values = quantised(problem, "value", tokens)[:, heads[:, 0], heads[:, 1]][:, :, None, :, None, :]
    table = loss + keys + values
    slots = np.array(
        [
            [[problem.slot_bytes(policy_of(problem, p), k, v) for v in problem.value_bits] for k in problem.key_bits]
            for p in range(len(problem.profile.shares))
        ]
    )
    anchors = np.array([[problem.anchor_bytes(k, v) for v in problem.value_bits] for k in problem.key_bits])
    # A single token is the newest one, so the head has no sink and with that no exact copy of it.
    size = slots[:, None] * tokens[:, None, None] + anchors * (tokens > 1)[:, None, None]
    shape = (size.shape[0], size.shape[1], size.shape[2], size.shape[3])
    return Choices(heads, tokens, shape, size.ravel(), table.reshape(*table.shape[:2], -1))


def policy_of(problem: Problem, share: int) -> str:
    """The policy of a curve: `recent` where all of the budget is a ring."""
    return "recent" if problem.profile.shares[share] >= 1 else "scored"


def assigned(
    problem: Problem,
    base: Plan,
    heads: NDArray[np.int64],
    share: NDArray[np.int64],
    tokens: NDArray[np.int64],
    k: NDArray[np.int64],
    v: NDArray[np.int64],
) -> Plan:
    """`base` with the rows of `heads` [N, 2] replaced by the choices given, [N] each."""
    at = heads[:, 0], heads[:, 1]
    part = problem.profile.shares[share].astype(np.float64)
    full = tokens >= problem.limit[heads[:, 0]]
    sink = np.minimum(problem.sink, tokens - 1)
    ring = np.clip(np.rint(part * (tokens - sink)), 1, tokens - sink).astype(np.int64)
    code = np.where(
        full, POLICIES.index("full"), np.where(part >= 1, POLICIES.index("recent"), POLICIES.index("scored"))
    )
    tables = {name: getattr(base, name).copy() for name in ("policy", "capacity", "sink", "recent", "k_bits", "v_bits")}
    for name, values in (
        ("policy", code), ("capacity", tokens), ("sink", sink), ("recent", np.where(full, tokens - sink, ring)),
        ("k_bits", np.array(problem.key_bits)[k]), ("v_bits", np.array(problem.value_bits)[v]),
    ):  # fmt: skip
        tables[name][at] = values
    return Plan(**tables, loss=float("nan"))
