"""How large what `gpu_check.py` measures is: for real, and in a dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import ModelIdentity
from kvcompile.bench.subjects import CONFIGS, random_model, shape_of

SHARE = 0.25
"""Of the full cache's bytes that a plan keeps."""
DTYPE = "bfloat16"
BATCH, CONTEXT = 16, 32768
"""Of the judged rows."""
BATCHES, CONTEXTS = (1, 4, 16, 64), (8192, 32768, 131072)
TINY = {
    "model_type": "qwen2", "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300,
    "max_position_embeddings": 1024,
}  # fmt: skip
CONFIGS["tiny"] = TINY


@dataclass(frozen=True)
class Sizes:
    """Rows have the names of the real sizes; a dry run takes tiny ones in their place, and few cells of the matrix."""

    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def model(self) -> str:
        return "tiny" if self.dry else "qwen2.5-7b"

    @property
    def shape(self) -> ModelIdentity:
        return shape_of(self.model)

    @property
    def rounds(self) -> int:
        return 1 if self.dry else 15

    @property
    def tokens(self) -> int:
        """Decode steps that are timed."""
        return 8 if self.dry else 64

    @property
    def cells(self) -> int:
        """Of every kind in the matrix, how many are measured."""
        return 1 if self.dry else 1000

    def batch(self, real: int) -> int:
        return min(real, 2) if self.dry else real

    def context(self, real: int) -> int:
        return 256 if self.dry else real

    def full_bytes(self, batch: int, context: int, layers: int | None = None) -> int:
        """Of the full cache of all layers, or of some."""
        one = self.shape
        tokens = self.batch(batch) * self.context(context)
        return 2 * 2 * tokens * one.num_kv_heads * one.head_dim * (layers or one.num_layers)


class Model:
    """The model of a run, made when it is first asked for and given back when its memory is needed."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._model: Any = None

    def get(self) -> Any:
        if self._model is None:
            self._model = random_model(self.sizes.model, getattr(torch, DTYPE), self.sizes.device)
        return self._model

    def release(self) -> None:
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def bytes(self) -> int:
        """That a row has to find free for it: none where it is there already."""
        return 0 if self._model is not None or self.sizes.dry else 16 << 30
