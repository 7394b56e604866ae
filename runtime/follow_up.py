"""What one layer knows of several new tokens on a filled store, which come at once or are read chunk by chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvcompile.kernels import Softmax
from kvcompile.kernels.softmax import PLAIN
from kvcompile.runtime import new_tokens
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.store import LayerStore


class FollowUpAtOnce:
    """New tokens on a filled store that come in one call, also with padding anywhere and for policies that observe:
    `query` [B, num_heads, T, D], `keys` and `values` [B, num_kv_heads, T, D], `mask` bool [B, 1, T, T] within them,
    `real` bool [B, T] False for padding (both None: causal, and no padding), `score` f32 [B, T, num_kv_heads]."""

    def __init__(
        self,
        store: LayerStore,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        real: torch.Tensor | None,
        scaling: float,
        score: torch.Tensor | None,
    ) -> None:
        self._store, self._mask, self._real, self._scaling, self._score = store, mask, real, scaling, score
        self._query, self._keys, self._values = store.transformed(query, keys, values)

    @torch.no_grad()
    def attend(self) -> torch.Tensor:
        """Attention [B, num_heads, T, D] to the store, and causally (by the mask) to each other."""
        return self._store.several(self._query, self._keys, self._values, self._scaling, self._mask)

    @torch.no_grad()
    def again(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """The same of another layer's queries [B, num_heads, t, D] of the last t."""
        own = F.pad(query, (0, 0, self._keys.shape[2] - query.shape[2], 0))  # as many as the mask is for
        own, *_ = self._store.transformed(own, self._keys[:, :, :0], self._values[:, :, :0])
        out = self._store.several(own, self._keys, self._values, scaling, self._mask)
        return out[:, :, -query.shape[2] :]

    @torch.no_grad()
    def end(self) -> None:
        """Store what the policies keep."""
        given = self._query, self._keys, self._values, self._real, self._scaling, self._score
        new_tokens.keep(self._store, *given)


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
