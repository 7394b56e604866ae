"""A codec from outside of the package: a call of the registry, and everything asks it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import read, slot_bytes, vector_bytes, write
from kvcompile.kernels import codecs, decode, encode
from kvcompile.kernels.codecs import Codec
from kvcompile.runtime import attach

TOY = 77
DENSE = '''
import torch

def encode(vectors):
    """Signs alone, eight elements a byte, and their mean size."""
    scales = vectors.float().abs().mean(-1, keepdim=True).half()
    bits = (vectors > 0).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8), scales

def decode(codes, scales, dtype):
    bits = (codes.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return ((2.0 * bits.float() - 1).flatten(-2) * scales.float()).to(dtype)
'''


@pytest.fixture
def signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Codec]:
    package = tmp_path / "toy_signs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "dense.py").write_text(DENSE)
    monkeypatch.syspath_prepend(tmp_path)
    yield codecs.register(Codec(TOY, "signs", 1, "toy_signs", 3, needs_transform=False, profiled="", pack=8))
    del codecs.CODECS[TOY]
    for name in [name for name in sys.modules if name.startswith("toy_signs")]:
        del sys.modules[name]


def test_it_is_everywhere(signs: Codec, tmp_path: Path) -> None:
    vectors = torch.tensor([[1.0, -1, 2, 2, -1, -1, -3, 1]])
    codes, scales = encode(vectors, TOY)
    assert codes.tolist() == [[0b10001101]]
    assert decode(codes, scales, TOY, torch.float32).tolist() == [[1.5, -1.5, 1.5, 1.5, -1.5, -1.5, -1.5, 1.5]]
    assert vector_bytes(64, TOY) == 64 // 8 + 2
    assert slot_bytes("recent", 64, TOY, 16) == 10 + 128
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, [[9] * 3] * 3, bits=[(32, TOY), (TOY, 8)], context=64)
    write(artifact, tmp_path / "a.kvb")
    assert np.array_equal(read(tmp_path / "a.kvb").budgets.v_bits, artifact.budgets.v_bits)
    with torch.no_grad(), attach(model, tmp_path / "a.kvb") as kv:
        cache = kv.new_cache()
        model(torch.arange(3, 40)[None], past_key_values=cache)
        assert model(torch.tensor([[5]]), past_key_values=cache).logits.isfinite().all()
        assert cache.nbytes == artifact.bytes.resident


@pytest.mark.parametrize(
    "codec", [Codec(4, "other", 4, "x", 3), Codec(90, "int8", 8, "x", 3), Codec(16, "own", 16, "x", 3)]
)
def test_what_is_taken_is_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match="codec"):
        codecs.register(codec)
