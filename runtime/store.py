"""The ragged KV store of one layer: prefill, one-token steps, and several tokens on a filled store. Plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvcompile.kernels import HeadClass, LayerLayout, append, compact, ragged_attention
from kvcompile.runtime.policies import POLICIES


class LayerStore:
    """K and V of one layer for a batch: a flat buffer [batch, slots, head_dim] each, heads end to end in storage
    order, every head with its fixed capacity. All memory is allocated here, once; nothing grows afterwards.

    `seen` counts the tokens that each sequence has brought so far, without padding.
    """

    def __init__(
        self, layout: LayerLayout, head_dim: int, dtype: torch.dtype, device: torch.device, batch: int
    ) -> None:
        self.layout = layout
        self.batch = batch
        self.keys = torch.zeros(batch, layout.slots, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.state = [POLICIES[cls.policy].new_state(batch, cls, device) for cls in layout.classes]
        self.seen = [0] * batch

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that the store holds."""
        yield self.keys
        yield self.values
        for tensors in self.state:
            yield from tensors

    @torch.no_grad()
    def prefill(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None, scaling: float
    ) -> None:
        """Cut a prompt to the budget: `query` [B, num_heads, n, D], `keys` and `values` [B, num_kv_heads, n, D], all
        with RoPE applied; `real` bool [B, n] is False for padding (None: no padding)."""
        for b in range(self.batch):
            q, k, v = query[b], keys[b], values[b]
            if real is not None:
                q, k, v = q[:, real[b]], k[:, real[b]], v[:, real[b]]
            q = q.unflatten(0, (self.layout.num_kv_heads, -1))
            for cls, state in zip(self.layout.classes, self.state, strict=True):
                heads = slice(cls.start, cls.start + cls.count)
                policy = POLICIES[cls.policy]
                score = policy.score(q[heads], k[heads], scaling) if state or k.shape[1] > cls.capacity else None
                token = kept_tokens(cls, k.shape[1], score, k.device)
                compact(cls.view(self.keys)[b], k[heads], token)
                compact(cls.view(self.values)[b], v[heads], token)
                policy.remember(state, b, token, score)
            self.seen[b] = k.shape[1]

    @torch.no_grad()
    def step(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Write one new token a sequence in place, then attend to the store; [B, num_heads, 1, D]."""
        for cls, state in zip(self.layout.classes, self.state, strict=True):
            heads = slice(cls.start, cls.start + cls.count)
            slot = POLICIES[cls.policy].slots(state, cls, self.seen, 1).to(keys.device)
            append(cls.view(self.keys), keys[:, heads], slot)
            append(cls.view(self.values), values[:, heads], slot)
        self.seen = [n + 1 for n in self.seen]
        out = ragged_attention(query, self.keys, self.values, self.layout, self.seen, scaling=scaling)
        grouped = query.squeeze(2).unflatten(1, (self.layout.num_kv_heads, -1))
        for cls, state in zip(self.layout.classes, self.state, strict=True):
            heads = slice(cls.start, cls.start + cls.count)
            POLICIES[cls.policy].observe(state, cls, grouped[:, heads], cls.view(self.keys), self.seen, scaling)
        return out

    @torch.no_grad()
    def extend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        real: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Several new tokens: attend to the store and causally (`mask` bool [B, 1, T, T]) to each other, then store
        what the policies keep of them; [B, num_heads, T, D]."""
        out = ragged_attention(
            query, self.keys, self.values, self.layout, self.seen,
            scaling=scaling, new_keys=keys, new_values=values, new_mask=mask,
        )  # fmt: skip
        if real is None:
            real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        grouped = query.unflatten(1, (self.layout.num_kv_heads, -1))
        for cls, state in zip(self.layout.classes, self.state, strict=True):
            heads = slice(cls.start, cls.start + cls.count)
            stored, new = cls.view(self.keys), keys[:, heads]
            slot = POLICIES[cls.policy].extend(state, cls, grouped[:, heads], stored, new, real, self.seen, scaling)
            append(stored, new, slot.to(keys.device))
            append(cls.view(self.values), values[:, heads], slot.to(keys.device))
        self.seen = [n + int(count) for n, count in zip(self.seen, real.sum(1).tolist(), strict=True)]
        return out

    def take(self, index: torch.Tensor) -> None:
        """Make the batch the sequences at `index` int64 [new batch]: for beam search, repeats and selections."""
        index = index.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.state = [[t.index_select(0, index) for t in tensors] for tensors in self.state]
        self.seen = [self.seen[i] for i in index.tolist()]
        self.batch = len(self.seen)


def kept_tokens(cls: HeadClass, count: int, score: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which of `count` prompt tokens each head keeps, by slot: int64 [cls.count, min(count, capacity)].

    First the sinks, then the best by `score` f32 [cls.count, `count`] (None: the latest), then the ring of recent ones.
    """
    every = torch.arange(count, device=device)
    if count <= cls.capacity:
        return every.expand(cls.count, -1)
    if score is None:
        score = every.float().expand(cls.count, -1)
    first_recent = count - cls.recent
    heavy = score[:, cls.sink : first_recent].topk(cls.capacity - cls.sink - cls.recent, dim=1).indices
    ring = first_recent + (torch.arange(cls.recent, device=device) - (first_recent - cls.capacity)) % cls.recent
    return torch.cat(
        [
            every[: cls.sink].expand(cls.count, -1),
            heavy.sort(dim=1).values + cls.sink,
            ring.expand(cls.count, -1),
        ],
        dim=1,
    )
