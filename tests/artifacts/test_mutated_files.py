"""Damaged files: no input crashes the reader, and no single changed byte goes unnoticed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.artifacts import ArtifactError, from_bytes, to_bytes


@pytest.fixture(scope="module", params=["artifact", "newer"], ids=["version 1", "version 2"])
def original(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def data(original) -> bytes:
    return to_bytes(original)


@pytest.fixture(scope="module")
def header_end(data) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def test_one_flipped_byte_in_the_header(data, header_end, refusal):
    for place in range(header_end):
        for flip in (0x01, 0x20, 0x80):
            refusal(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])


def test_one_flipped_bit_in_the_tensors(data, header_end, refusal):
    for place in range(header_end, len(data)):
        refusal(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])


def test_cut_short(data, header_end, refusal):
    for length in [*range(16), header_end // 2, header_end - 1, header_end, header_end + 1, len(data) - 1]:
        assert ": the file is cut short or not safetensors" in refusal(data[:length])


def test_longer_than_it_was(data, refusal):
    for more in (b"\0", b"\n", data):
        refusal(data + more)


edits = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(edits=edits, in_header=st.booleans())
def test_random_edits(original, data, header_end, assert_same, edits, in_header):
    mutated = data
    for place, text, removed in edits:
        place %= header_end if in_header else len(mutated) + 1
        mutated = mutated[:place] + text + mutated[place + removed :]
    check(mutated, original, assert_same)


@settings(deadline=None, max_examples=300)
@given(edits=edits)
def test_random_edits_with_a_fitting_header_length(original, data, header_end, assert_same, edits):
    header = data[8:header_end]
    for place, text, removed in edits:
        place %= len(header) + 1
        header = header[:place] + text + header[place + removed :]
    check(struct.pack("<Q", len(header)) + header + data[header_end:], original, assert_same)


@settings(deadline=None, max_examples=200)
@given(start=st.integers(0, 4000), length=st.integers(0, 4000), to=st.integers(0, 4000))
def test_splices(original, data, assert_same, start, length, to):
    piece = data[start : start + length]
    check(data[:to] + piece + data[to:], original, assert_same)
    check(data[:to] + piece + data[to + len(piece) :], original, assert_same)
    check(data[:start] + data[start + length :], original, assert_same)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_anything(original, data, assert_same, anything, with_length):
    check(struct.pack("<Q", len(anything)) + anything if with_length else anything, original, assert_same)


tokens = st.sampled_from(
    ["-1", "0", "65535", "9999999999", "99999999999999999999", "1e400", "null", "true", "[]", "{}", '"x"', '"\\ud800"']
)


@settings(deadline=None, max_examples=300)
@given(which=st.integers(0, 200), token=tokens)
def test_other_numbers_in_the_header(original, data, header_end, assert_same, which, token):
    """Shapes, offsets and every metadata number in turn are replaced by something else."""
    header = data[8:header_end].decode()
    places = [i for i in range(1, len(header)) if header[i].isdigit() and header[i - 1] in ":[,"]
    place = places[which % len(places)]
    end = next(i for i in range(place, len(header)) if not header[i].isdigit())
    inside_metadata = place < header.index("}}")
    text = token.replace("\\", "\\\\").replace('"', '\\"') if inside_metadata else token
    changed = (header[:place] + text + header[end:]).encode()
    check(struct.pack("<Q", len(changed)) + changed + data[header_end:], original, assert_same)


def check(mutated, original, assert_same):
    try:
        found = from_bytes(mutated, "x")
    except ArtifactError as error:
        message = str(error)
    else:
        assert_same(found, original)
        return
    assert message.isprintable()
