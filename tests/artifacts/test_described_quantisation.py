"""FORMAT.md says enough of quantisation: its program, its examples and the runtime give the same bytes."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from format_description import TEXT, program
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stored import reads_alike

from kvcompile.artifacts import vector_bytes
from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import CODECS, codec_of

FP8 = 136


@pytest.fixture(scope="module")
def described():
    return program()


def test_every_codec_is_described():
    # Version 0: codecs to compare with, which no file has.
    versions = {codec.id: codec.format_version for codec in CODECS.values() if codec.format_version}
    rows = re.findall(r"^\| (\d+) \((\d)\) \| (\w+) \|", TEXT, re.MULTILINE)
    assert {int(id): int(version) for id, version, _ in rows} == {i: v for i, v in versions.items() if i != FP8}
    assert all(codec_of(int(id)).name == name for id, _, name in rows)
    assert "Version 3 adds the ids 2, 3, 65, 66, 67 and 136." in TEXT
    assert [id for id in sorted(versions) if versions[id] == 3] == [2, 3, 65, 66, 67, FP8]


def numbers(name, example=TEXT):
    """A row of the description's first example of quantisation, or of the first in a part of it."""
    return json.loads(re.search(rf"^    {re.escape(name)} +=? *(\[.*?\])", example, re.MULTILINE | re.DOTALL).group(1))


def test_the_worked_example_of_quantisation(described):
    hadamard = np.array(json.loads(re.search(r"^(\[\[1, 1.*?\]\])", TEXT, re.MULTILINE).group(1)))
    transform, mean, x = (hadamard / 2).astype(np.float16), np.array([1, 0, 0, 0], np.float16), [3, 1, -1, 0.5]
    y = transform @ (np.array(x, np.float32) - mean)
    stored, scales = described.encode(y, 4)
    assert numbers("y") == y.tolist()
    assert scales.tolist() == [0.2291259765625] == [float(np.float16((6.25 / 119) ** 0.5))]
    assert "scale  = 0.2291259765625             nearest to the root of" in TEXT
    codes = [code for byte in stored.tolist() for code in (byte & 15, byte >> 4)]
    assert numbers("stored") == codes
    assert numbers("c") == [code - 8 for code in codes]
    assert f"the bytes {bytes(stored).hex(' ').upper()}" in TEXT
    assert numbers("y'") == described.decode(stored, scales, 4).tolist()
    back = described.restore(stored, scales, 4, transform, mean)
    np.testing.assert_allclose(transform @ (back - mean), numbers("y'"), atol=1e-6)


def test_the_worked_examples_of_few_bits(described):
    three, sections = re.split("^The same y with id 67", TEXT.split("With D = 8 and id 3")[1], flags=re.MULTILINE)
    y = numbers("y", three)
    stored, scales = described.encode(y, 3)
    assert "scale  = 0.84423828125               nearest to the root of 22.8125 / 32" in three
    assert scales.tolist() == [0.84423828125] == [float(np.float16((22.8125 / 32) ** 0.5))]
    codes = described.unpack(stored, 3).tolist()
    assert numbers("stored", three) == codes
    assert numbers("c", three) == [code - 4 for code in codes]
    for name, part in (("low", [code & 3 for code in codes]), ("high", [code >> 2 for code in codes])):
        assert f"{name} {' '.join(map(str, part))}, " in three
    assert f"the bytes {stored.tobytes().hex(' ').upper()}" in three
    assert numbers("y'", three) == described.decode(stored, scales, 3).tolist()

    stored, scales = described.encode(y, 67)
    assert numbers("scales", sections) == scales.tolist()
    codes = [*described.unpack(stored[:2], 4), *described.unpack(stored[2:], 2)]
    assert numbers("stored", sections) == codes
    first, second = (part.tobytes().hex(" ").upper() for part in (stored[:2], stored[2:]))
    assert f"the bytes {first} and {second}" in sections
    assert numbers("y'", sections) == described.decode(stored, scales, 67).tolist()


IDS = st.sampled_from([8, 4, 3, 2, 67, 66, 65])
vectors = st.sampled_from([2, 8, 16, 64, 66, 80, 96, 128, 192, 256]).flatmap(
    lambda size: hnp.arrays(np.float32, size, elements=st.floats(-1e4, 1e4, width=32))
)


@given(y=vectors, bits=IDS)
def test_quantisation_as_described(described, y, bits):
    codec = codec_of(bits)
    hypothesis.assume(codec.fits(len(y)))
    groups = described.groups(bits, len(y))
    assert groups == [(group.bits, group.size) for group in codec.split(len(y))]
    stored, scales = described.encode(y, bits)
    assert (stored.dtype, scales.dtype, len(scales)) == (np.uint8, np.float16, len(groups))
    assert stored.nbytes + scales.nbytes == vector_bytes(len(y), bits)
    found, start = described.decode(stored, scales, bits).astype(np.float64), 0
    for (width, size), scale in zip(groups, scales, strict=True):
        part, back = y[start : start + size].astype(np.float64), found[start : start + size]
        largest, half = abs(part).max(), 2 ** (width - 1)
        if largest >= half * 2**-14:
            assert 2**-14 <= scale < 65504
            np.testing.assert_allclose(part @ back if bits in (65, 66) else back @ back, part @ part, rtol=2e-3)
            plain = np.floor(part / largest * half).clip(-half, half - 1) + 0.5
            assert part @ back / np.linalg.norm(back) >= part @ plain / np.linalg.norm(plain) * (1 - 1e-4)
        start += size
    assert (found[start:] == 0).all()


@given(size=st.integers(1, 512), bits=IDS)
def test_sizes_fit_as_described(described, size, bits):
    """Every group is whole, and as many elements as fill whole bytes."""
    least = {8: 2, 4: 2, 3: 8, 2: 4}
    fits = True
    for width, eighths in described.SECTIONS[bits]:
        elements = Fraction(size * eighths, 8)
        group = elements / math.ceil(elements / 64)
        fits = fits and group.denominator == 1 and group % least[width] == 0
    assert codec_of(bits).fits(size) == fits


@given(y=vectors, bits=IDS)
def test_the_runtime_quantises_as_described(described, y, bits):
    hypothesis.assume(codec_of(bits).fits(len(y)))
    stored, scales = described.encode(y, bits)
    found_stored, found_scales = encode(torch.from_numpy(y), bits)
    found = decode(found_stored, found_scales, bits, torch.float32)
    assert reads_alike(found, torch.from_numpy(described.decode(stored, scales, bits)), bits)
    # The same bytes stand for the same vector.
    found = decode(torch.from_numpy(stored), torch.from_numpy(scales), bits, torch.float32)
    np.testing.assert_array_equal(found.numpy(), described.decode(stored, scales, bits))


@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 4), (66, 3)])
def test_turning_queries_and_outputs_as_described(described, newer, k_bits, v_bits):
    """Attention over what is stored, its queries and output turned, is attention over what was restored."""
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 9, 8))
    query = rng.normal(size=8)
    q = newer.quantiser
    tables = (q.key_transform, q.key_mean, q.value_transform, q.value_mean)
    key_transform, key_mean, value_transform, value_mean = (table[0, 1].astype(np.float64) for table in tables)

    def stored(vectors, transform, mean, bits):
        packed = [described.encode(transform @ (x - mean), bits) for x in vectors]
        turned = np.stack([described.decode(*one, bits) for one in packed])
        return turned, np.stack([described.restore(*one, bits, transform, mean) for one in packed])

    def weights(logits):
        exponentials = np.exp(logits - logits.max())
        return exponentials / exponentials.sum()

    turned_keys, restored_keys = stored(keys, key_transform, key_mean, k_bits)
    turned_values, restored_values = stored(values, value_transform, value_mean, v_bits)
    expected = weights(restored_keys @ query) @ restored_values
    turned_query = np.linalg.inv(key_transform).T @ query
    found = np.linalg.inv(value_transform) @ (weights(turned_keys @ turned_query) @ turned_values) + value_mean
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
