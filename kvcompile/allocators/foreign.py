"""Allocators from what another system's file says of heads (`kvcompile.formats`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.base import Allocator
from kvcompile.allocators.duo import streaming_and_full
from kvcompile.allocators.predicted import predicted_loss
from kvcompile.allocators.rows import floors, limits, plan_bytes, rows
from kvcompile.allocators.uniform import weighted
from kvcompile.artifacts import ExchangeError, TargetError
from kvcompile.formats import Curves, Gates, Importance, Value, Windows
from kvcompile.stages import Plan, Problem

ANY = ("scored", "recent", "snapkv", "h2o")


@dataclass(frozen=True)
class ByImportance:
    """The target's tokens are divided in proportion to the heads' weights."""

    value: Importance
    policies: ClassVar[tuple[str, ...]] = ANY

    def __call__(self, problem: Problem) -> Plan:
        return weighted(problem, by_kv_head(self.value.weights, problem, self.value.source))


@dataclass(frozen=True)
class ByGates:
    """DuoAttention (arXiv 2410.10819): heads whose gate is above 0 are full, largest first, as many as the target
    holds; the others stream."""

    value: Gates
    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        gates = by_kv_head(self.value.gates, problem, self.value.source)
        return streaming_and_full(problem, gates, gates > 0, self.value.sink, self.value.recent)


@dataclass(frozen=True)
class ByCurves:
    """LU-KV (arXiv 2602.08585): the largest level that the target holds."""

    value: Curves
    policies: ClassVar[tuple[str, ...]] = ANY

    def __call__(self, problem: Problem) -> Plan:
        fewest, most = floors(problem), limits(problem)
        kept = [by_kv_head(level, problem, self.value.source) for level in self.value.kept]
        tokens = [np.clip(np.rint(level * most), fewest, most).astype(np.int64) for level in kept]
        plans = [rows(problem, table) for table in sorted(tokens, key=lambda table: -int(table.sum()))]
        fitting = next((plan for plan in plans if plan_bytes(problem, plan) <= problem.target), None)
        if fitting is None:
            least = min(plan_bytes(problem, plan) for plan in plans)
            raise TargetError(
                f"the smallest level of {self.value.source} takes {least} bytes a sequence: ask for more memory"
            )
        return dataclasses.replace(fitting, loss=predicted_loss(problem, fitting))


@dataclass(frozen=True)
class ByWindows:
    """Every head of a layer keeps the layer's window, whatever that takes, with the problem's sinks where the file says
    none."""

    value: Windows
    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        source, windows, sink = self.value.source, self.value.windows, self.value.sink
        if len(windows) != len(problem.limit):
            raise ExchangeError(f"{source} is for {len(windows)} layers: expected {len(problem.limit)}")
        problem = dataclasses.replace(problem, sink=problem.sink if sink is None else sink)
        plan = rows(problem, np.clip(windows[:, None], floors(problem), limits(problem)))
        if (needed := plan_bytes(problem, plan)) > problem.target:
            raise TargetError(f"the windows of {source} take {needed} bytes a sequence: ask for as much memory")
        return dataclasses.replace(plan, loss=predicted_loss(problem, plan))


KINDS: dict[type[Value], Callable[[Any], Allocator]] = {
    Importance: ByImportance,
    Gates: ByGates,
    Curves: ByCurves,
    Windows: ByWindows,
}


def following(value: Value) -> Allocator:
    """The allocator that does what a file says; its plans raise ExchangeError where that is for another model."""
    return KINDS[type(value)](value)


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
