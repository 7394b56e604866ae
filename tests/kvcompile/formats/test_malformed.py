"""Files that others wrote and that are damaged, or for another model: one sentence, and nothing is written."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from kvcompile.artifacts import ExchangeError, read
from kvcompile.compiler import resolve

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
LAYERS, HEADS, QUERY_HEADS = 30, 3, 9


def npy(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})
    return file.getvalue()


HEADS_OF = {f"{layer}-{head}": [0.5] for layer, head in np.ndindex(LAYERS, QUERY_HEADS)}
MALFORMED = {
    "empty.npy": (b"", "is not such a file"),
    "text.npy": (b"no array", "is not such a file"),
    "pickle.npy": (npy(np.array([{}], dtype=object)), "is not such a file"),
    "levels.npy": (npy(np.zeros((98, LAYERS, HEADS))), "expected \\[99, layers, heads\\]"),
    "shares.npy": (npy(np.full((99, LAYERS, HEADS), 1.5)), "shares from 0 to 1"),
    "nan.npy": (npy(np.full((99, LAYERS, HEADS), math.nan)), "finite numbers"),
    "other.npy": (npy(np.full((99, 32, 8), 0.5)), "is for 32 x 8 layers and heads: expected 30 x 3"),
    "cut.npz": (npz(rank_score=np.ones((LAYERS, HEADS)))[:-40], "is not such a file"),
    "none.npz": (npz(other=np.ones(3)), "has no usable 'rank_score'"),
    "map.npz": (
        npz(rank_score=np.ones((LAYERS, HEADS)), cluster_of=np.zeros((LAYERS, HEADS), int), page_group_size=4),
        "is no cluster map",
    ),
    "text.json": (b"{", "is not such a file"),
    "list.json": (b"[1]", "expected a JSON object"),
    "hole.json": (json.dumps({k: v for k, v in HEADS_OF.items() if k != "3-2"}).encode(), "has 269 heads"),
    "name.json": (json.dumps(HEADS_OF | {"x": [1]}).encode(), "has 271 heads"),
    "negative.json": (json.dumps(HEADS_OF | {"3-2": [-1]}).encode(), "no usable '3-2'"),
    "words.json": (json.dumps(HEADS_OF | {"3-2": ["much"]}).encode(), "no usable '3-2'"),
    "layers.json": (json.dumps({"max_attention_window": [64] * 32}).encode(), "is for 32 layers: expected 30"),
    "zero.json": (json.dumps({"max_attention_window": [0] * 30}).encode(), "at least 1"),
    "nested.json": (json.dumps({"max_attention_window": [[64] * 30]}).encode(), "expected a list of tokens"),
    "sinks.json": (json.dumps({"max_attention_window": [64] * 30, "sink_token_length": [4, 4]}).encode(), "one whole"),
    "twice.json": (json.dumps({k: v for k, v in HEADS_OF.items() if k != "3-2"} | {"03-1": [1]}).encode(), "270 heads"),
    "sizes.npz": (
        npz(rank_score=np.ones((2, 2)), cluster_of=np.zeros((2, 2), int), page_group_size=[4, 4]),
        "one whole number",
    ),
    "half.json": (json.dumps({"max_attention_window": [1.5] * 30}).encode(), "whole numbers"),
    "table.tsv": (b"0.1\t0.2\n0.3\n", "is not such a file"),
    "alone.tsv": (b"0.1\t0.2\t0.3\n" * 30, "config.json cannot be read"),
    "budget.txt": (b"64", "is of no known kind"),
    "missing.npy": (None, "cannot be read"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    data, message = MALFORMED[name]
    file, out = tmp_path / name, tmp_path / "out.kvb"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ExchangeError, match=message):
        resolve(read(REFERENCE), mem="25%", allocator=f"file:{file}", out=out)
    assert not out.exists()
