"""Text on stdout as it is generated, and when the first token came."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TextStreamer


class TimedStreamer(TextStreamer):  # type: ignore[misc]
    """Prints the answer without the prompt, as transformers' `TextStreamer` does, or nothing if `silent`; notes in
    seconds when it was made, when the first new token came and when the answer ended."""

    def __init__(self, tokenizer: Any, silent: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.silent = silent
        self.start = self.first_token = self.stop = time.perf_counter()
        self.pieces = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then every new token."""
        self.pieces += 1
        if self.pieces == 2:
            self.first_token = time.perf_counter()
        super().put(value)

    def end(self) -> None:
        super().end()
        self.stop = time.perf_counter()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.silent:
            super().on_finalized_text(text, stream_end=stream_end)
