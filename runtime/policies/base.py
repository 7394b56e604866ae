"""What a token policy decides: which prompt tokens stay, and which slot a new token takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels import HeadClass


class Policy:
    """Sinks and a ring of recent tokens (StreamingLLM, arXiv 2309.17453); also the base of the others.

    A policy is stateless; what it has to remember of one class of heads lies in tensors that it allocates with
    `new_state` and that the cache counts, copies and reorders along their first (sequence) dimension.
    """

    def new_state(self, batch: int, cls: HeadClass, device: torch.device) -> list[torch.Tensor]:
        """Tensors [batch, count, capacity] to keep beside the class's K and V."""
        return []

    def score(self, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor | None:
        """Worth of each prompt token, f32 [H, n], higher is better; None where only its place counts.

        One sequence, without padding: `query` [H, group, n, D], `keys` [H, n, D].
        """
        return None

    def remember(self, state: list[torch.Tensor], b: int, token: torch.Tensor, score: torch.Tensor | None) -> None:
        """Note what sequence `b` keeps of its prompt: `token` int64 [H, kept] by slot, `score` as `score` gave it."""

    def slots(self, state: list[torch.Tensor], cls: HeadClass, seen: Sequence[int], length: int) -> torch.Tensor:
        """Slots for the next `length` tokens of each sequence, int64 [B, count, length]; -1: not stored."""
        ring = [
            # Of more tokens than the ring holds, only the last stay.
            [-1 if _rewritten(cls, n, n + length, t) else cls.ring_slot(n + t) for t in range(length)]
            for n in seen
        ]
        return torch.tensor(ring).unsqueeze(1).expand(-1, cls.count, -1)

    def observe(
        self,
        state: list[torch.Tensor],
        cls: HeadClass,
        query: torch.Tensor,
        keys: torch.Tensor,
        seen: Sequence[int],
        scaling: float,
    ) -> None:
        """Learn from one decode step: `query` [B, count, group, D] over the class's slots `keys` [B, count, capacity,
        D], after its token was written; `seen` counts that token."""

    def extend(
        self,
        state: list[torch.Tensor],
        cls: HeadClass,
        query: torch.Tensor,
        keys: torch.Tensor,
        new: torch.Tensor,
        real: torch.Tensor,
        seen: Sequence[int],
        scaling: float,
    ) -> torch.Tensor:
        """Slots for several new tokens on a filled cache, int64 [B, count, T]; -1: not stored.

        `query` [B, count, group, T, D], `keys` as in `observe` but before any write, `new` [B, count, T, D] their own
        keys, `real` bool [B, T] False for padding.
        """
        slot = torch.full((len(seen), cls.count, new.shape[2]), -1)
        for b, n in enumerate(seen):
            count = int(real[b].sum())
            slot[b, :, real[b].cpu()] = self.slots(state, cls, [n], count)[0]
        return slot


def _rewritten(cls: HeadClass, first: int, end: int, t: int) -> bool:
    """Whether a token after `first + t` and before `end` takes the same slot."""
    token = first + t
    if token < cls.capacity - cls.recent:
        return False
    return token + cls.recent < end
