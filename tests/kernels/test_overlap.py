"""Launches overlap on GPUs that can."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kvcompile.kernels.overlap import overlap


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((12, 0), True)], ids=str)
def test_from_hopper_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = overlap.__wrapped__(torch.device("cuda", 3))
    assert found == ({"OVERLAP": True, "launch_pdl": True} if expected else {"OVERLAP": False})


def test_not_on_a_cpu() -> None:
    assert overlap(torch.device("cpu")) == {"OVERLAP": False}
