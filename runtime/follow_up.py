"""What one layer knows of several new tokens on a filled store, which are read chunk by chunk."""

from __future__ import annotations

import torch

from kvcompile.kernels import Softmax
from kvcompile.kernels.softmax import PLAIN
from kvcompile.runtime import new_tokens
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.store import LayerStore


class FollowUp:
    """New tokens side by side in `columns` columns, of which sequence b's are those from `pad[b]` int64 [B] on (None:
    no padding). All of them see what was stored before the first one, and each other causally: their own keys and
    values are kept as they are until the last one has been read, and only then do the policies choose among them. So
    chunks of any length give what one call gives, up to rounding. For policies that do not observe."""

    softmax: Softmax = PLAIN  # which the store has been told too

    def __init__(self, store: LayerStore, columns: int, pad: torch.Tensor | None) -> None:
        self._store = store
        self._prompt = LayerPrompt(store.layout, columns, pad)

    @property
    def filled(self) -> int:
        """Columns that have been read so far."""
        return self._prompt.filled

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        score: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention [B, num_heads, T, D] of the next T columns, given as for `LayerPrompt.add`."""
        query, keys, values = self._store.transformed(query, keys, values)
        seen = self._prompt.add(query, keys, values, scaling, score)
        return self._store.several(query, *seen, scaling, pad=self._prompt.pad)

    def again(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """The same, over all that has been read, of another layer's queries of the last of it."""
        query, *_ = self._store.transformed(query, *(part[:, :, :0] for part in self._prompt.read))
        return self._store.several(query, *self._prompt.read, scaling, pad=self._prompt.pad)

    def end(self) -> None:
        """Store what the policies keep."""
        prompt, real = self._prompt, None
        if prompt.pad is not None:
            real = torch.arange(prompt.columns, device=prompt.pad.device) >= prompt.pad[:, None]
        keys, values = prompt.read
        new_tokens.keep(self._store, keys, keys, values, real, 1.0, prompt.score)
