"""What exporting writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_session import Session, Tokenizer, exported
from tiny_models import CONFIGS, SHAPE, make_artifact, tiny_model
from transformers import LlamaConfig

from kvcompile.artifacts import POLICIES, ExchangeError, ModelError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from kvcompile.export.onnx import export  # noqa: E402


def test_files_and_their_description(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, 20, policy="scored", recent=6, bits=[(8, 4), (32, 32)], batch=2)
    made = export(artifact, model, Tokenizer(), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == [
        "kvcompile.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 24)]
    assert {node.domain for node in proto.graph.node} == {""}
    told = json.loads((folder / "kvcompile.json").read_text())
    assert made.cache == told["cache_bytes"] == artifact.bytes.resident
    session = Session(folder)
    assert sum(array.nbytes for array in session.arrays.values()) == artifact.bytes.resident
    inputs = {i.name: i.shape for i in session.session.get_inputs()}
    assert set(inputs) == {"input_ids", "seen", "new"} | {buffer["past"] for buffer in told["buffers"]}
    assert all(inputs[buffer["past"]] == buffer["shape"] for buffer in told["buffers"])
    budgets = artifact.budgets
    for layer, groups in enumerate(told["layers"]):
        assert [head for group in groups for head in group["heads"]] == budgets.head_order[layer].tolist()
        for group in groups:
            for head in group["heads"]:
                assert group["policy"] == POLICIES[budgets.policy[layer, head]]
                assert group["capacity"] == budgets.capacity[layer, head]
                assert (group["key_bits"], group["value_bits"]) == (
                    budgets.k_bits[layer, head],
                    budgets.v_bits[layer, head],
                )
    assert told["ends"] == [2]
    assert told["chat"] is None


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported(model, make_artifact(model, 20, bits=[(8, 4)]), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_policies_that_learn_from_attention_are_refused(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    for policy in ("h2o", "snapkv"):
        artifact = make_artifact(model, 20, policy=policy, recent=6)
        with pytest.raises(ExchangeError, match=f"policy '{policy}': expected full, recent, scored"):
            export(artifact, model, Tokenizer(), tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(tmp_path: Path) -> None:
    artifact = make_artifact(tiny_model(CONFIGS["llama"]), 20)
    with pytest.raises(ModelError):
        export(artifact, tiny_model(CONFIGS["qwen2"]), Tokenizer(), tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_rotary_embeddings_that_change_with_the_text_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(LlamaConfig(**SHAPE, rope_parameters=rope))
    with pytest.raises(ModelError, match="'dynamic' rotary embedding"):
        export(make_artifact(model, 20), model, Tokenizer(), tmp_path / "none")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExchangeError, match="cannot be written"):
        export(make_artifact(model, 20), model, Tokenizer(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, 20)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcompile.export.onnx.write.onnx.save", full)
    with pytest.raises(ExchangeError, match="No space left on device"):
        export(artifact, model, Tokenizer(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
