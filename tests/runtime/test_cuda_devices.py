"""One model on two GPUs: by layers, and by heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensor_parallel
import torch
from tiny_models import SHAPE, make_artifact, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from kvcompile.artifacts import read, write
from kvcompile.runtime import attach, generate

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CONFIG = LlamaConfig(
    **SHAPE | {"vocab_size": 98, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
)
"""Heads of 32 elements, and sizes that two divide."""
FIRST = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
SECOND = ("model.layers.1", "model.layers.2", "model.norm", "lm_head")
ROWS = [[10, 64, 12, 30], [33, 7, 5, 128], [9, 9, 40, 20]]
OPTIONS: dict[str, dict[str, Any]] = {
    "recent": {"capacity": ROWS},
    "scored": {"capacity": ROWS, "policy": "scored", "recent": 3},
    "quantised": {"capacity": ROWS, "policy": "scored", "recent": 3, "bits": [(32, 32), (8, 4), (4, 8)]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model(CONFIG)
    model.save_pretrained(tmp_path / "model")
    for name, options in OPTIONS.items():
        write(make_artifact(model, **options), tmp_path / f"{name}.kvb")
    return tmp_path


@pytest.mark.parametrize("name", OPTIONS)
def test_layers_on_two_gpus_say_what_one_gpu_does(folder: Path, name: str) -> None:
    pytest.importorskip("accelerate")
    spread = dict.fromkeys(FIRST, 0) | dict.fromkeys(SECOND, 1)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0)).to("cuda:0")
    found = []
    for where in ({"": 0}, spread):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", device_map=where).eval()
        with attach(model, read(folder / f"{name}.kvb")) as kv:
            cache = kv.new_cache(2)
            found.append(generate(model, cache, ids, max_new_tokens=6, prefill_chunk=16))
    assert [layer.store.keys.exact.device.index for layer in cache.ragged] == [0, 1, 1]
    assert torch.equal(*found)


def test_heads_on_two_gpus_say_what_one_gpu_does(folder: Path) -> None:
    cases = {name: (folder / "model", folder / f"{name}.kvb") for name in OPTIONS}
    ranks = tensor_parallel.run(folder, cases, "nccl", ["0", "1"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", device_map={"": 0}).eval()
    for name in OPTIONS:
        artifact = read(folder / f"{name}.kvb")
        with torch.no_grad():
            alone = tensor_parallel.answers(model, artifact)
        assert sum(rank[name]["bytes"] for rank in ranks) == artifact.bytes.resident
        for rank in ranks:
            assert rank[name]["restored"]
            for logits, expected in zip(rank[name]["logits"], alone["logits"], strict=True):
                torch.testing.assert_close(logits, expected, atol=5e-3 if "bits" in OPTIONS[name] else 1e-3, rtol=0)
