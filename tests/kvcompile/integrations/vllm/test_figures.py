"""Bytes of a page, counted without torch: those that the plugin's layers lay out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import Artifact, read
from kvcompile.assemble.placement import place
from kvcompile.integrations.vllm.figures import Figures, page_bytes
from kvcompile.integrations.vllm.placement import head_orders
from kvcompile.kernels.codecs import CODECS
from kvcompile.runtime.layouts import layer_layout
from kvcompile.runtime.pages import PageLayout

REFERENCES = sorted((Path(__file__).parents[4] / "artifacts" / "reference").glob("*.kvb"))


def laid_out(artifact: Artifact, ranks: int) -> int:
    """The page that all ranks have, as the plugin finds it."""
    count, layers = artifact.model.num_kv_heads, range(artifact.model.num_layers)
    orders = (head_orders(artifact, ranks) if ranks > 1 else None) or [list(range(count)) for _ in layers]
    here, dtype = max(1, count // ranks), getattr(torch, artifact.target.dtype)
    starts = [rank * count // ranks for rank in range(ranks)]
    heads = [[orders[i][start : start + here] for i in layers] for start in starts]
    layouts = [[layer_layout(artifact, i, rank[i]) for i in layers] for rank in heads]
    least = max(PageLayout.of(each, artifact.model.head_dim, dtype).nbytes for each in layouts)
    return max(PageLayout.of(each, artifact.model.head_dim, dtype, least).nbytes for each in layouts)


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 3, 6])
def test_pages_of_the_reference_artifacts(path: Path, ranks: int) -> None:
    artifact = read(path)
    assert page_bytes(artifact, ranks) == laid_out(artifact, ranks)


@pytest.mark.parametrize("name", ["multi-head", "gemma3", "multi-query"])
@pytest.mark.parametrize("policy", ["scored", "snapkv", "recent"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_codec_and_policy(name: str, policy: str, ranks: int) -> None:
    model = tiny_model(CONFIGS[name])
    bits = [(32, 32), *((k, v) for k in CODECS for v in (*CODECS, 32))]
    artifact = make_artifact(model, 21, policy=policy, recent=4, bits=bits)
    if artifact.model.num_kv_heads % ranks == 0:
        size = np.random.default_rng(0).integers(100, 200, artifact.budgets.capacity.shape)
        artifact = dataclasses.replace(artifact, rank=place(size, ranks).rank)
    assert page_bytes(artifact, ranks) == laid_out(artifact, ranks)


def test_figures_are_those_of_one_sequence() -> None:
    artifact = make_artifact(tiny_model(CONFIGS["llama"]), 32, batch=4)
    found = Figures.of(artifact)
    assert found.bytes_per_sequence * 4 == artifact.bytes.resident
    assert found.full_cache_share == 0.25
    assert found.bytes_per_sequence <= found.page_bytes < found.bytes_per_sequence + 1024


def test_no_torch_for_one_rank() -> None:
    code = (
        "import sys; from kvcompile.artifacts import read\n"
        f"from kvcompile.integrations.vllm.figures import Figures; Figures.of(read({str(REFERENCES[0])!r}))\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'loaded in vain'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
