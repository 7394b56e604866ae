"""The GPU kernels that write the store against the references: compiled on a GPU, else in the interpreter."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from device_stores import DEVICE, FEW_BITS, QUANTISED, TOLERANCE, on_cpu, sides
from stored import assert_reads_alike

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, Transform
from kvcompile.kernels.append import reference as append_reference
from kvcompile.kernels.arguments import ORDER
from kvcompile.kernels.compact import reference as compact_reference
from kvcompile.runtime.cut import kept_columns
from kvcompile.runtime.pages import PageLayout

pytest.importorskip("triton")
from kvcompile.kernels.append import triton as append_kernel
from kvcompile.kernels.compact import triton as compact_kernel


def assert_stored_alike(
    ours: Sequence[Buffers], theirs: Sequence[Buffers], layout: LayerLayout, moved: bool = False
) -> None:
    for one, two in zip(ours, theirs, strict=True):
        found, tolerance = on_cpu(one), 1e-2 if moved else 0
        torch.testing.assert_close(found.anchors, two.anchors, atol=tolerance, rtol=tolerance)
        for cls in layout.classes:
            assert_reads_alike(found, two, cls, moved=moved)


@pytest.mark.parametrize("trial", range(24))
def test_append_and_compact(trial: int) -> None:
    rng, generator = random.Random(trial), torch.Generator().manual_seed(trial)
    head_dim, dtype = rng.choice([16, 64, 80, 96, 128]), rng.choice(list(TOLERANCE))
    known = [16, *(codec.id for codec in ORDER if codec.fits(head_dim))]
    heads = []
    for _ in range(rng.randint(1, 4)):
        capacity = rng.randint(1, 12)
        sink = rng.randint(0, min(4, capacity - 1))
        policy = rng.choice(["full", "recent", "snapkv", "scored", "scored", "h2o"])
        bits = rng.choice(known), rng.choice(known)
        heads.append(HeadSpec(policy, capacity, sink, rng.randint(1, capacity - sink), *bits))
    layout = LayerLayout.from_heads(heads)
    lengths = [rng.randint(0, 20) for _ in range(rng.randint(1, 3))]
    ours = sides(layout, head_dim, dtype, len(lengths))
    scores = torch.randint(-3, 3, (len(lengths), layout.scored_slots), generator=generator).half()  # with ties
    theirs, other_scores, scores = [on_cpu(side) for side in ours], scores.clone(), scores.to(DEVICE)
    for step in range(4):
        seen = [n + step for n in lengths]
        shape = (len(lengths), layout.num_kv_heads, head_dim)
        k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        score = torch.randint(-3, 3, shape[:2], generator=generator).float() if layout.scored_slots else None
        on_device = None if score is None else score.to(DEVICE)
        append_kernel.append(*ours, scores, layout, k.to(DEVICE), v.to(DEVICE), on_device, seen)
        append_reference.append(*theirs, other_scores, layout, k, v, score, seen)
    assert torch.equal(scores.cpu(), other_scores)
    assert_stored_alike(ours, theirs, layout)

    prompts, parts = [rng.randint(0, 20) for _ in lengths], []
    for _ in range(2):
        shape = (layout.num_kv_heads, head_dim, head_dim)
        matrix = torch.eye(head_dim) + torch.randn(shape, generator=generator) * 0.1
        mean = torch.randn(layout.num_kv_heads, head_dim, generator=generator)
        parts += [matrix, torch.linalg.inv(matrix), mean]
    transform = rng.choice([None, Transform(*parts)])
    moved = None if transform is None else Transform(*(part.to(DEVICE) for part in parts))
    columns = max(1, *prompts)
    # As a model has them: heads side by side in a token, which the kernel reads as they lie.
    shape = (len(lengths), columns, layout.num_kv_heads, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    pad = columns - torch.tensor(prompts)
    tokens = [
        kept_columns(c, columns, pad, torch.randn(len(lengths), c.count, columns, generator=generator))
        for c in layout.classes
    ]
    given = [t.to(DEVICE) for t in tokens], torch.tensor(prompts, dtype=torch.int32, device=DEVICE)
    compact_kernel.compact(*ours, layout, k.to(DEVICE), v.to(DEVICE), *given, moved)
    compact_reference.compact(*theirs, layout, k, v, tokens, prompts, transform)
    # What is beyond a prompt is as before.
    assert_stored_alike(ours, theirs, layout, moved=transform is not None)


@pytest.mark.parametrize("first", range(1, 9))
def test_the_lowest_score_wherever_scores_begin(first: int) -> None:
    """Scores are read eight at a time: a head's may begin and end anywhere."""
    heads = [HeadSpec("scored", capacity, sink, 3, 16, 16) for capacity, sink in ((first + 3, 0), (53, 4), (30, 1))]
    layout, lengths, generator = LayerLayout.from_heads(heads), [80, 41, 53], torch.Generator().manual_seed(first)
    ours = sides(layout, 16, torch.float32, len(lengths))
    scores = torch.randint(-30, 30, (len(lengths), layout.scored_slots), generator=generator).half()
    theirs, other_scores, scores = [on_cpu(side) for side in ours], scores.clone(), scores.to(DEVICE)
    for step in range(6):
        seen = [n + step for n in lengths]
        k, v = (torch.randn(len(lengths), 3, 16, generator=generator) for _ in range(2))
        score = torch.randint(-30, 30, (len(lengths), 3), generator=generator).float()
        append_kernel.append(*ours, scores, layout, k.to(DEVICE), v.to(DEVICE), score.to(DEVICE), seen)
        append_reference.append(*theirs, other_scores, layout, k, v, score, seen)
        assert torch.equal(scores.cpu(), other_scores)
    for one, two in zip(ours, theirs, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(one.tensors(), two.tensors(), strict=True))


@pytest.mark.parametrize("layout", [QUANTISED, FEW_BITS], ids=["quantised", "few bits"])
def test_compact_in_pages(layout: LayerLayout) -> None:
    """Sequences that lie further apart than they are long, and a prompt in a room for a longer one."""
    head_dim = 64
    generator = torch.Generator().manual_seed(0)
    page = PageLayout.of([layout], head_dim, torch.float16)
    pool = torch.zeros(3, page.nbytes + 1024, dtype=torch.int8, device=DEVICE)[:, : page.nbytes]
    store = page.store(0, pool, None)
    theirs = [on_cpu(side) for side in (store.keys, store.values)]
    room = torch.randn(2, 3, layout.num_kv_heads, 200, head_dim, generator=generator).half()
    k, v, seen = room[0, :, :, :150], room[1, :, :, :150], [150, 3, 61]
    tokens = [kept_columns(c, 150, 150 - torch.tensor(seen), None) for c in layout.classes]
    on_device = room.to(DEVICE)[:, :, :, :150]
    compact_kernel.compact(store.keys, store.values, layout, *on_device, [t.to(DEVICE) for t in tokens], seen, None)
    compact_reference.compact(*theirs, layout, k, v, tokens, seen, None)
    assert_stored_alike((store.keys, store.values), theirs, layout)
