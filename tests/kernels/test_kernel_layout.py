"""Classes, slots, and what a layer's store holds where."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.artifacts import anchor_bytes, slot_bytes
from kvcompile.kernels import Buffers, HeadClass, HeadSpec, LayerLayout, compact
from kvcompile.kernels.codecs import CODECS, codec_of
from kvcompile.kernels.regions import starts, units


def test_equal_neighbours_form_a_class() -> None:
    two = HeadSpec("recent", 3, 1, 2)
    layout = LayerLayout.from_heads([HeadSpec("full", 9, 4, 5), two, two, HeadSpec("recent", 3, 1, 2, k_bits=4)])
    assert [(c.start, c.count, c.capacity, c.k_bits) for c in layout.classes] == [
        (0, 1, 9, 16),
        (1, 2, 3, 16),
        (3, 1, 3, 4),
    ]
    assert (layout.num_kv_heads, layout.slots) == (4, 18)


@given(
    heads=st.lists(
        st.tuples(st.integers(1, 7), st.sampled_from([16, *CODECS]), st.sampled_from([16, *CODECS])),
        min_size=1,
        max_size=5,
    ),
    head_dim=st.sampled_from([2, 8, 16, 64, 96, 128]),
    batch=st.integers(1, 3),
)
def test_a_store_takes_the_bytes_that_the_format_counts(
    heads: list[tuple[int, int, int]], head_dim: int, batch: int
) -> None:
    heads = [(n, *(b if b == 16 or codec_of(b).fits(head_dim) else 8 for b in bits)) for n, *bits in heads]
    specs = [HeadSpec("recent", capacity, min(4, capacity - 1), 1, k, v) for capacity, k, v in heads]
    layout = LayerLayout.from_heads(specs)
    stores = [
        Buffers(layout, [getattr(c, name) for c in layout.classes], head_dim, torch.float16, torch.device("cpu"), batch)
        for name in ("k_bits", "v_bits")
    ]
    held = sum(tensor.untyped_storage().nbytes() for store in stores for tensor in store.tensors())
    assert held == batch * sum(
        s.capacity * slot_bytes("recent", head_dim, s.k_bits, s.v_bits)
        + anchor_bytes(s.sink, head_dim, s.k_bits, s.v_bits, 16)
        for s in specs
    )


def test_views_cover_the_store_without_a_copy() -> None:
    layout = LayerLayout.from_heads([HeadSpec("recent", 5, 1, 4)] * 2 + [HeadSpec("recent", 3, 0, 3, 8, 8)])
    store = Buffers(layout, [16, 8], 4, torch.float32, torch.device("cpu"), 2)
    for cls in layout.classes:
        for view in store.views(cls):
            view.fill_(1)
    assert store.exact.shape == (2, 10, 4)
    assert [part.shape for part in store.parts(8)] == [(2, 3, 4), (2, 3, 1)]
    assert all((tensor == 1).all() for tensor in store.tensors())


def test_what_is_written_is_read_back() -> None:
    bits = 8
    layout = LayerLayout.from_heads([HeadSpec("scored", 6, 1, 2, bits, bits)] * 2)
    store, cls = Buffers(layout, [bits], 16, torch.float32, torch.device("cpu"), 1), layout.classes[0]
    prompt = torch.randn(2, 9, 16)
    token = torch.tensor([[0, 2, 3, 5, 7, 8], [0, 1, 4, 6, 7, 8]])
    other = Buffers(layout, [bits], 16, torch.float32, torch.device("cpu"), 1)
    compact(store, other, layout, prompt[None], prompt[None], [token[None]], [9])
    expected = prompt.gather(1, token[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(store.read(cls, 6, torch.float32)[0], expected, atol=0.02, rtol=0)
    assert torch.equal(store.read(cls, 6, torch.float32)[0, :, 0], prompt[:, 0]), "token 0 is exact"
    before = store.read(cls, 6, torch.float32)
    new = torch.randn(1, 2, 1, 16)
    store.write(cls, new, torch.tensor([[[4], [5]]]), torch.tensor([[[4], [5]]]), torch.tensor([[[2], [-1]]]))
    after = store.read(cls, 6, torch.float32)
    assert torch.equal(after[0, 0, 2], before[0, 0, 4]), "what was in the slot has moved, codes and scale alike"
    torch.testing.assert_close(after[0, 0, 4], new[0, 0, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(after[0, 1, 5], new[0, 1, 0], atol=0.02, rtol=0)
    untouched = [(0, 1), (0, 3), (0, 5), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert all(torch.equal(after[0, h, s], before[0, h, s]) for h, s in untouched)


@given(capacity=st.integers(1, 12), ring=st.integers(1, 12), tokens=st.integers(1, 60))
def test_a_ring_holds_the_first_and_the_last_tokens(capacity: int, ring: int, tokens: int) -> None:
    ring = min(ring, capacity)
    cls = HeadClass("recent", 0, 1, capacity, capacity - ring, ring)
    held: dict[int, int] = {}
    for token in range(tokens):
        held[cls.ring_slot(token)] = token
    if tokens <= capacity:
        expected = set(range(tokens))
    else:
        expected = set(range(capacity - ring)) | set(range(tokens - ring, tokens))
    assert set(held.values()) == expected
    assert all(0 <= slot < capacity for slot in held)


@pytest.mark.parametrize("count", [1, 3])
def test_a_view_of_one_class_in_a_batch_is_writable(count: int) -> None:
    layout = LayerLayout.from_heads([HeadSpec("recent", 4, 0, 4)] * count)
    store = Buffers(layout, [16], 2, torch.float32, torch.device("cpu"), 3)
    store.views(layout.classes[0])[0][1, count - 1, 2] = 7
    assert store.exact[1, (count - 1) * 4 + 2].tolist() == [7.0, 7.0]
    assert store.exact.count_nonzero() == 2


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_regions_begin_at_multiples_of_what_their_rows_are_multiples_of(head_dim: int) -> None:
    """And the next sequence at what all of them are: the kernels rely on both."""
    fitting = [id for id, codec in CODECS.items() if codec.fits(head_dim)]
    layout = LayerLayout.from_heads([HeadSpec("recent", 3 + 2 * i, 1, 2, id, id) for i, id in enumerate(fitting)])
    store = Buffers(layout, fitting, head_dim, torch.float16, torch.device("cpu"), 3)
    own = units(fitting, head_dim)
    ends = {"codes": 0, "scales": 0}
    for name, size in (("codes", "code_bytes"), ("scales", "groups")):
        for region in sorted(store.regions.values(), key=lambda r: getattr(r, name)):
            assert getattr(region, name) == ends[name], "nothing lies between two regions"
            row = getattr(region, size)
            assert ends[name] % (row & -row) == 0
            ends[name] += region.rows * row
        assert store.codes.stride(0) % own.codes == store.scales.stride(0) % own.scales == 0
    assert (store.codes.shape[1], store.scales.shape[1]) == (ends["codes"], ends["scales"])
    bits = [c.k_bits for c in layout.classes]
    assert all(s.codes % own.codes == s.scales % own.scales == 0 for s in starts(layout, bits, head_dim))
