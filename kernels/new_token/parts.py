"""What `new_token` is given of a model and of an artifact."""

from __future__ import annotations

from typing import NamedTuple

import torch


class HeadNorms(NamedTuple):
    """Root mean square norms of every query and key before rotary embedding: weights [D], and what is added to the mean
    square."""

    query: torch.Tensor
    key: torch.Tensor
    epsilon: float


class LinearScorer(NamedTuple):
    """The compiled scorer of a layer: `weight` f32 [H, d] and `bias` f32 [H], in storage order."""

    weight: torch.Tensor
    bias: torch.Tensor
