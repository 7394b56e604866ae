"""A model whose layers lie on several devices: what belongs to a layer is on that layer's device."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, make_artifact, tiny_model
from transformers import AutoModelForCausalLM

from kvcompile.artifacts import ModelError
from kvcompile.runtime import Decoder, attach, generate
from kvcompile.runtime.fused import fusable
from kvcompile.runtime.prefill import read_prompts

attaching = importlib.import_module("kvcompile.runtime.attach")  # the function of this name hides it
FIRST, SECOND = torch.device("meta"), torch.device("cpu")
"""Operations refuse tensors of both; the first one's have no numbers."""
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm",
         "lm_head")  # fmt: skip
FAMILIES = ("llama", "qwen3", "smollm3", "qwen3.5")
OPTIONS: dict[str, Any] = {"policy": "scored", "recent": 3, "bits": [(32, 32), (8, 4), (4, 8)]}


def on_two_devices(model: Any) -> Any:
    """As `device_map` does it: weights are moved, and in the place of a part's `forward` there is another, which brings
    its arguments to the part's device, but for the cache."""
    for name in PARTS:
        part, device = model.get_submodule(name), FIRST if name in PARTS[:3] else SECOND
        part.to(device)
        part.forward = partial(_on, device, part.forward)
    model.forward = partial(_back, model.forward)
    return model


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    return torch.zeros_like(value, device=device)


def _on(device: torch.device, forward: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs = {key: value if key == "past_key_values" else _moved(value, device) for key, value in kwargs.items()}
    return forward(*_moved(args, device), **kwargs)


def _back(forward: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    output.logits = _moved(output.logits, FIRST)
    return output


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_layer_works_on_its_own_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks and steps."""
    artifact = make_artifact(tiny_model(CONFIGS[family]), 12, **OPTIONS)
    model = on_two_devices(tiny_model(CONFIGS[family]))
    for name in ("identify", "check_identity", "permute_heads"):  # these want numbers
        monkeypatch.setattr(attaching, name, lambda *_: None)
    with attach(model, artifact) as kv:
        cache = kv.new_cache(2)
        ids, positions = torch.zeros(2, 40, dtype=torch.int64, device=FIRST), torch.arange(40, device=FIRST)[None]
        logits = read_prompts(model, cache, ids, positions, None, 16)
        decoder = Decoder(model, cache)
        decoder.start(logits.argmax(-1)[:, None], 40)
        assert [decoder.step().device for _ in range(3)] == [FIRST] * 3
        for layer, stored in zip(model.model.layers, cache.layers, strict=True):
            (device,) = {parameter.device for parameter in layer.parameters()}
            held = getattr(stored, "store", stored)
            assert {tensor.device for tensor in held.tensors()} == {device}


def test_modules_that_move_their_arguments_are_called(llama: Any) -> None:
    """The step in few launches takes their weights alone."""
    with attach(llama, make_artifact(llama, 18, recent=3)) as kv:
        assert fusable(llama, kv.new_cache())
        own = llama.lm_head.forward
        llama.lm_head.forward = partial(_on, SECOND, own)
        assert not fusable(llama, kv.new_cache())
        del llama.lm_head.forward
        assert fusable(llama, kv.new_cache())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("llama")
    tiny_model(CONFIGS["llama"]).save_pretrained(found)
    return found


def test_a_model_with_accelerate_s_hooks_says_what_it_did(folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    alone, spread = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    accelerate.dispatch_model(spread, dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    artifact, found = make_artifact(alone, 12, **OPTIONS), []
    for model in (alone, spread):
        with attach(model, artifact) as kv:
            found.append(generate(model, kv.new_cache(2), ids, max_new_tokens=6, prefill_chunk=16))
    assert not fusable(spread, attach(spread, artifact).new_cache())
    assert torch.equal(*found)


def test_offloaded_layers_are_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    parts = {name: "disk" if name == "model.layers.1" else "cpu" for name in PARTS}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=parts, offload_folder=tmp_path)
    artifact = make_artifact(tiny_model(CONFIGS["llama"]), 12)
    with pytest.raises(ModelError, match=r"no numbers in model\.layers\.1.*, none of them offloaded by a device_map"):
        attach(model, artifact)
