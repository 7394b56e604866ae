"""One process is alone: nothing is exchanged, and all is its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvcompile.artifacts.errors import ModelError
from kvcompile.profile import Ranks, ranks, together
from kvcompile.profile.ranks import dist


def test_one_process_owns_everything() -> None:
    with together() as alone:
        assert alone == ranks() == Ranks(0, 1)
    acts: list[int] = []
    alone.first(lambda: acts.append(1))
    assert (alone.gather("x"), alone.of(3, "y"), acts) == (["x"], "y", [1])
    assert all(alone.owns(number) for number in range(5))


def test_every_number_has_one_owner() -> None:
    for number in range(7):
        assert sum(Ranks(rank, 3).owns(number) for rank in range(3)) == 1


def test_a_lost_process_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_gather_object", lost)
    with pytest.raises(ModelError, match="another process of this build was lost: start the build again"):
        Ranks(0, 2).gather(1)


PROGRAM = """
from kvcompile.profile import together
with together() as ranks:
    assert ranks.gather(ranks.rank) == [0, 1, 2]
    assert [ranks.of(number, ranks.rank) for number in range(5)] == [0, 1, 2, 0, 1]
    ranks.first(lambda: print("first", ranks.rank))
"""


def test_three_processes_tell_each_other() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", "29531"]
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["first", "0"]
