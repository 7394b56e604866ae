"""A decode step in few launches: what the model says, with its own weights, and how many launches it takes."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.runtime import attach
from kvcompile.runtime.fused import FusedStep, fusable

OTHERS = (
    "gemma3", "llama4", "mixtral", "qwen3-moe", "granite", "gemma2", "gemma4", "gemma4-shared", "gemma4-unified",
    "gpt-oss", "olmo2", "olmo3", "qwen3-next", "qwen3.5", "qwen3.5-moe",
)  # fmt: skip
KNOWN = [name for name in CONFIGS if name not in OTHERS]
BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "quantised"])
@pytest.mark.parametrize(("family", "kernels"), [*((name, "torch") for name in KNOWN), ("qwen3", "triton")])
@torch.inference_mode()
def test_logits_are_the_models(
    family: str, bits: Any, kernels: str, make_artifact: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences, one of them shorter, and more tokens than the budgets hold."""
    if kernels == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("there is a GPU, so Triton compiles for it and takes no tensors of a CPU")
    model = tiny_model(CONFIGS[family])
    ids, real = prompt(15, 3), torch.ones(3, 15, dtype=torch.int64)
    real[1, :4] = 0
    with attach(model, make_artifact(model, capacity=18, policy="scored", recent=3, bits=bits)) as kv:
        caches = [kv.new_cache(3) for _ in range(2)]
        for cache in caches:
            model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        assert fusable(model, caches[0])
        step = FusedStep(model)
        position = real.sum(1, keepdim=True)
        monkeypatch.setenv("KVCOMPILE_KERNELS", kernels)
        for i in range(6 if kernels == "torch" else 2):
            token = prompt(20 + i, 3)[:, :1]
            ours = step(token, position + i, caches[0])
            theirs = model(token, position_ids=position + i, past_key_values=caches[1]).logits[:, -1]
            torch.testing.assert_close(ours, theirs, atol=2e-3 if bits else 1e-4, rtol=1e-3)
        assert caches[0].counts() == caches[1].counts()


def test_caches_of_other_attachments_go_through_the_model(make_artifact: Callable[..., Any]) -> None:
    """Which refuses them."""
    model = tiny_model(CONFIGS["llama"])
    with attach(model, make_artifact(model, capacity=18)) as kv:
        cache = kv.new_cache()
        assert fusable(model, cache)
    assert not fusable(model, cache)
    with attach(model, make_artifact(model, capacity=20)) as kv:
        assert not fusable(model, cache)
        assert fusable(model, kv.new_cache())


def test_an_attachment_that_ends_leaves_no_weights_behind(make_artifact: Callable[..., Any]) -> None:
    """What a step has joined is gone, whoever still has the step."""
    model = tiny_model(CONFIGS["llama"])
    with attach(model, make_artifact(model, capacity=18)):
        step = FusedStep(model)
        held = weakref.ref(step._layers[0].qkv[0])
        assert held() is not None
    assert held() is None
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_go_through_the_model(family: str, make_artifact: Callable[..., Any]) -> None:
    model = tiny_model(CONFIGS[family])
    with attach(model, make_artifact(model, capacity=18, recent=3)) as kv:
        assert not fusable(model, kv.new_cache())


@pytest.mark.parametrize("named", ["attribute", "rope"])
def test_partly_rotated_heads_go_through_the_model(named: str, make_artifact: Callable[..., Any]) -> None:
    """However the configuration says so: as of old, or among the parameters of the rotary embedding."""
    config = copy.deepcopy(CONFIGS["phi3"])
    if named == "rope":
        config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 0.5}
    else:
        config.partial_rotary_factor = 0.5
    model = tiny_model(CONFIGS["phi3"])
    with attach(model, make_artifact(model, capacity=18, recent=3)) as kv:
        assert fusable(model, kv.new_cache())
        model.config = config
        assert not fusable(model, kv.new_cache())


def test_policies_that_learn_from_attention_go_through_the_model(llama: Any, make_artifact: Callable[..., Any]) -> None:
    with attach(llama, make_artifact(llama, capacity=18, policy="h2o", recent=3)) as kv:
        assert not fusable(llama, kv.new_cache())


def test_a_layer_that_is_watched_goes_through_the_model(llama: Any, make_artifact: Callable[..., Any]) -> None:
    with attach(llama, make_artifact(llama, capacity=18, recent=3)) as kv:
        for module in (llama.model.layers[1].mlp.down_proj, llama.model.norm, llama.model.layers[0].self_attn):
            hook = module.register_forward_hook(lambda *arguments: None)
            assert not fusable(llama, kv.new_cache())
            hook.remove()
        assert fusable(llama, kv.new_cache())


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_weights_stay_where_the_model_looks_for_them(family: str, make_artifact: Callable[..., Any]) -> None:
    model = tiny_model(CONFIGS[family])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def stored() -> int:
        places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
        return sum(places.values())

    size = stored()
    with attach(model, make_artifact(model, capacity=18, recent=3)) as kv:
        attached = {name: weight.clone() for name, weight in model.state_dict().items()}
        with torch.inference_mode():
            step = FusedStep(model)
        assert not any(weight.is_inference() for weight in model.parameters())
        assert stored() == size, "weights are stored twice"
        assert all(torch.equal(weight, attached[name]) for name, weight in model.state_dict().items())
        assert step.fits(model)
        assert FusedStep(model).fits(model)
        assert step.fits(model), "joining what is joined already moved it"
        assert kv.new_cache().nbytes
    assert step.fits(model) == (family == "phi3"), "what comes joined stays as it is"
    assert stored() == size
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
        assert weight.untyped_storage().nbytes() == weight.nbytes or "lm_head" in name or "embed" in name


class Launches(TorchDispatchMode):
    """Names of the operations that a GPU would launch a kernel for, Triton's among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if not self.inside and not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_to_copy")):
            self.names.append(name)
        return out

    @contextmanager
    def triton_counted(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from triton.runtime.interpreter import GridExecutor

        plain = GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(executor.fn.__name__)
            self.inside = True  # what the interpreter does is none of a GPU's
            try:
                return plain(executor, *args, **kwargs)
            finally:
                self.inside = False

        with monkeypatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", counted)
            yield


@torch.inference_mode()
def test_a_layer_takes_about_ten_launches(make_artifact: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a quantised layer with scores; what a model with one layer more launches more."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, so Triton compiles for it and takes no tensors of a CPU")
    monkeypatch.setenv("KVCOMPILE_KERNELS", "triton")
    counts = []
    for layers in (1, 2):
        config = CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": layers})
        model = tiny_model(config)
        with attach(model, make_artifact(model, capacity=18, policy="scored", recent=3, bits=[(8, 4)])) as kv:
            cache = kv.new_cache()
            model(prompt(15), past_key_values=cache)
            step = FusedStep(model)
            token, position = prompt(3)[:, :1], torch.tensor([[15]])
            step(token, position, cache)  # tables of the layout are made
            for layer in cache.layers:
                layer.store.counts = torch.tensor(layer.store.seen, dtype=torch.int32)  # as on a GPU
            launches = Launches()
            with launches.triton_counted(monkeypatch), launches:
                step(token, position + 1, cache)
            counts.append(launches.names)
            assert all(layer.store.counts.tolist() == layer.store.seen == [17] for layer in cache.layers)
    more = len(counts[1]) - len(counts[0])
    assert more <= 10, counts[1]
    assert not {"_local_scalar_dense", "item", "nonzero"} & set(counts[1]), "the host waits for the device"
    assert {"_decode", "_new_token", "_restore", "_add_norm", "_silu_mul"} <= set(counts[0])
