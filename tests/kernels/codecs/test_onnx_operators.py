"""Codecs of whole numbers with standard operators, run by ONNX Runtime: the same bytes and vectors as in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import CODECS, Codec

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from kvcompile.export.onnx import quantisation  # noqa: E402
from kvcompile.export.onnx.builder import IR_VERSION, OPSET, Builder, value  # noqa: E402

WRITTEN = [codec for codec in CODECS.values() if codec.has("onnx")]
HEADS = 2


def run(b: Builder, inputs: dict[str, np.ndarray], outputs: dict[str, str]) -> dict[str, np.ndarray]:
    """Values of `outputs`, names with their element types."""
    given = [value(name, str(array.dtype), [None] * array.ndim) for name, array in inputs.items()]
    wanted = [value(name, dtype, [None] * 4) for name, dtype in outputs.items()]
    graph = onnx.helper.make_graph(b.nodes, "codecs", given, wanted, b.root.initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(list(outputs), inputs), strict=True))


def vectors(codec: Codec, tokens: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Some [1, HEADS, tokens, D] of very different sizes, and the same in the graph's order of elements."""
    rng = np.random.default_rng(codec.id)
    plain = rng.standard_normal((1, HEADS, tokens, head_dim)) * 10.0 ** rng.integers(-6, 4, (1, HEADS, tokens, 1))
    plain[:, :, :1] = 0
    plain = plain.astype(np.float32)
    return plain, plain[..., codec.load("onnx").order(head_dim)]


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128, 192, 256])
def test_bytes_and_vectors_are_those_of_torch(head_dim: int) -> None:
    """All codecs in one go, as a layer with all of them has it."""
    codecs, b = [codec for codec in WRITTEN if codec.fits(head_dim)], Builder()
    given = {codec.name: vectors(codec, 5, head_dim) for codec in codecs}
    made = quantisation.encode(b, [codec.name for codec in codecs], [HEADS] * len(codecs), codecs, head_dim)
    names: dict[str, str] = {}
    for codec, (codes, scales) in zip(codecs, made, strict=True):
        back = codec.load("onnx").decode(b, codes, scales, head_dim)
        names |= {codes: "uint8", scales: "float16", back: "float32"}
    found = run(b, {name: ordered for name, (_, ordered) in given.items()}, names)
    arrays = iter(found.values())
    for codec in codecs:
        codes, scales = encode(torch.from_numpy(given[codec.name][0]), codec.id)
        np.testing.assert_array_equal(next(arrays), codes.numpy())
        np.testing.assert_array_equal(next(arrays), scales.numpy())
        back = decode(codes, scales, codec.id, torch.float32).numpy()
        np.testing.assert_array_equal(next(arrays), back[..., codec.load("onnx").order(head_dim)])


@pytest.mark.parametrize("codec", WRITTEN, ids=lambda codec: codec.name)
@pytest.mark.parametrize("head_dim", [16, 192])
def test_a_product_with_plain_codes_is_restored(codec: Codec, head_dim: int) -> None:
    implementation, b = codec.load("onnx"), Builder()
    exact, _ = vectors(codec, 5, head_dim)
    codes, scales = encode(torch.from_numpy(exact), codec.id)
    groups = codec.split(head_dim)
    parts = b.split("codes", [group.size * group.bits // 8 for group in groups], 3)
    names = [implementation.plain(b, part, group) for part, group in zip(parts, groups, strict=True)]
    found = run(b, {"codes": codes.numpy()}, dict.fromkeys(names, "float32"))
    wanted = decode(codes, scales, codec.id, torch.float32).numpy()[..., implementation.order(head_dim)]
    for g, (group, numbers) in enumerate(zip(groups, found.values(), strict=True)):
        with_one = np.concatenate([numbers, np.ones_like(numbers[..., :1])], -1)
        restored = with_one @ implementation.restoring(group) * scales.numpy()[..., g : g + 1].astype(np.float32)
        np.testing.assert_allclose(restored, wanted[..., group.start : group.start + group.size], rtol=1e-5)


@pytest.mark.parametrize("codec", WRITTEN, ids=lambda codec: codec.name)
def test_nothing_stored_reads_as_no_vectors(codec: Codec) -> None:
    b, head_dim = Builder(), 192
    codes = np.zeros((1, HEADS, 0, codec.code_bytes(head_dim)), np.uint8)
    scales = np.zeros((1, HEADS, 0, codec.groups(head_dim)), np.float16)
    back = codec.load("onnx").decode(b, "codes", "scales", head_dim)
    assert run(b, {"codes": codes, "scales": scales}, {back: "float32"})[back].shape == (1, HEADS, 0, head_dim)


@pytest.mark.parametrize("codec", WRITTEN, ids=lambda codec: codec.name)
def test_order_keeps_every_element_in_its_group(codec: Codec) -> None:
    order: Any = codec.load("onnx").order(192)
    assert sorted(order) == list(range(192))
    for group in codec.split(192):
        part = range(group.start, group.start + group.size)
        assert sorted(order[group.start : group.start + group.size]) == list(part)
