"""Tensor parallelism as transformers does it: every rank has the weights of some heads of each layer, and a cache of
theirs alone.

transformers cuts projections into equal blocks in the order of the model's heads. An artifact may place heads on other
ranks: they are then brought into the order of their ranks, and change places across them, one weight at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from kvcompile.artifacts import Artifact, ModelError, states_name
from kvcompile.runtime.parts import attention_modules

STYLES = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
"""An attention module's projections, and the style of transformers' plan by which a rank has the same heads of each."""


@dataclass(frozen=True)
class TensorParallel:
    """This process's `rank` among `size`, which talk in `group` of torch.distributed (None: one process has it all)."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, model: Any) -> TensorParallel:
        """How a model is split, by the weights of its attention."""
        weight = attention_modules(model)[0].o_proj.weight
        if not is_split(weight):
            return cls()
        mesh = weight.device_mesh
        return cls(mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1), mesh.get_group(mesh.ndim - 1))

    def orders(self, artifact: Artifact) -> list[list[int]]:
        """For each layer the model's KV heads: those of rank 0 in storage order, then those of rank 1, and so on. Each
        is on the rank that the artifact places it on, or where it has no placement on the rank that has it anyway."""
        heads = artifact.model.num_kv_heads
        rank = np.arange(heads) // (heads // self.size)
        rows = [rank] * artifact.model.num_layers
        if artifact.rank is not None and self.size > 1:
            rows = list(artifact.rank)
        orders = artifact.budgets.head_order.tolist()
        return [sorted(order, key=row.__getitem__) for order, row in zip(orders, rows, strict=True)]

    def own(self, order: list[int]) -> list[int]:
        """This rank's heads of a layer whose heads `orders` has put into this order."""
        each = len(order) // self.size
        return order[self.rank * each : (self.rank + 1) * each]

    def agreed(self, token: torch.Tensor) -> torch.Tensor:
        """The first rank's `token`, on every rank: where tokens are sampled, each has drawn one of its own."""
        if self.group is not None:
            torch.distributed.broadcast(token, group=self.group, group_src=0)
        return token

    def gather(self, value: int) -> list[int]:
        """What every rank gives, in their order."""
        found = [value] * self.size
        if self.group is not None:
            torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def check(self, model: Any, artifact: Artifact) -> None:
        """Raises ModelError: a model that is split otherwise than by heads, or an artifact that does not fit so many
        ranks."""
        check_ranks(artifact, self.size)
        if any(is_split(weight) for weight in model.parameters()):
            _check_styles(model, artifact.model.architecture)


def check_ranks(artifact: Artifact, ranks: int) -> None:
    """Raises ModelError: heads that do not divide among so many ranks, an artifact that places them on others, or
    states that every rank would hold."""
    heads = artifact.model.num_kv_heads
    if ranks == 1:
        return
    if any(artifact.model.states):
        raise ModelError(
            f"every rank would hold all {states_name(artifact.model)} of a {artifact.model.architecture!r} model: "
            "load it without tensor parallelism, over several devices with device_map"
        )
    if heads % ranks:
        raise ModelError(
            f"{heads} KV heads do not divide among {ranks} ranks of tensor parallelism: start as many processes as "
            f"divide {heads}"
        )
    if artifact.rank is not None and not placed_on(artifact, ranks):
        raise ModelError(
            f"the artifact does not place {heads // ranks} of {heads} KV heads on each of {ranks} ranks, as the model "
            f"has them: build it with --tp {ranks}, or without --tp"
        )


def placed_on(artifact: Artifact, ranks: int) -> bool:
    """Whether the artifact places the heads of every layer on so many ranks, equally many on each."""
    rank = artifact.rank
    if rank is None or rank.shape[1] % ranks:
        return False
    each = np.repeat(np.arange(ranks), rank.shape[1] // ranks)
    return bool((np.sort(rank, axis=1) == each).all())


def is_split(weight: Any) -> bool:
    """Whether this process has a part of a weight (a `DTensor`)."""
    return hasattr(weight, "full_tensor")


def permute(weight: Any, dim: int, index: torch.Tensor) -> None:
    """Bring dimension `dim` of a weight into the order `index`, in place. All ranks have to call it for one that is
    split along `dim`, which is gathered meanwhile."""
    index = index.to(weight.device)
    if not is_split(weight):
        weight.copy_(weight.index_select(dim, index))
        return
    mesh = weight.device_mesh
    own = index.chunk(mesh.size())[mesh.get_local_rank()]
    weight.to_local().copy_(weight.full_tensor().index_select(dim, own))


def _check_styles(model: Any, architecture: str) -> None:
    names = {module: name for name, module in model.named_modules()}
    for module in attention_modules(model):
        for projection, style in STYLES.items():
            name = f"{names[module]}.{projection}"
            found = next((found for rule, found in model.tp_plan.items() if fnmatchcase(name, rule)), None)
            weight = getattr(getattr(module, projection, None), "weight", None)
            split = getattr(weight, "placements", ())
            if found != style or len(split) != 1 or not split[0].is_shard(0 if style == "colwise" else 1):
                raise ModelError(
                    f"a {architecture!r} model is not split by heads here (its plan has {found or 'no style'} for "
                    f"{name}, expected {style}, and nothing but tensor parallelism): load it without, over several "
                    "devices with device_map"
                )
