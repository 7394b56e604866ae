"""HeadKV's head scores: a JSON object from "LAYER-HEAD" to a list of scores, by query heads.

Format: github.com/FYYFU/HeadKV (`Important_Head/head_score`), arXiv 2410.19258; the mean of a list is the head's score.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from kvcompile.artifacts import ExchangeError
from kvcompile.formats.base import Format
from kvcompile.formats.common import json_object, numbers, parsed, whole
from kvcompile.formats.values import Importance

FILE = "head_scores.json"


def owns(path: Path) -> bool:
    return path.suffix == ".json"


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


def write(value: Importance) -> dict[str, bytes]:
    """A list of one score for every head of `value.weights`; whole numbers are written as such."""
    scores = {
        f"{layer}-{head}": [int(score) if score.is_integer() else score]
        for layer, row in enumerate(value.weights.tolist())
        for head, score in enumerate(row)
    }
    return {FILE: json_object(scores)}


FORMAT = Format(read, write, owns, looks=".json")
