"""What is compiled before the first launch is what is then launched; in Triton's interpreter, which only notes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model

from kvcompile.kernels.codecs import names
from kvcompile.kernels.dispatch import CHOICE
from kvcompile.runtime import Decoder, attach
from kvcompile.runtime.compiled import compile_cuts
from kvcompile.runtime.fused import FusedStep

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a GPU, where Triton compiles", allow_module_level=True)
from triton.runtime.interpreter import InterpretedFunction

Variant = tuple[str, tuple[Any, ...], tuple[Any, ...]]
"""A kernel by its name, its constants and options, and what Triton looks at in its arguments."""
BITS = [(32, 32), (8, 4), (66, 2), (4, 4), (67, 3), (8, 8)]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> tuple[set[Variant], set[Variant]]:
    """The kernels that were compiled, and those that were launched."""
    compiled, launched = set[Variant](), set[Variant]()
    run = InterpretedFunction.run

    def looks_at(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        names = zip(kernel.arg_names, arguments, strict=False)
        same = kernel.kwargs.get("do_not_specialize") or ()
        found: list[Any] = []
        for name, value in names:
            if isinstance(value, torch.Tensor):
                found.append((value.dtype, value.data_ptr() % 16 == 0))
            elif isinstance(value, int) and name not in same:
                found.append((value == 1, value % 16 == 0))
            else:
                found.append(type(value))
        return tuple(found)

    def noting(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        variant = (self.fn.__name__, tuple(sorted(options.items())), looks_at(self, arguments))
        (compiled if warmup else launched).add(variant)
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noting)
    monkeypatch.setenv(CHOICE, "triton")
    return compiled, launched


@torch.inference_mode()
def test_all_that_is_launched_was_compiled(
    make_artifact: Callable[..., Any], noted: tuple[set[Variant], set[Variant]]
) -> None:
    compiled, launched = noted
    model = tiny_model(CONFIGS["qwen3"])
    with attach(model, make_artifact(model, capacity=8, policy="scored", recent=3, bits=BITS)) as kv:
        cache = kv.new_cache(2)
        before = [tensor.clone() for tensor in cache.tensors()]
        compile_cuts(cache, model.dtype)
        step = FusedStep(model)
        step.compile(cache)
        assert not launched
        assert all(torch.equal(one, two) for one, two in zip(before, cache.tensors(), strict=True))
        names = {"_compact", "_new_token", "_decode", "_restore", "_add_norm", "_silu_mul"}
        assert {name for name, *_ in compiled} == names

        ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
        Decoder(model, cache).prefill(ids)
        step(ids[:, :1], torch.full((2, 1), 12), cache)
        assert {name for name, *_ in launched} == names
        assert launched <= compiled

        again = kv.new_cache(2)
        compiled.clear()
        step.compile(again)
        compile_cuts(again, model.dtype)
        assert not compiled, "caches alike share what was compiled"


@torch.inference_mode()
def test_layers_that_go_through_torch_are_left_alone(
    make_artifact: Callable[..., Any], noted: tuple[set[Variant], set[Variant]]
) -> None:
    """It would write where Triton only compiles."""
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, capacity=8, recent=3, bits=[(names()["fp8"],) * 2])
    with attach(model, artifact) as kv:
        cache = kv.new_cache()
        ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0))
        Decoder(model, cache).prefill(ids)
        before = [tensor.clone() for tensor in cache.tensors()]
        compile_cuts(cache, torch.float16)
        FusedStep(model).compile(cache)
        assert all(torch.equal(one, two) for one, two in zip(before, cache.tensors(), strict=True))
