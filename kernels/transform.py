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
        grouped = query.float().unflatten(1, (len(self.key), -1))
        return (grouped @ self.key_inverse[:, None]).flatten(1, 2).to(query.dtype)

    def keys(self, keys: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """T (k - mean) for keys [..., H, T, D] of the heads at these storage positions, float32."""
        return (keys.float() - self.key_mean[heads, None]) @ self.key[heads].mT

    def values(self, values: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """T (v - mean) for values [..., H, T, D] of the heads at these storage positions, float32."""
        return (values.float() - self.value_mean[heads, None]) @ self.value[heads].mT

    def outputs(self, output: torch.Tensor) -> torch.Tensor:
        """Attention o over transformed values, [B, Hq, T, D], as the model expects it: T^-1 o + mean, in o's dtype."""
        grouped = output.float().unflatten(1, (len(self.value), -1))
        restored = grouped @ self.value_inverse.mT[:, None] + self.value_mean[:, None, None]
        out: torch.Tensor = restored.flatten(1, 2).to(output.dtype)
        return out
