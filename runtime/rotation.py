"""The rotary embedding of one layer: turning keys and queries on to other positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvcompile.artifacts import Artifact, ArtifactError


@dataclass(frozen=True, eq=False)
class Rotation:
    """`frequency` f32 [D], radians a token; `partner` int64 [D], its own inverse (RoFormer, arXiv 2104.09864; which
    components are pairs differs between families)."""

    frequency: torch.Tensor
    partner: torch.Tensor

    @classmethod
    def of(cls, frequency: NDArray[np.float32], partner: NDArray[np.int32], device: torch.device) -> Rotation:
        return cls(torch.from_numpy(frequency).to(device), torch.from_numpy(partner).long().to(device))

    def __deepcopy__(self, memo: object) -> Rotation:
        return self  # constants, which forks of a cache share

    def to(self, device: torch.device) -> Rotation:
        """The same on this device; no copy where it is there already."""
        return Rotation(self.frequency.to(device), self.partner.to(device))

    def turned(self, vectors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Keys or queries [..., n, D] as they are `tokens` [..., n] positions further on, float32."""
        angle = tokens[..., None] * self.frequency
        x = vectors.float()
        return angle.cos() * x - angle.sin() * x[..., self.partner]


def layer_rotation(artifact: Artifact, layer: int, device: torch.device) -> Rotation | None:
    """That of a layer that a plan is for, in sequences of the artifact's context; None where the artifact does not say.

    Raises:
        ArtifactError: arrays that do not fit the model.
    """
    model, found = artifact.model, artifact.profile
    if "rotary_frequency" not in found or "rotary_partner" not in found:
        return None
    frequency, partner = found["rotary_frequency"], found["rotary_partner"]
    shapes = (model.num_layers, model.head_dim), (model.head_dim,)
    if (frequency.shape, partner.shape) != shapes or not (partner.min() >= 0 and partner.max() < model.head_dim):
        expected = f"expected frequencies {list(shapes[0])} and {shapes[1][0]} components as partners"
        raise ArtifactError(f"the artifact carries no usable profile.rotary_frequency and rotary_partner: {expected}")
    return Rotation.of(frequency[layer].astype(np.float32), partner.astype(np.int32), device)
