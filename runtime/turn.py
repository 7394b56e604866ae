"""Turning keys, queries, values and outputs of rounded heads, so that stored tokens never have to be turned back.

With y = T (x - mean) stored, q . k = (T^-T q) . y + q . mean: the last term is the same for every key, and softmax
ignores it as long as no key of the head lacks it. Attention over turned values gives T (o - mean).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcompile.artifacts import Quantiser
from kvcompile.kernels.layout import QUANTISED, LayerLayout


@dataclass(frozen=True)
class Turn:
    """One layer's matrices in storage order, float32 [H, D, D] and [H, D]; identity and zero for heads that are stored
    as they are, whose numbers pass through unchanged."""

    key: torch.Tensor
    key_inverse: torch.Tensor
    key_mean: torch.Tensor
    value: torch.Tensor
    value_inverse: torch.Tensor
    value_mean: torch.Tensor

    @classmethod
    def of_layer(
        cls, quantiser: Quantiser | None, layer: int, order: list[int], layout: LayerLayout, device: torch.device
    ) -> Turn | None:
        """The turn of a layer whose heads are stored in `order`; None where none is rounded."""
        widths = [(c.k_bits, c.v_bits) for c in layout.classes for _ in range(c.count)]
        if quantiser is None or not any(bits in QUANTISED for pair in widths for bits in pair):
            return None
        parts = []
        for kind, side in (("key", 0), ("value", 1)):
            turn = torch.tensor(getattr(quantiser, f"{kind}_transform")[layer].astype("float64"))[order]
            mean = torch.tensor(getattr(quantiser, f"{kind}_mean")[layer].astype("float32"))[order]
            for head, width in enumerate(widths):
                if width[side] not in QUANTISED:
                    turn[head], mean[head] = torch.eye(turn.shape[-1]), 0
            parts += [turn.float(), torch.linalg.inv(turn).float(), mean]
        return cls(*(part.to(device) for part in parts))

    def __deepcopy__(self, memo: object) -> Turn:
        return self  # constants, which forks of a cache share

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """[B, Hq, T, D], to be multiplied with turned keys."""
        grouped = query.float().unflatten(1, (len(self.key), -1))
        return (grouped @ self.key_inverse[:, None]).flatten(1, 2).to(query.dtype)

    def keys(self, keys: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """[..., H, T, D] of the heads at these storage positions, float32."""
        return (keys.float() - self.key_mean[heads, None]) @ self.key[heads].mT

    def values(self, values: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """[..., H, T, D] of the heads at these storage positions, float32."""
        return (values.float() - self.value_mean[heads, None]) @ self.value[heads].mT

    def outputs(self, output: torch.Tensor) -> torch.Tensor:
        """Attention over turned values, [B, Hq, T, D], as the model expects it."""
        grouped = output.float().unflatten(1, (len(self.value), -1))
        back = grouped @ self.value_inverse.mT[:, None] + self.value_mean[:, None, None]
        turned: torch.Tensor = back.flatten(1, 2).to(output.dtype)
        return turned
