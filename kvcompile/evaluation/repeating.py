"""The prompts with which KVzip (arXiv 2505.23416) has a model repeat a context, in its authors' words."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from kvcompile.artifacts import ModelError
from kvcompile.calibration import FollowUp
from kvcompile.calibration.family import token_ids

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
"""For the first chunk, and for a later one; the end of the chunk before follows."""
THEN = "\n"
"""Before the chunk itself: what ends a question where there is no chat template, as these contexts have none."""
LEAD = 8
"""Tokens of the chunk before that a later one is said to start with."""


def repeats(model: Any, ids: NDArray[np.int64], size: int) -> list[tuple[slice, FollowUp]]:
    """Where the chunks of a context [n] are, `size` tokens each, and what has the model repeat each of them; every row
    of it is judged.

    Raises:
        ModelError: no tokenizer where the model was loaded from.
    """
    first, later, then = (token_ids(_tokenizer(str(model.config.name_or_path)), text) for text in (FIRST, LATER, THEN))
    found = []
    for start in range(0, len(ids), size):
        part = slice(start, min(start + size, len(ids)))
        asked = [later, ids[start - LEAD : start]] if start else [first]
        found.append((part, FollowUp("replay", 0, np.concatenate([*asked, then, ids[part]]))))
    return found


@cache
def _tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder or 'the model'} has no tokenizer for KVzip's prompts ({reason})") from None
