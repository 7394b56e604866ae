"""What writes the store, against the references, over odd shapes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import assert_reads_alike

from kvcompile.kernels import Buffers, HeadClass, HeadSpec, LayerLayout, Transform, append, compact
from kvcompile.kernels.append import dense as append_dense
from kvcompile.kernels.append import reference as append_reference
from kvcompile.kernels.codecs import CODECS, codec_of
from kvcompile.kernels.compact import reference as compact_reference

POLICIES = ["full", "recent", "snapkv", "scored", "scored", "h2o"]
BITS = [16, *CODECS]
CPU = torch.device("cpu")


@st.composite
def specs(draw: st.DrawFn) -> HeadSpec:
    capacity = draw(st.integers(1, 12))
    sink = draw(st.integers(0, min(4, capacity - 1)))
    return HeadSpec(
        draw(st.sampled_from(POLICIES)), capacity, sink, draw(st.integers(1, capacity - sink)),
        draw(st.sampled_from(BITS)), draw(st.sampled_from(BITS)),
    )  # fmt: skip


def fitting(heads: list[HeadSpec], head_dim: int) -> list[HeadSpec]:
    """The same heads, of codecs those that can store this many elements."""

    def own(bits: int) -> int:
        return bits if bits == 16 or codec_of(bits).fits(head_dim) else 8

    return [replace(head, k_bits=own(head.k_bits), v_bits=own(head.v_bits)) for head in heads]


def sides(layout: LayerLayout, head_dim: int, dtype: torch.dtype, batch: int) -> list[Buffers]:
    return [
        Buffers(layout, [getattr(c, name) for c in layout.classes], head_dim, dtype, CPU, batch)
        for name in ("k_bits", "v_bits")
    ]


@settings(max_examples=60, deadline=None)
@given(
    heads=st.lists(specs(), min_size=1, max_size=4),
    head_dim=st.sampled_from([2, 16, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    steps=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_append(
    heads: list[HeadSpec], head_dim: int, dtype: torch.dtype, lengths: list[int], steps: int, seed: int
) -> None:
    """In C where there is a compiler, and through torch."""
    generator = torch.Generator().manual_seed(seed)
    layout, batch = LayerLayout.from_heads(fitting(heads, head_dim)), len(lengths)
    empty = sides(layout, head_dim, dtype, batch)
    before = torch.randint(-3, 3, (batch, layout.scored_slots), generator=generator).half()  # with ties
    operations = (append_reference.append, append, append_dense.append)
    states = [(*copy.deepcopy(empty), before.clone()) for _ in operations]
    for step in range(steps):
        seen = [n + step for n in lengths]
        shape = (batch, layout.num_kv_heads, head_dim)
        k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        score = torch.randint(-3, 3, shape[:2], generator=generator).float() if layout.scored_slots else None
        for operation, state in zip(operations, states, strict=True):
            operation(*state, layout, k, v, score, seen)
    (*expected, expected_scores), *found = states
    for *ours, scores in found:
        assert torch.equal(scores, expected_scores)
        for one, two in zip(ours, expected, strict=True):
            for cls in layout.classes:
                assert_reads_alike(one, two, cls, moved=False)


def operation(name: str) -> Callable[..., None]:
    if name == "triton":
        pytest.importorskip("triton")
    return append if name == "api" else importlib.import_module(f"kvcompile.kernels.append.{name}").append


@pytest.mark.parametrize("heavy", [4, 2500])
@pytest.mark.parametrize("name", ["reference", "dense", "api", "triton"])
def test_of_equal_scores_the_lower_slot_stays_and_a_heavy_one_before_one_that_leaves(name: str, heavy: int) -> None:
    """In C where there is a compiler, behind `api`."""
    device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    capacity = heavy + 3
    layout = LayerLayout.from_heads([HeadSpec("scored", capacity, 1, 2, 32, 32)])
    stores = [Buffers(layout, [32], 2, torch.float32, device, 1) for _ in range(2)]
    for stored in stores:
        stored.exact[0] = torch.arange(capacity)[:, None]  # every token's number is its key and its value
    # A sink, heavy tokens (the second and the last equally low), a ring of two.
    start = [9.0, 1.0, 0.0, *[2.0] * (heavy - 3), 0.0, 1.0, 0.0]
    scores = torch.tensor([start], dtype=torch.float16, device=device)
    last = capacity - 3
    expected = torch.arange(capacity)
    for step, (score, victim) in enumerate(
        [
            (1.0, last),  # the ring loses 1: above two equally low ones, of which the last goes
            (5.0, None),  # 0, no better than the other one that is left: it is lost
            (1.0001, 2),  # 1.0, above that one
            (0.0, last),  # 5.0, above three equally low ones, of which the last goes
            (0.0, None),  # 1.0001, as float16 no better than the two that are left
        ]
    ):
        ring = capacity - 2 + step % 2
        if victim is not None:
            expected[victim] = expected[ring]
        expected[ring] = capacity + step
        new = torch.full((1, 1, 2), float(capacity + step), device=device)
        given_score = torch.tensor([[score]], device=device)
        operation(name)(*stores, scores, layout, new, new, given_score, [capacity + step])
        for stored in stores:
            assert stored.exact[0, :, 0].tolist() == expected.tolist(), f"step {step}"
    assert scores[0].tolist() == [9.0, 1.0, 1.0, *[2.0] * (heavy - 3), 5.0, 0.0, 0.0]


def test_append_refuses_shapes_that_do_not_fit() -> None:
    layout = LayerLayout.from_heads([HeadSpec("scored", 5, 1, 2)] * 2)
    stores, scores = sides(layout, 8, torch.float32, 2), torch.zeros(2, 10, dtype=torch.float16)
    new, score = torch.zeros(2, 2, 8), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="for a store of"):
        append(*stores, scores, layout, new[:1], new, score, [0, 0])
    with pytest.raises(ValueError, match="lengths for a store of"):
        append(*stores, scores, layout, new, new, score, [0])
    with pytest.raises(ValueError, match="and the new ones"):
        append(*stores, scores, layout, new, new, None, [0, 0])


def transform_of(layout: LayerLayout, head_dim: int, generator: torch.Generator) -> Transform:
    """Well-conditioned matrices that are no rotations."""
    parts = []
    for _ in range(2):
        matrix = torch.eye(head_dim) + torch.randn(layout.num_kv_heads, head_dim, head_dim, generator=generator) * 0.1
        mean = torch.randn(layout.num_kv_heads, head_dim, generator=generator)
        parts += [matrix, torch.linalg.inv(matrix), mean]
    return Transform(*parts)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.lists(specs(), min_size=1, max_size=4),
    head_dim=st.sampled_from([2, 16, 96]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    transformed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_compact(
    heads: list[HeadSpec], head_dim: int, dtype: torch.dtype, lengths: list[int], transformed: bool, seed: int
) -> None:
    """Prompts of all lengths side by side, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    layout, batch, columns = LayerLayout.from_heads(fitting(heads, head_dim)), len(lengths), max(1, *lengths)
    transform = transform_of(layout, head_dim, generator) if transformed else None
    ours = sides(layout, head_dim, dtype, batch)
    theirs = copy.deepcopy(ours)
    shape = (batch, layout.num_kv_heads, columns, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    tokens = chosen(layout, lengths, columns, generator)
    compact(*ours, layout, k, v, tokens, lengths, transform)
    compact_reference.compact(*theirs, layout, k, v, tokens, torch.tensor(lengths), transform)
    for one, two in zip(ours, theirs, strict=True):
        for cls in layout.classes:
            for b, n in enumerate(lengths):
                check_slots(one, two, cls, b, min(n, cls.capacity))


def chosen(layout: LayerLayout, lengths: list[int], columns: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Columns that every head keeps, of a sequence's own ones first."""
    found = []
    for cls in layout.classes:
        own = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None, None]
        drawn = torch.rand(len(lengths), cls.count, columns, generator=generator) + own
        found.append(drawn.argsort(2, descending=True)[:, :, : cls.capacity])
    return found


def check_slots(one: Buffers, two: Buffers, cls: HeadClass, b: int, filled: int) -> None:
    """Of one sequence, what has been filled."""
    if not filled:
        return
    assert_reads_alike(one.one(b), two.one(b), cls, slice(filled))
    anchors = one.anchor(cls), two.anchor(cls)
    if anchors[0] is not None and anchors[1] is not None:
        torch.testing.assert_close(anchors[0][b], anchors[1][b], atol=1e-5, rtol=1e-2)


def test_compact_refuses_shapes_that_do_not_fit() -> None:
    layout = LayerLayout.from_heads([HeadSpec("recent", 3, 1, 2)] * 2)
    stores, prompt = sides(layout, 8, torch.float32, 1), torch.zeros(1, 2, 9, 8)
    with pytest.raises(ValueError, match="do not fit 1 sequences"):
        compact(*stores, layout, prompt[:, :1], prompt[:, :1], [torch.zeros(1, 2, 3, dtype=torch.int64)], [9])
    with pytest.raises(ValueError, match="2 lengths for 1 sequences"):
        compact(*stores, layout, prompt, prompt, [torch.zeros(1, 2, 3, dtype=torch.int64)], [9, 9])
    with pytest.raises(ValueError, match="for 1 x 2 heads of 3 slots"):
        compact(*stores, layout, prompt, prompt, [torch.zeros(1, 2, 4, dtype=torch.int64)], [9])
