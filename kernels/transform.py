"""Transforming keys, queries, values and outputs of quantised heads, so that stored tokens never have to be restored.

With y = T (x - mean) stored, q . k = (T^-T q) . y + q . mean: the last term is the same for every key, and softmax
ignores it as long as no key of the head lacks it. Attention over transformed values gives T (o - mean).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Transform:
    """One layer's matrices in storage order, float32 [H, D, D] and [H, D]; identity and zero for heads that are stored
    as they are, whose numbers pass through unchanged."""

    key: torch.Tensor
    key_inverse: torch.Tensor
    key_mean: torch.Tensor
    value: torch.Tensor
    value_inverse: torch.Tensor
    value_mean: torch.Tensor

    def __deepcopy__(self, memo: object) -> Transform:
        return self  # constants, which forks of a cache share

    def to(self, device: torch.device) -> Transform:
        """The same on this device; no copy where it is there already."""
        return Transform(*(getattr(self, field.name).to(device) for field in fields(self)))

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [B, Hq, T, D] as they are multiplied with transformed keys: T^-T q, in their own dtype."""
        return self._grouped(query.float(), self.key_inverse).to(query.dtype)

    def lacking(self, query: torch.Tensor) -> torch.Tensor:
        """What the products of transformed queries [B, Hq, T, D] with transformed keys lack, q . mean: f32 [B, Hq,
        T]."""
        moved = by_head(self.key_mean[:, None], self.key.mT)  # T mean, as (T^-T q) . (T mean) = q . mean
        return self._grouped(query.float(), moved.mT).squeeze(-1)

    def keys(self, keys: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """T (k - mean) for keys [..., H, T, D] of the heads at these storage positions, float32."""
        return by_head(keys.float() - self.key_mean[heads, None], self.key[heads].mT)

    def values(self, values: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """T (v - mean) for values [..., H, T, D] of the heads at these storage positions, float32."""
        return by_head(values.float() - self.value_mean[heads, None], self.value[heads].mT)

    def outputs(self, output: torch.Tensor) -> torch.Tensor:
        """Attention o over transformed values, [B, Hq, T, D], as the model expects it: T^-1 o + mean, in o's dtype."""
        restored = self._grouped(output.float(), self.value_inverse.mT)
        means = self.value_mean.repeat_interleave(output.shape[1] // len(self.value), 0)
        return (restored + means[:, None]).to(output.dtype)

    def _grouped(self, vectors: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Every vector of [B, Hq, T, D] times the matrix of its KV head."""
        batch, _, length, size = vectors.shape
        together = by_head(vectors.reshape(batch, len(matrices), -1, size), matrices)
        return together.reshape(batch, -1, length, matrices.shape[-1])


def by_head(vectors: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Vectors [..., H, n, D] of every head times its own matrix, [H, D, D]: one product a head for all sequences.

    `vectors @ matrices` would copy the matrices for every sequence, 134 MB a layer at batch 16 (eight heads of 128).
    """
    if vectors.dim() == 3:
        return vectors @ matrices
    batch, heads, length, size = vectors.shape
    together = vectors.transpose(0, 1).reshape(heads, batch * length, size) @ matrices
    return together.unflatten(1, (batch, length)).transpose(0, 1)
