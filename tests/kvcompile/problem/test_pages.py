"""Targets of serving engines: that as many sequences as were asked for, and one page more, really fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcompile.artifacts import DTYPE_BITS, Artifact, TargetError, anchor_bytes, read, slot_bytes
from kvcompile.compiler import build, resolve
from kvcompile.kernels import HeadSpec, LayerLayout
from kvcompile.kernels.codecs import CODECS
from kvcompile.problem import pages, parse_memory
from kvcompile.problem.pages import page_overhead, page_target
from kvcompile.runtime import pages as runtime_pages
from kvcompile.runtime.layouts import layer_layouts
from kvcompile.runtime.pages import PageLayout

REFERENCES = Path(__file__).parents[3] / "artifacts" / "reference"


@pytest.fixture(scope="module", params=["smollm2-135m-2048-12.5pct", "smollm2-135m-4096-25pct"])
def reference(request: pytest.FixtureRequest) -> Artifact:
    return read(REFERENCES / f"{request.param}.kvb")


def page_bytes(artifact: Artifact) -> int:
    dtype = getattr(torch, artifact.target.dtype)
    return PageLayout.of(layer_layouts(artifact), artifact.model.head_dim, dtype).nbytes


def overhead(artifact: Artifact) -> int:
    return page_overhead(artifact.model.num_layers, artifact.model.head_dim, artifact.target.dtype)


def test_pages_are_aligned_as_the_runtime_has_them() -> None:
    assert (pages.ALIGN, pages.PAGE_ALIGN) == (runtime_pages.ALIGN, runtime_pages.PAGE_ALIGN)


@pytest.mark.parametrize("memory", ["200MB", "123456789"])
@pytest.mark.parametrize("sequences", [1, 7, 40])
def test_the_sequences_and_one_page_more_fit(reference: Artifact, memory: str, sequences: int) -> None:
    artifact = resolve(reference, mem=memory, sequences=sequences, context=1024)
    total, page = parse_memory(memory).bytes(0), page_bytes(artifact)
    assert artifact.target.batch == 1
    assert artifact.bytes.resident <= page <= artifact.bytes.resident + overhead(artifact)
    assert (sequences + 1) * page <= total
    if artifact.bytes.resident < artifact.bytes.full:  # nothing is left that matters
        assert (sequences + 1) * page > 0.97 * total


def test_ranks_have_the_memory_together(reference: Artifact) -> None:
    model, dtype = reference.model, reference.target.dtype
    one, three = (page_target(parse_memory("8GB"), 9, model, dtype, ranks).bytes(0) for ranks in (1, 3))
    assert one == 800_000_000 - overhead(reference)
    assert three == 800_000_000 - 3 * overhead(reference)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_overhead_is_a_bound_for_any_size_of_heads(head_dim: int, dtype: str) -> None:
    own = DTYPE_BITS[dtype]
    filed = [id for id, codec in CODECS.items() if codec.format_version]
    pairs = [(own, own), *((k, v) for k in filed for v in (*filed, own) if CODECS[k].fits(head_dim))]
    heads = [HeadSpec("scored", 9 + i % 4, 2, 3, k, v) for i, (k, v) in enumerate(pairs)]
    layers = [LayerLayout.from_heads(heads[i:]) for i in range(len(heads))]
    page = PageLayout.of(layers, head_dim, getattr(torch, dtype)).nbytes
    resident = sum(
        head.capacity * slot_bytes("scored", head_dim, head.k_bits, head.v_bits)
        + anchor_bytes(head.sink, head_dim, head.k_bits, head.v_bits, own)
        for i in range(len(heads))
        for head in heads[i:]
    )
    assert resident <= page <= resident + page_overhead(len(layers), head_dim, dtype)


def test_the_artifacts_own_batch_gives_way(reference: Artifact) -> None:
    several = resolve(reference, mem="30%", batch=3)
    assert resolve(several, mem="20MB", sequences=2).target.batch == 1


def test_mistakes_are_refused(reference: Artifact) -> None:
    with pytest.raises(TargetError, match="25% says nothing of the memory that an engine divides"):
        resolve(reference, mem="25%", sequences=4)
    with pytest.raises(TargetError, match="give one of them"):
        resolve(reference, mem="8GB", sequences=4, batch=4)
    with pytest.raises(TargetError, match="0 sequences"):
        resolve(reference, mem="8GB", sequences=0)
    with pytest.raises(TargetError, match=r"1000 for 4 sequences at once \(0 bytes\) is below"):
        resolve(reference, mem="1000", sequences=4)


def test_a_build_is_refused_before_the_model_is_looked_at() -> None:
    with pytest.raises(TargetError, match="give one of them"):
        build(None, None, mem="8GB", sequences=4, batch=1)
