"""What is left of a memory, and whether a model fits into it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from checkpoints import saved, streamed
from tiny_models import CONFIGS, tiny_model

from kvcompile.models.room import PROGRAM, fits, free_bytes, room, weight_bytes, working

CPU = torch.device("cpu")
SUBJECT = importlib.import_module("kvcompile.models.room")


def test_what_is_free_is_less_than_there_is() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < free_bytes(CPU) < 1024 * int(total.split()[1])


def test_a_control_group_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SUBJECT, "_group_room", lambda: 1000)
    assert free_bytes(CPU) == 1000


def test_weights_are_counted_as_they_are_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SUBJECT, "fast_dtype", lambda *_: torch.float32)
    assert weight_bytes(10, torch.bfloat16, CPU) == 40


def test_states_get_what_weights_and_a_step_leave(tmp_path: Path) -> None:
    whole = tiny_model(CONFIGS["llama"])
    parts = streamed(saved(whole, tmp_path))
    work = working(whole.config, 2 * 100, 4)
    weights = sum(p.numel() * 4 for p in whole.parameters())
    total = PROGRAM + work + weights + 5000
    beside = sum(b.numel() * b.element_size() for b in whole.buffers())
    assert room(whole, CPU, total, 100).host == 5000 - beside
    largest = max(sum(p.numel() * 4 for p in part.parameters()) for part in whole.model.layers)
    assert room(parts, CPU, total, 100).host == 5000 + weights - largest
    assert room(parts, CPU, PROGRAM, 100).host == 0
    assert fits(weights, whole.config, 4, CPU, total, 100)
    assert not fits(weights, whole.config, 4, CPU, total - 5001, 100)


def test_half_of_what_is_free_is_for_memory_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SUBJECT, "free_bytes", lambda _: 10**9)
    whole = tiny_model(CONFIGS["llama"])
    parts = streamed(saved(whole, tmp_path))
    held, one_by_one = room(whole, CPU, None, 100), room(parts, CPU, None, 100)
    assert held.ample
    assert not one_by_one.ample
    assert not room(whole, CPU, PROGRAM, 100).ample
    assert held.host == (int(0.9 * 10**9) - working(whole.config, 200, 4)) // 2 < one_by_one.host
