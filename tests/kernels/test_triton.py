"""The GPU kernels against the references, over odd shapes: compiled where there is a GPU, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from device_stores import DEVICE, FEW_BITS, QUANTISED, TOLERANCE, on_cpu, sides, spread_over

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, ragged_decode
from kvcompile.kernels.append import reference as append_reference
from kvcompile.kernels.ragged_decode import reference as decode_reference
from kvcompile.kernels.ragged_decode.work import span, work_list

pytest.importorskip("triton")
from kvcompile.kernels.append import triton as append_kernel
from kvcompile.kernels.ragged_decode import triton as decode_kernel
from kvcompile.kernels.ragged_decode.tuning import Tuning

ONE = LayerLayout.from_heads([HeadSpec("recent", 1, 0, 1)])
RAGGED = LayerLayout.from_heads(
    [HeadSpec("full", 130, 4, 27), HeadSpec("recent", 5, 4, 1), HeadSpec("snapkv", 71, 4, 6)]
)
WINDOW = LayerLayout.from_heads([HeadSpec("recent", 7, 0, 7)] * 2, window=7)
LAYOUTS = {"one": ONE, "ragged": RAGGED, "quantised": QUANTISED, "few bits": FEW_BITS, "window": WINDOW}
LENGTHS = [[400], [2], [150, 3, 61]]
LITTLE = Tuning(32, 2)
"""Items so small that a head has several and the last is shorter."""


@pytest.mark.parametrize(
    ("layout", "shape", "rows", "dtype"),
    spread_over(LAYOUTS, [(64, LENGTHS[0]), (96, LENGTHS[2]), (128, LENGTHS[1])],
                [(1, 1), (5, 1), (7, 1), (4, 3), (8, 2)], TOLERANCE), ids=str,
)  # fmt: skip
def test_ragged_decode(layout: str, shape: tuple[int, list[int]], rows: tuple[int, int], dtype: torch.dtype) -> None:
    decoded_as_by_the_reference(LAYOUTS[layout], *shape, *rows, dtype)


def test_groups_of_no_power_of_two() -> None:
    layout = LayerLayout.from_heads([HeadSpec("scored", 75, 4, 27, 67, 2), HeadSpec("scored", 9, 2, 5, 66, 2)])
    decoded_as_by_the_reference(layout, 80, [150, 3, 61], 7, 1, torch.float16)


@pytest.mark.parametrize("layout", [QUANTISED, WINDOW], ids=["quantised", "window"])
def test_more_rows_than_eight_programs_take(layout: LayerLayout) -> None:
    """And more new tokens than one block of them has."""
    decoded_as_by_the_reference(layout, 16, [40, 3], 4, 18, torch.float16)


def test_more_new_tokens_than_the_window_has() -> None:
    decoded_as_by_the_reference(WINDOW, 16, [40, 3], 2, 12, torch.float32)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 3])
def test_many_items_of_a_head(halves: int, dtype: torch.dtype, length: int) -> None:
    """Which are joined in groups, the last of which is not full, and of a short text only some: 21, 10 and 1."""
    layout = LayerLayout.from_heads([HeadSpec("full", 330 * halves, 4, 27), HeadSpec("recent", 40, 1, 39, 8, 4)])
    seen = [1000, 155 * halves, 7]
    chosen = Tuning(16 * halves, halves, programs=200)
    decoded_as_by_the_reference(layout, 64, seen, 3, length, dtype, chosen)


def test_all_items_of_a_head_are_joined_at_once() -> None:
    """Where there are more than a group of a head with many has, and at most twice as many: 12, 9 and 1."""
    layout = LayerLayout.from_heads([HeadSpec("full", 190, 4, 27), HeadSpec("recent", 40, 1, 39, 8, 4)])
    assert work_list(layout, 64, 16, 100, 16, most=128).fan == 16
    decoded_as_by_the_reference(layout, 64, [1000, 140, 7], 3, 1, torch.float16, Tuning(16, 1, programs=200))


def decoded_as_by_the_reference(
    layout: LayerLayout, head_dim: int, seen: list[int], group: int, length: int, dtype: torch.dtype,
    chosen: Tuning = LITTLE,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(group)
    batch, heads = len(seen), layout.num_kv_heads
    keys, values = sides(layout, head_dim, dtype, batch)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(batch, count, length, head_dim, generator=generator).to(DEVICE, dtype)

    query, new = draw(heads * group), (draw(heads), draw(heads)) if length > 1 else (None, None)
    counts = torch.tensor(seen, dtype=torch.int32, device=DEVICE)
    out = decode_kernel.ragged_decode(query, keys, values, layout, counts, 0.1, *new, None, chosen=chosen)
    assert out.dtype == dtype
    expected = decode_reference.ragged_decode(
        query.cpu(), on_cpu(keys), on_cpu(values), layout, seen, scaling=0.1,
        **({"new_keys": new[0].cpu(), "new_values": new[1].cpu()} if length > 1 else {}),
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("sink", [0, 1], ids=["no anchor", "anchor"])
@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4), (4, 8), (8, 4), (67, 3), (66, 2)], ids=str)
def test_many_tokens_beside_a_heavy_one_are_not_lost(bits: tuple[int, int], sink: int) -> None:
    """One item of 8,192 slots, whose first token draws 98 % of the attention and has a value of almost nothing, as
    sinks have: the output is what the others add up to, each with a weight of 2.4e-6."""
    count, head_dim, heavy = 8192, 64, 12.9  # e^12.9 / (e^12.9 + 8191) = 0.98
    layout = LayerLayout.from_heads([HeadSpec("recent", count, sink, 64, *bits)])
    keys, values = (Buffers(layout, [b], head_dim, torch.float16, DEVICE, 1) for b in bits)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, count, head_dim, generator=generator) * 0.1
    v = torch.randn(1, 1, count, head_dim, generator=generator) * 0.1 + torch.linspace(0.5, 1.5, head_dim)
    k[:, :, 0], v[:, :, 0] = 0, 0.001
    k[:, :, 0, 0] = heavy
    for stored, new in ((keys, k), (values, v)):
        slot = torch.arange(count).expand(1, 1, -1).to(DEVICE)
        stored.write(layout.classes[0], new.to(DEVICE), slot, slot[:, :, :0], slot[:, :, :0])
        stored.write_anchor(layout.classes[0], new.to(DEVICE), slot)
    query = torch.zeros(1, 2, 1, head_dim, dtype=torch.float16)
    query[..., 0] = 1
    out = decode_kernel.ragged_decode(
        query.to(DEVICE), keys, values, layout, [count], 1.0, None, None, None, chosen=Tuning(64, 1, 2, 1)
    )
    expected = decode_reference.ragged_decode(query, on_cpu(keys), on_cpu(values), layout, [count], scaling=1.0)
    # 4 bits without an anchor read 12.9 beside zeros as 11.4, which draws 91 % of the attention.
    assert 0.005 < expected.abs().min() < expected.abs().max() < 0.15
    torch.testing.assert_close(out.cpu().double(), expected, atol=0, rtol=1e-2)


def test_sequences_are_where_the_device_says() -> None:
    """Two sequences of a store of four; where they are is read when the kernels run."""
    layout, head_dim, dtype = QUANTISED, 64, torch.float16
    keys, values = sides(layout, head_dim, dtype, 4)
    places = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    seen, heads = torch.tensor([150, 30], dtype=torch.int32, device=DEVICE), layout.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, layout.scored_slots, generator=generator).half().to(DEVICE)
    new = torch.randn(2, 2, heads, head_dim, generator=generator).to(DEVICE, dtype)
    score = torch.randn(2, heads, generator=generator).to(DEVICE)
    query = torch.randn(2, heads * 5, 1, head_dim, generator=generator).to(DEVICE, dtype)
    picked = [on_cpu(stored) for stored in (keys, values)]
    untouched = [on_cpu(stored) for stored in (keys, values)]
    own = scores[[2, 0]].cpu()
    for stored in picked:
        stored.take(torch.tensor([2, 0]))
    append_kernel.append(keys, values, scores, layout, *new, score, seen, places)
    append_reference.append(*picked, own, layout, *new.cpu(), score.cpu(), seen.tolist())
    assert torch.equal(scores[[2, 0]].cpu(), own)
    for ours, theirs, before in zip((keys, values), picked, untouched, strict=True):
        for a, b, c in zip(ours.tensors(), theirs.tensors(), before.tensors(), strict=True):
            assert torch.equal(a[[2, 0]].cpu(), b)
            assert torch.equal(a[[1, 3]].cpu(), c[[1, 3]])
    out = decode_kernel.ragged_decode(query, keys, values, layout, seen + 1, 0.1, None, None, None, places)
    expected = decode_reference.ragged_decode(query.cpu(), *picked, layout, [151, 31], scaling=0.1)
    torch.testing.assert_close(out.cpu().double(), expected, atol=3e-3, rtol=3e-3)


def test_padding_among_new_tokens_is_not_seen() -> None:
    seen, length, head_dim = [9, 140], 3, 64
    keys, values = sides(QUANTISED, head_dim, torch.float32, 2)
    shape = (2, QUANTISED.num_kv_heads, length, head_dim)
    query, new_keys, new_values = (torch.randn(shape, device=DEVICE) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :2] = False
    out = decode_kernel.ragged_decode(query, keys, values, QUANTISED, seen, 0.1, new_keys, new_values, mask)
    expected = decode_reference.ragged_decode(
        query.cpu(), on_cpu(keys), on_cpu(values), QUANTISED, seen, scaling=0.1, new_keys=new_keys.cpu(),
        new_values=new_values.cpu(), new_mask=mask.cpu(),
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-5, rtol=2e-5)


def test_padding_in_place_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few new tokens, which the kernel takes, and on a layer with a window, which it does not."""
    monkeypatch.setenv("KVCOMPILE_KERNELS", "triton")
    seen, length, head_dim, pad = [9, 140], 5, 64, torch.tensor([2, 0], device=DEVICE)
    for layout in (QUANTISED, WINDOW):
        keys, values = sides(layout, head_dim, torch.float32, 2)
        shape = (2, layout.num_kv_heads, length, head_dim)
        query, new_keys, new_values = (torch.randn(shape, device=DEVICE) for _ in range(3))
        new = {"new_keys": new_keys, "new_values": new_values, "new_pad": pad}
        out = ragged_decode(query, keys, values, layout, seen, scaling=0.1, **new)
        expected = decode_reference.ragged_decode(
            query.cpu(), on_cpu(keys), on_cpu(values), layout, seen, scaling=0.1,
            **{name: tensor.cpu() for name, tensor in new.items()},
        )  # fmt: skip
        assert out.isfinite().all()
        for b, first in enumerate(pad.tolist()):
            found, wanted = out.cpu().double()[b, :, first:], expected[b, :, first:]
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("programs", [1, 3, 8, 50, 1000])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_work_list_covers_every_slot_once(layout: LayerLayout, programs: int) -> None:
    work = work_list(layout, 64, 16, programs, 32, most=16)
    assert len(work.items) <= max(programs, layout.num_kv_heads) + layout.num_kv_heads - 1
    assert max(work.counts) <= 16
    for h, row in enumerate(layout.rows):
        items = [item for item in work.items if item.head == h]
        assert [item.part for item in items] == list(range(work.counts[h]))
        for filled in {0, 1, min(31, row.capacity), row.capacity // 2, row.capacity}:
            spans = [span(item, work.counts[h], work.blocks[h], filled, 32) for item in items]
            assert [slot for start, stop in spans for slot in range(start, stop)] == list(range(filled))
            short = -(-filled // 32) < work.counts[h]
            assert all(stop > start for start, stop in spans[: -(-filled // 32)]) or not short, "spread over as many"


def test_a_work_list_of_millions_of_slots() -> None:
    """Products of which the kernel's 32 bits hold."""
    work = work_list(LayerLayout.from_heads([HeadSpec("full", 4_000_000, 4, 64)]), 128, 16, 500, 16, most=128)
    filled = 3_999_990
    assert -(-filled // 16) * max(item.last for item in work.items) < 1 << 31
    spans = [span(item, work.counts[0], work.blocks[0], filled, 16) for item in work.items]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == filled
    assert max(stop - start for start, stop in spans) < 1.05 * filled / len(spans)


def test_programs_are_done_at_about_the_same_time() -> None:
    """Whatever the budgets: where all begin the longest items first, and go on with the next when they are done."""
    layout = LayerLayout.from_heads(
        [HeadSpec("scored", n, 4, 64, b, b) for n, b in ((20_000, 16), (9_000, 8), (3_000, 4), (700, 16))]
    )
    work = work_list(layout, 128, 16, 24, 64, most=64)
    done = [0.0] * 24
    for length in sorted(map(work.length, range(len(work.items))), reverse=True):
        done[done.index(min(done))] += length
    assert max(done) < 1.05 * sum(done) / len(done)
