"""H2O (arXiv 2306.14048): the tokens that have drawn most attention so far are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels import HeadClass
from kvcompile.kernels.softmax import by_group
from kvcompile.runtime.policies.base import NewTokens, Placement, Policy, Prompt

INF = float("inf")


class H2O(Policy):
    """State a slot: the attention it has drawn, summed over queries and the query heads of the group (f32), and its
    token's number (i32), which tells sinks and recent tokens from the rest."""

    observes = True
    sums = True

    def new_state(self, batch: int, cls: HeadClass, device: torch.device) -> list[torch.Tensor]:
        shape = (batch, cls.count, cls.capacity)
        return [torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)]

    def score(self, prompt: Prompt) -> torch.Tensor | None:
        return prompt.drawn

    def remember(self, state: list[torch.Tensor], token: torch.Tensor, score: torch.Tensor) -> None:
        attention, number = state
        attention[:, :, : token.shape[2]] = score
        number[:, :, : token.shape[2]] = token

    def place(self, state: list[torch.Tensor], cls: HeadClass, seen: Sequence[int]) -> torch.Tensor:
        """A free slot, or that of the least attended token that is neither sink nor recent (of equal ones the last)."""
        attention, number = state
        count = torch.tensor(seen, device=attention.device).view(-1, 1, 1)
        slot = torch.arange(cls.capacity, device=attention.device)
        # The new token is itself recent, so of those stored the last `recent - 1` are protected.
        protected = (number < cls.sink) | (number > count - cls.recent)
        rank = attention.masked_fill(protected, INF).masked_fill(slot >= count, -INF)
        least = cls.capacity - 1 - rank.flip(2).argmin(2, keepdim=True)
        victim = torch.where(count < cls.capacity, count, least)
        attention.scatter_(2, victim, 0.0)
        number.scatter_(2, victim, count.expand_as(victim).int())
        return victim

    def observe(
        self,
        state: list[torch.Tensor],
        cls: HeadClass,
        query: torch.Tensor,
        keys: torch.Tensor,
        seen: Sequence[int],
        scaling: float,
    ) -> None:
        count = torch.tensor(seen, device=keys.device).view(-1, 1, 1, 1)
        empty = torch.arange(cls.capacity, device=keys.device) >= count
        logits = query.float() @ keys.float().mT * scaling
        state[0] += logits.masked_fill(empty, -INF).softmax(-1).sum(2)

    def extend(
        self, state: list[torch.Tensor], cls: HeadClass, new_tokens: NewTokens, seen: Sequence[int]
    ) -> Placement:
        slot = torch.full(new_tokens.new.shape[:3], -1, device=new_tokens.new.device)
        for b, stored in enumerate(seen):
            real = new_tokens.real[b]
            slot[b, :, real] = self._extend_one(
                state[0][b], state[1][b], cls, new_tokens.query[b][:, :, real], new_tokens.stored[b],
                new_tokens.new[b][:, real], stored, new_tokens.scaling,
            )  # fmt: skip
        return Placement.at(slot)

    def _extend_one(
        self,
        attention: torch.Tensor,
        number: torch.Tensor,
        cls: HeadClass,
        query: torch.Tensor,
        keys: torch.Tensor,
        new: torch.Tensor,
        stored: int,
        scaling: float,
    ) -> torch.Tensor:
        """One sequence: credit the new queries' attention, keep the best of stored and new, reuse the freed slots."""
        filled, length = min(stored, cls.capacity), new.shape[1]
        both = torch.cat([keys[:, :filled].float(), new.float()], dim=1)
        logits = by_group(query.float(), both.mT) * scaling
        ahead = torch.ones(length, filled + length, dtype=torch.bool, device=new.device).triu(filled + 1)
        drawn = logits.masked_fill(ahead, -INF).softmax(-1).sum((1, 2))
        drawn[:, :filled] += attention[:, :filled]
        fresh = torch.arange(stored, stored + length, device=new.device, dtype=torch.int32).expand(cls.count, -1)
        numbers = torch.cat([number[:, :filled], fresh], dim=1)

        protected = (numbers < cls.sink) | (numbers >= stored + length - cls.recent)
        kept = min(cls.capacity, filled + length)
        # Stable, so that of equal ones those in lower slots stay, and stored ones before new ones.
        ranked = drawn.masked_fill(protected, INF).sort(dim=1, descending=True, stable=True).indices
        best = ranked[:, :kept]
        keep = torch.zeros_like(drawn, dtype=torch.bool).scatter_(1, best, True)

        slot = torch.full((cls.count, length), -1, device=new.device)
        attention[:, :filled] = drawn[:, :filled]
        for h in range(cls.count):
            free = torch.cat([(~keep[h, :filled]).nonzero().flatten(), torch.arange(filled, kept, device=new.device)])
            taken = keep[h, filled:].nonzero().flatten()
            slot[h, taken] = free[: len(taken)]
            attention[h, slot[h, taken]] = drawn[h, filled + taken]
            number[h, slot[h, taken]] = numbers[h, filled + taken]
        return slot
