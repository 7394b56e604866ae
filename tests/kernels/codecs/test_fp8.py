"""fp8 against its definition, in the runtime, in files, and where it is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import ArtifactError, ExchangeError, read, to_bytes, write
from kvcompile.compiler import resolve
from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import codec_of, profiled
from kvcompile.runtime import attach

FP8 = 136
REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"


@settings(max_examples=40)  # the reference looks at every number of the format
@given(size=st.sampled_from([1, 5, 16, 64, 80, 96, 128, 256]), seed=st.integers(0, 999), scale=st.floats(1e-5, 1e3))
def test_codes_and_scales_are_the_references(size: int, seed: int, scale: float) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = encode(vector, FP8)
    reference = codec_of(FP8).load("reference")
    expected, expected_scales = reference.encode(vector)
    assert scales.tolist() == expected_scales
    # In float64 a quotient may fall on the other side of the middle between two numbers.
    assert sum(a != b for a, b in zip(codes.tolist(), expected, strict=True)) <= 1
    read_back = torch.tensor(reference.decode(codes.tolist(), expected_scales))
    torch.testing.assert_close(decode(codes, scales, FP8, torch.float32), read_back)


def test_every_byte_is_torchs_number_and_the_nearest_to_itself() -> None:
    reference = codec_of(FP8).load("reference")
    codes = [code for code in range(256) if code & 127 != 127]
    numbers = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert [reference.number(code) for code in codes] == numbers.tolist()
    assert [reference.nearest(reference.number(code)) for code in codes if code != 128] == [
        c for c in codes if c != 128
    ]


@given(seed=st.integers(0, 999))
def test_an_element_is_off_by_at_most_a_sixteenth(seed: int) -> None:
    """Half a step of a mantissa of 3 bits; near 0, half of the smallest step."""
    vectors = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed))
    codes, scales = encode(vectors, FP8)
    back = decode(codes, scales, FP8, torch.float32)
    step = scales.float().repeat_interleave(64, dim=-1) * 2.0**-9
    assert ((back - vectors).abs() <= vectors.abs() * (2.0**-4 + 2.0**-10) + step).all()


def test_nothing_stays_nothing_and_the_largest_stay_finite() -> None:
    assert (decode(*encode(torch.zeros(2, 64), FP8), FP8, torch.float32) == 0).all()
    for largest in (1e-7, 1.0, 3.3e4, 1e7, 1e9):  # the last beyond any scale
        assert decode(*encode(torch.full((64,), largest), FP8), FP8, torch.float32).isfinite().all()


@pytest.mark.parametrize("bits", [[(FP8, FP8)], [(FP8, 4), (32, FP8), (8, FP8)]])
def test_a_model_runs_on_it(bits: list[tuple[int, int]]) -> None:
    """Close to the full cache in exactly the bytes promised; token by token as several at once."""
    model = tiny_model(CONFIGS["llama"])
    ids = torch.randint(3, 97, (1, 49), generator=torch.Generator().manual_seed(0))
    artifact = make_artifact(model, bits=bits, context=64)
    with torch.no_grad():
        plain = model(ids).logits[:, 40:]
        with attach(model, artifact) as kv:
            cache, other = kv.new_cache(), kv.new_cache()
            assert cache.nbytes == artifact.bytes.resident
            for one in (cache, other):
                model(ids[:, :40], past_key_values=one)
            at_once = model(ids[:, 40:], past_key_values=cache).logits
            by_one = [model(ids[:, t : t + 1], past_key_values=other).logits for t in range(40, 49)]
    for logits in (at_once, torch.cat(by_one, 1)):
        error = (logits - plain).square().mean() / plain.var()
        assert 1e-9 < error < (0.02 if bits == [(FP8, FP8)] else 0.1)


def test_files_with_it_are_of_version_3(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    for bits, version in (([(FP8, 32)], 3), ([(8, 4)], 2)):
        artifact = make_artifact(model, bits=bits)
        assert f'\\"format_version\\":{version}'.encode() in to_bytes(artifact)
        write(artifact, tmp_path / "a.kvb")
        assert read(tmp_path / "a.kvb").budgets.k_bits.tolist() == artifact.budgets.k_bits.tolist()


def test_older_versions_do_not_know_it(tmp_path: Path) -> None:
    artifact = make_artifact(tiny_model(CONFIGS["llama"]), bits=[(FP8, 32)])
    data = to_bytes(artifact).replace(b'\\"format_version\\":3', b'\\"format_version\\":2')
    (tmp_path / "a.kvb").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"k_bits"):
        read(tmp_path / "a.kvb")


def test_it_needs_no_quantiser(tmp_path: Path) -> None:
    artifact = make_artifact(tiny_model(CONFIGS["llama"]), bits=[(FP8, FP8)])
    bare = replace(artifact, quantiser=None, bytes=replace(artifact.bytes, scorer=0))
    write(bare, tmp_path / "a.kvb")
    assert read(tmp_path / "a.kvb").quantiser is None


def test_plans_are_made_of_it_by_name_alone() -> None:
    """Its loss is not profiled, so what a plan loses is unknown."""
    assert FP8 not in profiled("k") + profiled("v")
    artifact = read(REFERENCE)
    plan = resolve(artifact, mem="40%", kv_dtype="fp8")
    assert (plan.budgets.k_bits == FP8).all()
    assert (plan.budgets.v_bits == FP8).all()
    assert math.isnan(plan.predicted_loss)
    assert plan.bytes.resident <= plan.target.bytes
    auto = resolve(artifact, mem="40%")
    assert FP8 not in auto.budgets.k_bits


def test_onnx_refuses_it_by_name() -> None:
    pytest.importorskip("onnx")
    from kvcompile.export.onnx.groups import layer_groups

    with pytest.raises(ExchangeError, match="fp8"):
        layer_groups(make_artifact(tiny_model(CONFIGS["llama"]), bits=[(FP8, FP8)]))
