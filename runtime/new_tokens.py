"""Storing new tokens where the policies of their heads say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvcompile.kernels import HeadClass
from kvcompile.kernels.dispatch import without_autocast
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.policies.base import NewTokens, Placement

if TYPE_CHECKING:
    from kvcompile.runtime.store import LayerStore


def place(store: LayerStore, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store a step's token for policies that place it themselves: `keys` and `values` [B, num_kv_heads, 1, D]."""
    for cls, state in _observing(store):
        write(store, cls, keys, values, Placement.at(POLICIES[cls.policy].place(state, cls, store.seen)))


def observe(store: LayerStore, query: torch.Tensor, scaling: float) -> None:
    """Let them learn from its query [B, num_heads, 1, D]."""
    for cls, state in _observing(store):
        grouped = query.squeeze(2).unflatten(1, (store.layout.num_kv_heads, -1))
        stored = store.keys.read(cls, cls.capacity, query.dtype)
        POLICIES[cls.policy].observe(state, cls, grouped[:, cls.heads], stored, store.seen, scaling)


def _observing(store: LayerStore) -> list[tuple[HeadClass, list[torch.Tensor]]]:
    """Classes whose policy learns from every step, with what it remembers."""
    classes = store.layout.classes
    found = [i for i, cls in enumerate(classes) if POLICIES[cls.policy].observes]
    return [(classes[i], store.state[i]) for i in found]


def keep(
    store: LayerStore,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    real: torch.Tensor | None,
    scaling: float,
    score: torch.Tensor | None,
) -> None:
    """Store what the policies keep of new tokens and count them, all transformed: `query` [B, num_heads, T, D], `keys`
    and `values` [B, num_kv_heads, T, D]; `real` bool [B, T] is False for padding (None: no padding)."""
    if real is None:
        real = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
    grouped = query.unflatten(1, (store.layout.num_kv_heads, -1))
    for cls, state in zip(store.layout.classes, store.state, strict=True):
        policy = POLICIES[cls.policy]
        stored = store.keys.read(cls, cls.capacity, query.dtype) if policy.observes else keys[:, cls.heads, :0]
        new_tokens = NewTokens(
            grouped[:, cls.heads], stored, keys[:, cls.heads], real, scaling,
            None if score is None else score.mT[:, cls.heads],
        )  # fmt: skip
        with without_autocast(keys.device):  # what is stored has dtypes of its own
            write(store, cls, keys, values, policy.extend(state, cls, new_tokens, store.seen).to(keys.device))
    store.count([int(count) for count in real.sum(1).tolist()])


def write(store: LayerStore, cls: HeadClass, keys: torch.Tensor, values: torch.Tensor, placed: Placement) -> None:
    """Put the new tokens of a class where they belong."""
    slot, chosen = placed.slot, None
    if slot.shape[2] > cls.capacity:
        # Most of them are stored by no head: only those that are need be copied and encoded.
        chosen = (slot < 0).int().argsort(dim=2, stable=True)[:, :, : cls.capacity]
        slot = slot.gather(2, chosen)
    for stored, new in ((store.keys, keys[:, cls.heads]), (store.values, values[:, cls.heads])):
        if chosen is not None:
            new = new.gather(2, chosen.unsqueeze(3).expand(-1, -1, -1, new.shape[3]))
        stored.write(cls, new, slot, placed.source, placed.to_slot)
        if 0 in store.seen:
            stored.write_anchor(cls, new, slot)
