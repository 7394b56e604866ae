"""Ragged decoding against its float64 reference, over odd shapes."""

from __future__ import annotations

import pytest
import torch

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, ragged_decode
from kvcompile.kernels.ragged_decode import dense, reference
from kvcompile.kernels.ragged_decode.totals import Totals

SMALL = HeadSpec("recent", 5, 4, 1)
LAYOUTS = {
    "one slot": LayerLayout.from_heads([HeadSpec("recent", 1, 0, 1)]),
    "uniform": LayerLayout.from_heads([HeadSpec("recent", 13, 4, 9)] * 3),
    "ragged": LayerLayout.from_heads([HeadSpec("full", 31, 4, 27), SMALL, SMALL, HeadSpec("snapkv", 17, 4, 6)]),
    "quantised": LayerLayout.from_heads(
        [HeadSpec("full", 31, 4, 27, 8, 4), HeadSpec("scored", 5, 4, 1, 4, 4), HeadSpec("recent", 9, 1, 8, 16, 8)]
    ),
    "few bits": LayerLayout.from_heads(
        [
            HeadSpec("full", 31, 4, 27, 67, 3),
            HeadSpec("scored", 5, 4, 1, 66, 2),
            HeadSpec("recent", 9, 1, 8, 65, 2),
            HeadSpec("scored", 12, 0, 3, 4, 3),
            HeadSpec("scored", 1, 0, 1, 3, 65),
        ]
    ),
    "window": LayerLayout.from_heads([HeadSpec("recent", 7, 0, 7)] * 2, window=7),
}
TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def stored(layout: LayerLayout, bits: str, batch: int, head_dim: int, dtype: torch.dtype, seed: int) -> Buffers:
    """A store full of random vectors."""
    generator = torch.Generator().manual_seed(seed)
    store = Buffers(layout, [getattr(c, bits) for c in layout.classes], head_dim, dtype, torch.device("cpu"), batch)
    for cls in layout.classes:
        slot = torch.arange(cls.capacity).expand(batch, cls.count, -1)
        new = torch.randn(batch, cls.count, cls.capacity, head_dim, generator=generator).to(dtype)
        store.write(cls, new, slot, slot[:, :, :0], slot[:, :, :0])
        store.write_anchor(cls, new, slot)
    return store


def inputs(layout: LayerLayout, batch: int, group: int, length: int, dtype: torch.dtype, head_dim: int = 16):
    generator = torch.Generator().manual_seed(batch * 1000 + group * 10 + length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = layout.num_kv_heads
    return {
        "query": draw(batch, heads * group, length, head_dim),
        "keys": stored(layout, "k_bits", batch, head_dim, dtype, 1),
        "values": stored(layout, "v_bits", batch, head_dim, dtype, 2),
        "new_keys": draw(batch, heads, length, head_dim),
        "new_values": draw(batch, heads, length, head_dim),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [1, 5, 7])
@pytest.mark.parametrize("seen", [[40], [2], [50, 3, 11]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_one_token(layout: LayerLayout, seen: list[int], group: int, dtype: torch.dtype) -> None:
    """In C where there is a compiler, and through torch."""
    data = inputs(layout, len(seen), group, 1, dtype)
    args = (data["query"], data["keys"], data["values"], layout, seen)
    expected = reference.ragged_decode(*args, scaling=0.3)
    for out in (ragged_decode(*args, scaling=0.3), dense.ragged_decode(*args, 0.3, None, None, None)):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("length", [None, 1, 6], ids=["stored", "one", "several"])
@pytest.mark.parametrize("bent", [None, "capped", "capped and shifted"])
@pytest.mark.parametrize("seen", [[40], [2], [50, 3, 11]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sums_and_capped_logits(layout: LayerLayout, seen: list[int], bent: str | None, length: int | None) -> None:
    """In C where there is a compiler and no cap, and through torch; in blocks too."""
    data = inputs(layout, len(seen), 5, length or 1, torch.float32)
    args = (data.pop("query"), data.pop("keys"), data.pop("values"), layout, seen)
    new = {} if length is None else data
    offset = torch.randn(len(seen), layout.num_kv_heads, 5, length or 1) if bent == "capped and shifted" else None
    expected, *ours = (Totals(None if bent is None else 1.5, offset) for _ in range(3))
    out = reference.ragged_decode(*args, scaling=0.3, totals=expected, **new)
    parts = [new.get(name) for name in ("new_keys", "new_values")]
    for totals, found in zip(
        ours,
        (
            ragged_decode(*args, scaling=0.3, totals=ours[0], **new),
            dense.ragged_decode(*args, 0.3, *parts, None, None, ours[1]),
        ),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), out, atol=3e-5, rtol=3e-5)
        torch.testing.assert_close(totals.logarithm.double(), expected.logarithm, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("group", [1, 5, 7])
@pytest.mark.parametrize("seen", [[40], [2], [50, 3, 11]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_several_tokens(layout: LayerLayout, seen: list[int], group: int, length: int) -> None:
    data = inputs(layout, len(seen), group, length, torch.float32)
    args = (data.pop("query"), data.pop("keys"), data.pop("values"), layout, seen)
    out = ragged_decode(*args, scaling=0.3, **data)
    torch.testing.assert_close(out.double(), reference.ragged_decode(*args, scaling=0.3, **data), atol=3e-5, rtol=3e-5)


def test_padding_among_new_tokens_is_not_seen() -> None:
    layout, seen = LAYOUTS["ragged"], [9, 40]
    data = inputs(layout, 2, 2, 4, torch.float32)
    mask = torch.ones(4, 4, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :2] = False
    args = (data.pop("query"), data.pop("keys"), data.pop("values"), layout, seen)
    out = ragged_decode(*args, scaling=1.0, new_mask=mask, **data)
    expected = reference.ragged_decode(*args, scaling=1.0, new_mask=mask, **data)
    torch.testing.assert_close(out.double(), expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("length", [1, 3, 11])
@pytest.mark.parametrize("pads", [None, [0, 6, 2]], ids=str)
@pytest.mark.parametrize("elements", [1 << 22, 200], ids=["at once", "in blocks"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_last_of_several_new_tokens(
    monkeypatch: pytest.MonkeyPatch, layout: LayerLayout, elements: int, pads: list[int] | None, length: int
) -> None:
    """Fewer queries than new tokens, of which there are more than the window has; with padding before them."""
    monkeypatch.setattr(dense, "MASK_ELEMENTS", elements)
    data = inputs(layout, 3, 2, 11, torch.float32)
    query = data.pop("query")[:, :, -length:]
    args = (query, data.pop("keys"), data.pop("values"), layout, [50, 0, 11])
    pad = None if pads is None else torch.tensor(pads)
    out = ragged_decode(*args, scaling=0.3, new_pad=pad, **data)
    expected = reference.ragged_decode(*args, scaling=0.3, new_pad=pad, **data)
    assert out.isfinite().all()
    real = torch.arange(11 - length, 11) >= (torch.zeros(3, 1) if pad is None else pad[:, None])
    real = real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out.double()[real], expected[real], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_mask_and_the_padding_that_it_stands_for(layout: LayerLayout) -> None:
    """Also where a sliding window must not count padding."""
    data = inputs(layout, 2, 2, 9, torch.float32)
    pad, row, column = torch.tensor([0, 5]), torch.arange(9)[:, None], torch.arange(9)
    mask = (column <= row) & (column > row - (layout.window or 9)) & (column >= pad[:, None, None])
    args = (data.pop("query"), data.pop("keys"), data.pop("values"), layout, [9, 40])
    masked = ragged_decode(*args, scaling=1.0, new_mask=mask[:, None], **data)
    padded = ragged_decode(*args, scaling=1.0, new_pad=pad, **data)
    torch.testing.assert_close(masked[0], padded[0])
    torch.testing.assert_close(masked[1, :, 5:], padded[1, :, 5:])


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, seen = LAYOUTS["window"], [20]
    data = inputs(layout, 1, 3, 11, torch.float32)
    args = (data.pop("query"), data.pop("keys"), data.pop("values"), layout, seen)
    whole = ragged_decode(*args, scaling=1.0, **data)
    monkeypatch.setattr(dense, "MASK_ELEMENTS", 2 * 3 * 18)
    torch.testing.assert_close(ragged_decode(*args, scaling=1.0, **data), whole, atol=1e-6, rtol=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    layout = LAYOUTS["uniform"]
    data = inputs(layout, 1, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="only one token"):
        ragged_decode(data["query"], data["keys"], data["values"], layout, [5], scaling=1.0)
    with pytest.raises(ValueError, match="no multiple"):
        ragged_decode(data["query"][:, :4], data["keys"], data["values"], layout, [5], scaling=1.0)
    with pytest.raises(ValueError, match="a store of"):
        ragged_decode(
            data["query"][:, :, :1],
            stored(layout, "k_bits", 2, 16, torch.float32, 1),
            data["values"],
            layout,
            [5],
            scaling=1.0,
        )
    new = {name: data[name][:, :, :1] for name in ("new_keys", "new_values")}
    with pytest.raises(ValueError, match="2 queries and 1 new tokens"):
        ragged_decode(data["query"], data["keys"], data["values"], layout, [5], scaling=1.0, **new)
    with pytest.raises(ValueError, match="lengths"):
        ragged_decode(data["query"][:, :, :1], data["keys"], data["values"], layout, [5, 5], scaling=1.0)
