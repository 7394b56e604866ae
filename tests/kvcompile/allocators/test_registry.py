"""An allocator from outside of the package: one call, and every way to name an allocator takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner

from kvcompile.allocators import ALLOCATORS, allocate, default_policy, register
from kvcompile.allocators.uniform import weighted
from kvcompile.artifacts import TargetError, read
from kvcompile.cli import cli
from kvcompile.compiler import resolve
from kvcompile.stages import Plan, Problem

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"


@dataclass(frozen=True)
class Toy:
    """Layers in proportion to their number."""

    policies: ClassVar[tuple[str, ...]] = ("scored", "recent")

    def __call__(self, problem: Problem) -> Plan:
        layers = np.arange(1.0, 1 + len(problem.limit))
        return weighted(problem, np.repeat(layers[:, None], problem.num_kv_heads, axis=1))


@pytest.fixture
def toy() -> Iterator[Toy]:
    register("toy", Toy())
    yield Toy()
    del ALLOCATORS["toy"]


def test_an_allocator_from_outside_solves(toy: Toy) -> None:
    assert default_policy("toy") == "scored"
    plan = resolve(read(REFERENCE), mem="25%", allocator="toy")
    tokens = plan.budgets.capacity[:, 0]
    np.testing.assert_allclose(tokens / tokens.sum(), np.arange(1, 31) / 465, atol=1e-3)
    assert plan.solver["allocator"] == "toy"
    with pytest.raises(TargetError, match="the allocator toy cannot work with the policy 'h2o'"):
        resolve(read(REFERENCE), mem="25%", allocator="toy", policy="h2o")


def test_the_command_line_takes_it_too(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "toy.kvb"
    build = ["build", "--from", str(REFERENCE), "--mem", "25%", "--allocator", "toy", "-o", str(out)]
    done = CliRunner().invoke(cli, build)
    assert done.exit_code == 0, done.output
    assert read(out).solver["allocator"] == "toy"
    refused = CliRunner().invoke(cli, [*build[:-3], "toys", "-o", str(out)])
    assert refused.exit_code == 2
    assert "'toys'" in refused.output


def test_a_taken_name_is_refused(toy: Toy, make_problem) -> None:
    register("toy", Toy())  # the same one
    for name in ("uniform", "file:x.json"):
        with pytest.raises(ValueError, match=f"the name '{name}' is taken"):
            register(name, Toy())
    assert ALLOCATORS["uniform"] != Toy()
    assert allocate("uniform", make_problem()).capacity.std() == 0


def test_after_it_is_gone_the_name_is_unknown(make_problem) -> None:
    with pytest.raises(TargetError, match="no allocator 'toy': expected one of optimal, uniform"):
        allocate("toy", make_problem())
