"""Launches go to the device of their tensors, whichever is the current one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, Transform
from kvcompile.kernels.dispatch import on_device

pytest.importorskip("triton")
from kvcompile.kernels.add_norm import triton as add_norm
from kvcompile.kernels.append import triton as append
from kvcompile.kernels.compact import triton as compact
from kvcompile.kernels.new_token import triton as new_token
from kvcompile.kernels.new_token.parts import LinearScorer
from kvcompile.kernels.ragged_decode import triton as ragged_decode
from kvcompile.kernels.restore import triton as restore
from kvcompile.kernels.silu_mul import triton as silu_mul

MODULES = [add_norm, append, compact, new_token, ragged_decode, restore, silu_mul]


def test_a_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    with on_device(torch.device("cpu")), on_device(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="looks into Triton's interpreter")
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    inside, launched = [], []

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    plain = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(executor.fn.__name__)
        assert inside == [torch.device("cpu")], f"{executor.fn.__name__} goes to the current device"
        return plain(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    for module in MODULES:
        monkeypatch.setattr(module, "on_device", entered)
    layout = LayerLayout.from_heads([HeadSpec("scored", 6, 1, 2, 8, 4)])
    keys, values = (Buffers(layout, [bits], 16, torch.float32, torch.device("cpu"), 1) for bits in (8, 4))
    eye, zero = torch.eye(16)[None], torch.zeros(1, 16)
    transform = Transform(eye, eye, zero, eye, eye, zero)
    one, scores = torch.randn(1, 1, 16), torch.zeros(1, 6, dtype=torch.float16)
    first = torch.zeros(1, 1, 1, dtype=torch.int64)
    compact.compact(keys, values, layout, one[:, :, None], one[:, :, None], [first], [1], transform)
    append.append(keys, values, scores, layout, one, one, torch.ones(1, 1), [1])
    scorer = LinearScorer(torch.ones(1, 8), torch.ones(1))
    rotary = torch.ones(1, 16), torch.zeros(1, 16)
    query = new_token.new_token(
        torch.randn(1, 48), *rotary, keys, values, scores, layout, [2], transform, None, torch.ones(1, 8), scorer
    )
    out = ragged_decode.ragged_decode(query, keys, values, layout, [3], 1.0, None, None, None)
    restore.restore(out, transform, layout)
    add_norm.add_norm(torch.ones(1, 8), None, torch.ones(8), 1e-5)
    silu_mul.silu_mul(torch.ones(1, 8))
    assert len(set(launched)) == len(MODULES)
