"""What is no artifact at all is refused in one sentence: other files, and none."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save

import kvcompile.artifacts.checks as checks
from kvcompile.artifacts import ArtifactError, read, write


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "nan", '"x"', "[" * 100_000, "9" * 5000])
def test_metadata_that_is_no_object(data, unpack, pack, refusal, text):
    assert ": the metadata key kvcompile is" in refusal(pack(unpack(data)[0], text))


def test_deep_metadata(data, unpack, pack, refusal):
    tensors, metadata = unpack(data)
    for depth in (100, 900, 980, 990, 5000):
        text = json.dumps(metadata | {"solver": "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
        refusal(pack(tensors, text))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_other_safetensors_files(refusal, metadata):
    assert ": the metadata key kvcompile is missing" in refusal(save({"x": np.zeros(3, np.float32)}, metadata))


@pytest.mark.parametrize("data_", [b"", b"\0", b"\x89PNG\r\n\x1a\n" + bytes(64), b"\xff" * 64, b"{}", b"\n" * 100])
def test_other_files(refusal, data_):
    assert ": the file is cut short or not safetensors" in refusal(data_)


def test_no_such_file(tmp_path):
    with pytest.raises(ArtifactError, match="the file cannot be read: No such file or directory"):
        read(tmp_path / "no.kvb")


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ArtifactError, match="is not a regular file"):
            read(path)


@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "two\nlines", "\ud800"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path / name)
    assert str(caught.value).isprintable()


def test_size_limit(artifact, tmp_path, monkeypatch):
    write(artifact, tmp_path / "a.kvb")
    monkeypatch.setattr(checks, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ArtifactError, match="expected at most 1000"):
        read(tmp_path / "a.kvb")


def test_a_huge_sparse_file_is_not_read_whole(tmp_path):
    with open(tmp_path / "a.kvb", "wb") as file:
        file.truncate(2**34)
    with pytest.raises(ArtifactError, match="has 17179869184 bytes"):
        read(tmp_path / "a.kvb")
