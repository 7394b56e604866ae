"""An artifact as a kvpress press against our own runtime.

kvpress wants a transformers that our runtime does not run with, so these tests run in an environment of kvpress's
(`make integrations`) and ask ours, the python in KVCOMPILE_PYTHON, for the runtime's numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, make_artifact, tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvcompile.artifacts import Artifact, CacheError, ModelError, read, write

pytest.importorskip("kvpress")
PYTHON = os.environ.get("KVCOMPILE_PYTHON")
if PYTHON is None:
    pytest.skip("KVCOMPILE_PYTHON names no python with our runtime (`make integrations` does)", allow_module_level=True)

from kvcompile.integrations.kvpress import KvcompilePress  # noqa: E402

ROOT = Path(__file__).parents[3]
LOSS = ROOT / "tests" / "support" / "continuation_loss.py"
REFERENCES = sorted((ROOT / "artifacts" / "reference").glob("*.kvb"))
REFERENCE = REFERENCES[-1]


@torch.inference_mode()
def pressed_loss(model: Any, press: Any, ids: list[int], context: int) -> float:
    """Loss over what follows a context that was pressed; token by token, as kvpress finds no key that many queries at
    once leave alone where heads are as small as in tiny models."""
    tokens, cache = torch.tensor([ids]), DynamicCache()
    with press(model):
        model(tokens[:, :context], past_key_values=cache)
    logits = []
    for place in range(context, len(ids) - 1):
        position = torch.tensor([[place]])
        logits.append(model(tokens[:, place : place + 1], past_key_values=cache, position_ids=position).logits[0, -1])
    return float(cross_entropy(torch.stack(logits), tokens[0, context + 1 :]))


def runtime_loss(folder: Path, artifact: Path, ids: list[int], context: int, scratch: Path) -> float:
    (scratch / "ids.json").write_text(json.dumps(ids))
    command = [PYTHON, LOSS, folder, artifact, scratch / "ids.json", str(context)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout.splitlines()[-1]))


PLANS: dict[str, dict[str, Any]] = {
    "full": {},
    "recent": {"capacity": 20},
    "scored": {"capacity": [[5, 20, 9], [20, 20, 5], [33, 7, 4]], "policy": "scored", "recent": 3},
    "rounded": {"capacity": 20, "policy": "scored", "recent": 6, "bits": [(8, 4), (32, 8), (4, 32)]},
    "rounded without sinks": {"capacity": 20, "sink": 0, "bits": [(8, 4), (4, 8)]},
    "bfloat16": {"capacity": 20, "policy": "scored", "recent": 6, "dtype": "bfloat16", "bits": [(8, 4), (16, 16)]},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "multi-query"])
def test_every_family_loses_what_the_runtime_loses(family: str, tmp_path: Path) -> None:
    _compare(family, {"capacity": 20, "policy": "scored", "recent": 6}, tmp_path)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_plan_loses_what_the_runtime_loses(plan: dict[str, Any], tmp_path: Path) -> None:
    _compare("llama", plan, tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "multi-query"])
def test_reference_queries_do_what_they_do_in_the_runtime(family: str, tmp_path: Path) -> None:
    plan = {"capacity": 20, "policy": "scored", "recent": 6}
    (fitted, ours), (plain, _) = (
        _compare(family, plan, tmp_path / name, name == "fitted") for name in ("fitted", "plain")
    )
    # Both round scores to half precision, where a token may win in one and lose in the other.
    assert abs(fitted - ours) < abs(fitted - plain) / 20


def _compare(family: str, plan: dict[str, Any], tmp_path: Path, fitted: bool = False) -> tuple[float, float]:
    """The press's loss and the runtime's; `fitted`: the artifact has a rotary embedding, and there are references."""
    model = tiny_model(CONFIGS[family])
    model.save_pretrained(tmp_path / "model")
    artifact = make_artifact(model, **plan)
    if fitted:
        half = model.model.rotary_emb.inv_freq.numpy()
        frequency = np.tile(np.concatenate([half, -half]).astype(np.float32), (artifact.model.num_layers, 1))
        partner = np.roll(np.arange(2 * len(half), dtype=np.int32), len(half))
        artifact = replace(artifact, profile={"rotary_frequency": frequency, "rotary_partner": partner})
    write(artifact, tmp_path / "a.kvb")
    ids = torch.randint(3, 97, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = runtime_loss(tmp_path / "model", tmp_path / "a.kvb", ids, 60, tmp_path)
    theirs = pressed_loss(model, KvcompilePress(tmp_path / "a.kvb"), ids, 60)
    assert theirs == pytest.approx(ours, rel=1e-3)
    if "capacity" in plan:
        assert theirs != pytest.approx(_plain_loss(model, ids), rel=1e-3)
    return theirs, ours


@torch.inference_mode()
def _plain_loss(model: Any, ids: list[int]) -> float:
    logits = model(torch.tensor([ids])).logits
    return float(cross_entropy(logits[0, 60:-1], torch.tensor(ids[61:])))


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda path: path.stem)
def test_a_real_model_on_real_text(reference: Path, tmp_path: Path) -> None:
    """Within 1 %, on a text of 2,400 tokens of which 2,000 are pressed: exact rings, and scored heads with codes."""
    folder = os.environ.get("KVCOMPILE_SMOLLM2")
    if folder is None:
        pytest.skip("KVCOMPILE_SMOLLM2 names no folder with the model in float32 (`make integrations` makes one)")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (ROOT / "artifacts" / "FORMAT.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids[:2400]
    ours = runtime_loss(Path(folder), reference, ids, 2000, tmp_path)
    theirs = pressed_loss(model, KvcompilePress(reference), ids, 2000)
    print(f"continuation loss: runtime {ours:.4f}, press {theirs:.4f}")
    assert theirs == pytest.approx(ours, rel=0.01)


def test_kvpress_own_pipeline_takes_it(tmp_path: Path) -> None:
    folder = os.environ.get("KVCOMPILE_SMOLLM2")
    if folder is None:
        pytest.skip("KVCOMPILE_SMOLLM2 names no folder with the model in float32 (`make integrations` makes one)")
    from transformers import pipeline

    pipe = pipeline("kv-press-text-generation", model=folder, dtype=torch.float32)
    context = "The key to the shed hangs behind the blue door. " + "It rained on Monday. " * 60
    answer = pipe(context, question="Where is the key?", press=KvcompilePress(REFERENCE), max_new_tokens=12)["answer"]
    assert answer.strip()


def test_the_ratio_is_the_artifacts(caplog: pytest.LogCaptureFixture) -> None:
    press = KvcompilePress(REFERENCE)
    bytes_ = read(REFERENCE).bytes
    press.compression_ratio = 1 - bytes_.resident / bytes_.full
    assert not caplog.records
    press.compression_ratio = 0.5
    assert "stays that" in caplog.text
    assert press.compression_ratio == 1 - bytes_.resident / bytes_.full


def test_mistakes_are_refused(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    artifact: Artifact = make_artifact(model, 20, policy="h2o", recent=6)
    with pytest.raises(CacheError, match="policy 'h2o'"):
        KvcompilePress(artifact)
    press = KvcompilePress(make_artifact(model, 20))
    with pytest.raises(ModelError), press(tiny_model(CONFIGS["qwen2"])):
        pass
