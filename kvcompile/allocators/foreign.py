"""Plans from what another system says of heads; `kvcompile.formats` reads its files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.duo import streaming_and_full
from kvcompile.allocators.predicted import predicted_loss
from kvcompile.allocators.rows import floors, limits, plan_bytes, rows
from kvcompile.allocators.uniform import weighted
from kvcompile.artifacts import ExchangeError, TargetError
from kvcompile.stages import Plan, Problem

ANY = ("scored", "recent", "snapkv", "h2o")


class Foreign(Protocol):
    """What a file says, as an allocator: `policies` that it can work with, its own first."""

    @property
    def policies(self) -> tuple[str, ...]: ...
    def __call__(self, problem: Problem) -> Plan:
        """Divide the target. Raises ExchangeError for another model's file, TargetError for a target it cannot meet."""
        ...


@dataclass(frozen=True)
class Importance:
    """The target's tokens are divided in proportion to `weights` [L, H], or [L, Hq] by query heads, of which a KV head
    takes the mean; `source` names the file."""

    source: str
    weights: NDArray[np.float64]
    policies: ClassVar[tuple[str, ...]] = ANY

    def __call__(self, problem: Problem) -> Plan:
        return weighted(problem, by_kv_head(self.weights, problem, self.source))


@dataclass(frozen=True)
class Gates:
    """DuoAttention (arXiv 2410.10819): heads whose gate [L, H] is above 0 are full, largest first, as many as the
    target holds; the others stream, `sink` first and `recent` last tokens."""

    source: str
    gates: NDArray[np.float64]
    sink: int
    recent: int
    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        gates = by_kv_head(self.gates, problem, self.source)
        return streaming_and_full(problem, gates, gates > 0, self.sink, self.recent)


@dataclass(frozen=True)
class Curves:
    """LU-KV (arXiv 2602.08585): shares of a head's tokens that are kept, [N, L, H] for N levels, of which the largest
    that the target holds is taken."""

    source: str
    kept: NDArray[np.float64]
    policies: ClassVar[tuple[str, ...]] = ANY

    def __call__(self, problem: Problem) -> Plan:
        fewest, most = floors(problem), limits(problem)
        kept = [by_kv_head(level, problem, self.source) for level in self.kept]
        tokens = [np.clip(np.rint(level * most), fewest, most).astype(np.int64) for level in kept]
        plans = [rows(problem, table) for table in sorted(tokens, key=lambda table: -int(table.sum()))]
        fitting = next((plan for plan in plans if plan_bytes(problem, plan) <= problem.target), None)
        if fitting is None:
            least = min(plan_bytes(problem, plan) for plan in plans)
            raise TargetError(
                f"the smallest level of {self.source} takes {least} bytes a sequence: ask for more memory"
            )
        return dataclasses.replace(fitting, loss=predicted_loss(problem, fitting))


@dataclass(frozen=True)
class Windows:
    """A window in tokens for every layer, [L], `sink` of them the first ones (None: the problem's), as they are."""

    source: str
    windows: NDArray[np.int64]
    sink: int | None
    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        if len(self.windows) != len(problem.limit):
            raise ExchangeError(f"{self.source} is for {len(self.windows)} layers: expected {len(problem.limit)}")
        problem = dataclasses.replace(problem, sink=problem.sink if self.sink is None else self.sink)
        tokens = np.clip(self.windows[:, None], floors(problem), limits(problem))
        plan = rows(problem, tokens)
        if (needed := plan_bytes(problem, plan)) > problem.target:
            raise TargetError(f"the windows of {self.source} take {needed} bytes a sequence: ask for as much memory")
        return dataclasses.replace(plan, loss=predicted_loss(problem, plan))


def by_kv_head(table: NDArray[np.float64], problem: Problem, source: str) -> NDArray[np.float64]:
    """A table [L, H], from one of KV heads or of query heads, whose groups are averaged. Where layers keep a window of
    their own, it may leave those out.

    Raises:
        ExchangeError: a table for a model of another shape.
    """
    layers, heads = len(problem.limit), problem.num_kv_heads
    if table.ndim == 2 and len(table) == int((~problem.fixed).sum()) < layers:
        whole = np.zeros((layers, table.shape[1]))
        whole[~problem.fixed] = table
        table = whole
    if table.ndim != 2 or len(table) != layers or table.shape[1] % heads:
        raise ExchangeError(
            f"{source} is for {' x '.join(map(str, table.shape))} layers and heads: expected {layers} x {heads}, or a "
            "multiple of the heads"
        )
    averaged: NDArray[np.float64] = table.reshape(layers, heads, -1).mean(-1)
    return averaged
