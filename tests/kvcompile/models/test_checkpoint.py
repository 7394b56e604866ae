"""Safetensors files read tensor by tensor, and what is wrong with them in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvcompile.artifacts.errors import ModelError
from kvcompile.models import checkpoint as subject
from kvcompile.models.checkpoint import INDEX, Checkpoint

TENSORS = {
    "a.weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "b.weight": torch.randn(3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "c": torch.arange(6).reshape(1, 2, 3),
    "d.weight": torch.ones(4, 4).half(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and their index."""
    placed = {"model-1.safetensors": ["a.weight", "c"], "model-2.safetensors": ["b.weight", "d.weight"]}
    for file, names in placed.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in placed.items() for name in names}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("at_once", [1, 16, 1 << 28])
def test_tensors_and_their_elements_are_what_was_stored(
    folder: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "AT_ONCE", at_once)
    checkpoint = Checkpoint(folder, "tiny")
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)
        places = [0, tensor.numel() // 2, tensor.numel() - 1]
        assert torch.equal(checkpoint.elements(name, places), tensor.reshape(-1)[places])
    checkpoint.ahead(TENSORS)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert torch.equal(Checkpoint(tmp_path, "tiny").read("d.weight"), TENSORS["d.weight"])


def test_a_single_file_comes_before_an_index(folder: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert torch.equal(Checkpoint(folder, "tiny").read("a.weight"), torch.zeros(2))


def test_the_element_type_is_that_of_the_first_floats_by_name_in_the_first_file(folder: Path) -> None:
    """The file itself has its widest tensors first."""
    assert Checkpoint(folder, "tiny").dtype == torch.float32
    (folder / INDEX).unlink()
    save_file({"b": torch.zeros(2), "a": TENSORS["b.weight"], "0": TENSORS["c"]}, folder / "model.safetensors")
    assert Checkpoint(folder, "tiny").dtype == torch.bfloat16
    save_file({"1": TENSORS["c"].int(), "0": TENSORS["c"]}, folder / "model.safetensors")
    assert Checkpoint(folder, "tiny").dtype == torch.int64
    save_file({}, folder / "model.safetensors")
    assert Checkpoint(folder, "tiny").dtype == torch.float32


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence) as caught:
        Checkpoint(folder, "tiny")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()
    refused(folder, r"^tiny lacks 1 of its 2 files of weights, the first of them model-2\.safetensors")


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_is_named(folder: Path, left: int) -> None:
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(folder, r"^tiny has a damaged file of weights, model-2\.safetensors: it (ends in its header|is cut off)")


def test_a_file_cut_off_while_it_is_used_is_named(folder: Path) -> None:
    checkpoint = Checkpoint(folder, "tiny")
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(ModelError, match=r"cut off, model-1\.safetensors"):
        [checkpoint.read(name) for name in ("a.weight", "c")]


@pytest.mark.parametrize("index", ["no json", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none_is_refused(folder: Path, index: str) -> None:
    (folder / INDEX).write_text(index)
    refused(folder, "has an index that cannot be read")


def test_an_index_that_names_the_wrong_file_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a.weight"] = "model-2.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, r"wrong index: .* a\.weight is in model-2\.safetensors, which does not have it")


def test_other_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "has no safetensors weights")
    (tmp_path / "model.safetensors").write_bytes((40).to_bytes(8, "little") + b"x" * 80)
    refused(tmp_path, "damaged file of weights")
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    refused(tmp_path, "a of type F8_E4M3, expected weights that are not packed")
