"""HeadKV's head scores: a JSON object from "LAYER-HEAD" to a list of scores, by query heads.

Format: github.com/FYYFU/HeadKV (`Important_Head/head_score`), arXiv 2410.19258; the mean of a list is the head's score.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from kvcompile.allocators.foreign import Importance
from kvcompile.artifacts import Artifact, ExchangeError
from kvcompile.formats.common import json_object, numbers, parsed, whole

FILE = "head_scores.json"


def contents(artifact: Artifact) -> dict[str, bytes]:
    """The score of a query head is the number of tokens of its KV head, so that a division in proportion gives them."""
    group = artifact.model.num_attention_heads // artifact.model.num_kv_heads
    tokens = np.repeat(artifact.budgets.capacity, group, axis=1).tolist()
    scores = {f"{layer}-{head}": [n] for layer, row in enumerate(tokens) for head, n in enumerate(row)}
    return {FILE: json_object(scores)}


def read(path: Path) -> Importance:
    """Raises ExchangeError."""
    scores = parsed(path, whole)
    places = [tuple(map(int, key.split("-"))) for key in scores if re.fullmatch(r"[0-9]{1,4}-[0-9]{1,4}", key)]
    shape = tuple(1 + max((place[axis] for place in places), default=-1) for axis in (0, 1))
    if not scores or len(set(places)) != len(scores) or len(scores) != shape[0] * shape[1]:
        raise ExchangeError(f'{path} has {len(scores)} heads: expected one "LAYER-HEAD" for every head of every layer')
    table = np.zeros(shape)
    for place, key in zip(places, scores, strict=True):
        table[place] = np.mean(numbers(path, scores, key, 0))
    return Importance(str(path), table)
