"""What a layer whose weights are more than a softmax of stored logits asks of an attention kernel beside its output."""

from __future__ import annotations

import torch


class Totals:
    """`logarithm` f32 [B, num_heads, T]: log sum exp of the logits of a query, filled in by `ragged_decode`.

    With `cap` the logits are bent to within it before, cap tanh((logit + offset) / cap); `offset` f32 [B, num_kv_heads,
    group, T] is what the stored keys of a head all lack alike (None: nothing), see `Transform`. Without `cap`, logits,
    and so the logarithms, are those that the stored keys give.
    """

    def __init__(self, cap: float | None = None, offset: torch.Tensor | None = None) -> None:
        self.cap = cap
        self._offset = offset
        self.logarithm: torch.Tensor

    def bent(self, logits: torch.Tensor, where: tuple[slice, ...] = ()) -> torch.Tensor:
        """Logits as they are weighed: [B, num_kv_heads, group, T, n], or those at `where` of the first four."""
        if self.cap is None:
            return logits
        if self._offset is not None:
            logits = logits + self._offset[where][..., None]
        return torch.tanh(logits / self.cap) * self.cap
