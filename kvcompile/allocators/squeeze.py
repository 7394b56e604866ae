"""SqueezeAttention."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.cluster.vq import kmeans2

from kvcompile.allocators.uniform import weighted
from kvcompile.stages import Plan, Problem


@dataclass(frozen=True)
class SqueezeAttention:
    """Layers that hardly change the residual stream give up most of their budget (arXiv 2404.04793, algorithm 1).

    c[l], the mean cosine between the residual stream before and after layer l's attention block, is clustered into
    three by KMeans; the cluster of highest similarity gets `p` times the initial budget, and what that frees is spread
    evenly over the other layers.
    """

    p: float = 0.35
    policies: ClassVar[tuple[str, ...]] = ("recent", "h2o", "snapkv", "scored")

    def __call__(self, problem: Problem) -> Plan:
        layers = np.flatnonzero(~problem.fixed)
        idle = most_similar(problem.profile.squeeze[layers].astype(np.float64))
        budget = np.where(idle, self.p, 1.0)
        if not idle.all():
            budget[~idle] += (1 - self.p) * idle.sum() / (~idle).sum()
        weights = np.zeros((len(problem.limit), problem.num_kv_heads))
        weights[layers] = budget[:, None]
        return weighted(problem, weights, p=self.p, unimportant_layers=layers[idle].tolist())


def most_similar(cosine: np.ndarray) -> np.ndarray:
    """Which entries of `cosine` [n] fall into the cluster of highest mean, of three."""
    if len(np.unique(cosine)) < 3:
        return np.zeros(len(cosine), bool)  # nothing to tell apart
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster is fine: it is not the highest one
        centres, label = kmeans2(cosine[:, None], 3, minit="++", rng=0)
    used = np.unique(label)
    return np.asarray(label == used[centres[used, 0].argmax()])
