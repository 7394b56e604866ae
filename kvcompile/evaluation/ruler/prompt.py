"""From a text to token ids, and where they are parted.

A task's text becomes a user's message in the model's chat template, where it has one, and the answer's prefix the
beginning of the answer. The cut lies at the last token of the haystack: the template's beginning, the instruction, a
worked example where a task has one, and the haystack are the context, which is read and compressed without a look at
what comes after it. Then come the question, the template's end of turn and the prefix, to the compressed cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.calibration.family import opening, token_ids
from kvcompile.evaluation.ruler.sample import Text

MARK = "<<message>>"


@dataclass(frozen=True)
class Prompt:
    """What stands before and after a user's message, and `opening`, ids i64 [0 or 1] before everything."""

    tokenizer: Any
    opening: NDArray[np.int64]
    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: Any) -> Prompt:
        """The model's chat template, or plain text after the tokenizer's BOS token."""
        if not tokenizer.chat_template:
            return cls(tokenizer, opening(tokenizer), "", " ")
        message = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = text.split(MARK)
        return cls(tokenizer, np.empty(0, np.int64), before, after)

    def ids(self, text: Text) -> NDArray[np.int64]:
        """The whole of a text, i64 [n]."""
        whole = f"{self.before}{text.context}{text.question}{self.after}{text.prefix}"
        return np.concatenate([self.opening, token_ids(self.tokenizer, whole)])

    def parted(self, text: Text) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same ids in two parts: the context and what comes after it.

        A token that would not be there without the question, as it lies across the cut, comes after it.
        """
        whole = self.ids(text)
        alone = np.concatenate([self.opening, token_ids(self.tokenizer, self.before + text.context)])
        shared = min(len(whole), len(alone))
        cut = int(np.argmin(np.append(whole[:shared] == alone[:shared], False)))
        return whole[:cut], whole[cut:]
