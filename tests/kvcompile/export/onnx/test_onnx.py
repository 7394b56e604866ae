"""A decoder with its cache as ONNX, run by ONNX Runtime beside our own runtime, on tiny models of every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_session import Session, exported
from tiny_models import CONFIGS, SHAPE, make_artifact, tiny_model
from transformers import LlamaConfig, Phi3Config

from kvcompile.artifacts import Artifact, ModelError
from kvcompile.runtime import attach

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


CHUNKS = (30, 1, 1, 1, 5, 1, 40, 1, 1)
TOLERANCE = 5e-5


def compare(model: Any, artifact: Artifact, session: Session, chunks: Sequence[int], sync: bool = False) -> list[float]:
    """Largest difference of logits after each of several calls with so many tokens. With `sync`, both start every call
    from the same stored bytes: codes at the border of two levels fall either way, as sums are not ordered alike."""
    batch = artifact.target.batch
    ids = np.random.default_rng(0).integers(3, 97, (batch, sum(chunks)))
    differences, first = [], 0
    with attach(model, artifact) as kv, torch.inference_mode():
        cache = kv.new_cache(batch)
        for length in chunks:
            part = ids[:, first : first + length]
            first += length
            if sync:
                session.fill(cache, artifact)
            ours = model(torch.tensor(part), past_key_values=cache, logits_to_keep=1).logits[:, -1].numpy()
            differences.append(float(np.abs(session(part) - ours).max()))
    return differences


REFUSED = (
    "gemma2", "gemma4", "gemma4-shared", "gemma4-unified", "gpt-oss", "llama4", "olmo2", "olmo3", "qwen3-next",
    "qwen3.5", "qwen3.5-moe",
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_the_graph_has_no_parts_for_are_refused(name: str, tmp_path: Path) -> None:
    model = tiny_model(CONFIGS[name])
    with pytest.raises(ModelError, match=f"cannot write a '{model.config.model_type}' model as ONNX"):
        exported(model, make_artifact(model, 20), tmp_path)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in REFUSED])
def test_every_family_gives_the_runtimes_logits(name: str, tmp_path: Path) -> None:
    model = tiny_model(CONFIGS[name])
    artifact = make_artifact(model, 20, policy="scored", recent=6)
    session = Session(exported(model, artifact, tmp_path))
    assert max(compare(model, artifact, session, CHUNKS)) < TOLERANCE


SHAPES: dict[str, dict[str, Any]] = {
    "full": {"context": 128},
    "beyond the context": {"context": 32},
    "recent": {"capacity": 20},
    "recent without sinks": {"capacity": 20, "sink": 0},
    "one slot": {"capacity": 1, "sink": 0},
    "one heavy slot": {"capacity": 3, "policy": "scored", "sink": 1, "recent": 1},
    "scored without sinks": {"capacity": 9, "policy": "scored", "sink": 0, "recent": 4},
    "scored without heavy slots": {"capacity": 9, "policy": "scored"},
    "ragged": {"capacity": [[5, 20, 9], [20, 20, 5], [33, 1, 2]], "policy": "scored", "recent": 3},
    "batch of three": {"capacity": [[5, 20, 9], [20, 20, 5], [33, 1, 2]], "policy": "scored", "recent": 3, "batch": 3},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_head_gives_the_runtimes_logits(shape: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, **shape)
    session = Session(exported(model, artifact, tmp_path))
    assert max(compare(model, artifact, session, CHUNKS)) < TOLERANCE


def test_sliding_layers_and_a_batch(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["gemma3"])
    artifact = make_artifact(model, 20, policy="scored", recent=6, batch=2)
    session = Session(exported(model, artifact, tmp_path))
    assert max(compare(model, artifact, session, (7, 1, 30, 1, 2, 1))) < TOLERANCE


STORED: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": [(8, 8)]},
    "4 bits": {"bits": [(4, 4)]},
    "8 and 4": {"bits": [(8, 4)]},
    "mixed": {"bits": [(8, 4), (32, 8), (4, 32)]},
    "without sinks": {"bits": [(4, 8)], "sink": 0},
    "scored": {"bits": [(8, 4), (4, 8)], "policy": "scored", "recent": 6},
    "scored, batch of three": {"bits": [(8, 4), (4, 8)], "policy": "scored", "recent": 6, "batch": 3},
    "float16": {"dtype": "float16", "policy": "scored", "recent": 6},
    "bfloat16": {"dtype": "bfloat16", "policy": "scored", "recent": 6},
    "bfloat16, quantised": {"dtype": "bfloat16", "bits": [(8, 4), (16, 8), (4, 16)], "policy": "scored", "recent": 6},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_every_codec_gives_the_runtimes_logits(stored: dict[str, Any], tmp_path: Path) -> None:
    """From the same stored bytes, call by call."""
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, 20, **stored)
    session = Session(exported(model, artifact, tmp_path))
    differences = compare(model, artifact, session, CHUNKS, sync=True)
    assert sorted(differences)[-2] < 2e-3  # one code of the new token may fall the other way
    assert np.median(differences) < 5e-4


FEW_BITS: dict[str, dict[str, Any]] = {
    "3 bits": {"bits": [(67, 3)]},
    "2 bits": {"bits": [(66, 2)]},
    "keys of 1 bit": {"bits": [(65, 4)]},
    "as values too": {"bits": [(3, 67), (2, 66), (4, 65)]},
    "mixed": {"bits": [(67, 3), (66, 2), (8, 3), (65, 4), (32, 2)], "policy": "scored", "recent": 6},
    "without sinks": {"bits": [(67, 3), (65, 2)], "sink": 0},
    "batch of three": {"bits": [(67, 3), (8, 3)], "policy": "scored", "recent": 6, "batch": 3},
    "bfloat16": {"dtype": "bfloat16", "bits": [(66, 3), (16, 2)]},
}


@pytest.mark.parametrize("size", [16, 192])
@pytest.mark.parametrize("stored", FEW_BITS.values(), ids=FEW_BITS)
def test_few_bits_give_the_runtimes_logits(stored: dict[str, Any], size: int, tmp_path: Path) -> None:
    """From the same stored bytes, call by call, in as many as promised. 192 elements are several groups, and the
    sections of keys have one or two."""
    model = tiny_model(LlamaConfig(**SHAPE, head_dim=size))
    artifact = make_artifact(model, 20, **stored)
    session = Session(exported(model, artifact, tmp_path))
    assert sum(array.nbytes for array in session.arrays.values()) == artifact.bytes.resident
    differences = compare(model, artifact, session, CHUNKS, sync=True)
    assert np.median(differences) < 5e-4  # a code of the new token may fall the other way


@pytest.mark.parametrize("stored", [FEW_BITS["3 bits"], FEW_BITS["as values too"], FEW_BITS["batch of three"]])
def test_the_graph_writes_the_runtimes_bytes(stored: dict[str, Any], tmp_path: Path) -> None:
    """A prompt and what follows; sums that are not ordered alike put a code in a hundred elsewhere at most."""
    model = tiny_model(LlamaConfig(**SHAPE, head_dim=16))
    artifact = make_artifact(model, 20, **stored)
    folder = exported(model, artifact, tmp_path)
    session, runtime = Session(folder), Session(folder)
    ids = np.random.default_rng(0).integers(3, 97, (artifact.target.batch, 34))
    with attach(model, artifact) as kv, torch.inference_mode():
        cache = kv.new_cache(artifact.target.batch)
        for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:]):
            session(part)
            model(torch.tensor(part), past_key_values=cache)
        runtime.fill(cache, artifact)
    for name, array in session.arrays.items():
        if "codes" in name:
            assert (array == runtime.arrays[name]).mean() > 0.99


def test_equal_scores_are_decided_as_by_the_runtime(tmp_path: Path) -> None:
    """Of a bias this high float16 leaves only a few different scores, so that most choices are between equal ones."""
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, [[5, 20, 9], [20, 20, 5], [33, 1, 2]], policy="scored", recent=3)
    assert artifact.scorer is not None
    artifact = replace(artifact, scorer=replace(artifact.scorer, bias=np.full_like(artifact.scorer.bias, 5000)))
    session = Session(exported(model, artifact, tmp_path))
    chunks = (30, *[1] * 12, 5, *[1] * 6, 20, *[1] * 6)
    assert max(compare(model, artifact, session, chunks)) < TOLERANCE
    different = [len(np.unique(array)) for name, array in session.arrays.items() if "score" in name]
    assert len(different) > 3
    assert 1 < max(different) < 10


def test_two_groups_of_scales(tmp_path: Path) -> None:
    shape = SHAPE | {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = tiny_model(LlamaConfig(**shape))
    artifact = make_artifact(model, 20, bits=[(8, 4), (4, 8)], policy="scored", recent=6)
    assert artifact.model.head_dim == 80
    session = Session(exported(model, artifact, tmp_path))
    assert np.median(compare(model, artifact, session, CHUNKS, sync=True)) < 5e-4


def test_part_of_a_head_rotated(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = tiny_model(Phi3Config(**SHAPE, sliding_window=None, rope_parameters=rope))
    assert model.get_decoder().rotary_emb.inv_freq.numel() * 4 == model.config.hidden_size // 6
    artifact = make_artifact(model, 20, policy="scored", recent=6)
    session = Session(exported(model, artifact, tmp_path))
    assert max(compare(model, artifact, session, CHUNKS)) < TOLERANCE


@settings(max_examples=12, deadline=None)
@given(chunks=st.lists(st.integers(1, 24), min_size=1, max_size=8))
def test_any_chunks(chunks: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "chunks"
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, [[5, 20, 9], [20, 20, 5], [33, 1, 2]], policy="scored", recent=3)
    if not folder.exists():
        exported(model, artifact, folder)
    assert max(compare(model, artifact, Session(folder), chunks)) < TOLERANCE


def test_buffers_need_not_be_written_in_place(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, 20, policy="scored", recent=6, bits=[(8, 4), (32, 32)])
    folder = exported(model, artifact, tmp_path)
    one, other = Session(folder), Session(folder, bound=False)
    ids = np.random.default_rng(0).integers(3, 97, (1, 40))
    for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:32], ids[:, 32:38], ids[:, 38:39]):
        np.testing.assert_array_equal(one(part), other(part))
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


def test_prompts_of_unequal_length(tmp_path: Path) -> None:
    """Rows end where their prompts end; each sequence goes on as it would alone."""
    model = tiny_model(CONFIGS["llama"])
    batch = make_artifact(model, 20, policy="scored", recent=6, batch=3)
    session = Session(exported(model, batch, tmp_path / "three"))
    alone = exported(model, make_artifact(model, 20, policy="scored", recent=6), tmp_path / "one")
    ids = np.random.default_rng(0).integers(3, 97, (3, 30))
    lengths, more = [30, 7, 22], np.array([[5], [6], [7]])
    found = [session(ids, lengths), session(more), session(np.tile(more, 3), [3, 0, 2])]
    for b, length in enumerate(lengths):
        one = Session(alone)
        single = [one(ids[b : b + 1, :length]), one(more[b : b + 1])]
        if (rest := (3, 0, 2)[b]) > 0:
            single.append(one(np.tile(more[b : b + 1], rest)))
        for theirs, ours in zip(found, single, strict=False):
            assert np.abs(theirs[b] - ours[0]).max() < TOLERANCE
