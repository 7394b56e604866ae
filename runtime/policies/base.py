"""What a token policy decides: which prompt tokens stay, and which slots new tokens take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcompile.kernels import HeadClass, Softmax
from kvcompile.kernels.softmax import PLAIN


@dataclass(frozen=True)
class Placement:
    """Where new tokens go: `slot` int64 [B, count, T], -1 for those that are not stored. What is in the slots `source`
    int64 [B, count, M] moves to the slots `to_slot` (-1: nowhere) before."""

    slot: torch.Tensor
    source: torch.Tensor
    to_slot: torch.Tensor

    @classmethod
    def at(cls, slot: torch.Tensor) -> Placement:
        """Nothing moves."""
        nothing = slot[:, :, :0]
        return cls(slot, nothing, nothing)

    def to(self, device: torch.device) -> Placement:
        return Placement(self.slot.to(device), self.source.to(device), self.to_slot.to(device))


@dataclass(frozen=True)
class NewTokens:
    """Several new tokens on a filled cache: `query` [B, count, group, T, D]; `stored` keys [B, count, capacity, D]
    before any write, empty for policies that do not observe; `new` [B, count, T, D] their own keys; `real` bool [B, T]
    False for padding; `score` f32 [B, count, T] by the compiled scorer, where there is one."""

    query: torch.Tensor
    stored: torch.Tensor
    new: torch.Tensor
    real: torch.Tensor
    scaling: float
    score: torch.Tensor | None


@dataclass(frozen=True)
class Prompt:
    """Prompts that have been read, as the heads of one class see them, side by side in columns: sequence b is columns
    from `pad[b]` on (int64 [B]; None: all of them, no padding).

    `keys` [B, count, n, D]; `query` [B, count, group, w, D] of the last w = min(`Policy.queries`, n) columns; `drawn`
    f32 [B, count, n], what attention every column has drawn from all queries of its group, where `Policy.sums` asks for
    it; `score` f32 [B, count, n] by the compiled scorer, where there is one; `softmax` is the class's. Of padding all
    are meaningless.
    """

    keys: torch.Tensor
    query: torch.Tensor
    pad: torch.Tensor | None
    scaling: float
    drawn: torch.Tensor | None
    score: torch.Tensor | None
    softmax: Softmax = PLAIN


class Policy:
    """Sinks and a ring of recent tokens (StreamingLLM, arXiv 2309.17453); also the base of the others.

    A policy is stateless; what it has to remember of one class of heads lies in tensors that it allocates with
    `new_state` and that the cache counts, copies and reorders along their first (sequence) dimension.
    """

    observes = False
    """Whether it learns from the attention of every step."""

    references = False
    """Whether reference queries say, beside `score`, which tokens of a prompt to keep, and values are fitted to them
    (`runtime.references`)."""

    queries = 0
    """How many of a prompt's last queries `score` looks at."""
    sums = False
    """Whether `score` looks at the attention that all of a prompt's queries pay."""

    def new_state(self, batch: int, cls: HeadClass, device: torch.device) -> list[torch.Tensor]:
        """Tensors [batch, count, capacity] to keep beside the class's K and V."""
        return []

    def score(self, prompt: Prompt) -> torch.Tensor | None:
        """Utility of each prompt token, f32 [B, count, n] by column, higher is better; None where only its place
        counts. What it says of padding is ignored."""
        return None

    def remember(self, state: list[torch.Tensor], token: torch.Tensor, score: torch.Tensor) -> None:
        """Note what is kept of prompts, where there is something to remember: by slot, the tokens' numbers int64
        [B, count, kept] and what `score` says of them. Slots without a token are zero in both."""

    def place(self, state: list[torch.Tensor], cls: HeadClass, seen: Sequence[int]) -> torch.Tensor:
        """Slots int64 [B, count, 1] of the next token of each sequence; only where `observes`, all other policies are
        those that `kernels.append` knows."""
        raise NotImplementedError

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
        self, state: list[torch.Tensor], cls: HeadClass, new_tokens: NewTokens, seen: Sequence[int]
    ) -> Placement:
        """Where several new tokens go."""
        slot = torch.full((len(seen), cls.count, new_tokens.new.shape[2]), -1, device="cpu")
        for b, n in enumerate(seen):
            slot[b, :, new_tokens.real[b].cpu()] = ring_slots(cls, n, int(new_tokens.real[b].sum()))
        return Placement.at(slot)


def slots_of(cls: HeadClass, token: torch.Tensor) -> torch.Tensor:
    """`HeadClass.ring_slot` of many tokens."""
    ring = cls.capacity - cls.recent + (token - cls.capacity) % cls.recent
    return torch.where(token < cls.capacity, token, ring)


def ring_slots(cls: HeadClass, seen: int, length: int) -> torch.Tensor:
    """Slots of the next `length` tokens after `seen`, int64 [length]; -1 where a later one of them takes the same slot,
    as of more tokens than the ring holds only the last stay."""
    token = torch.arange(seen, seen + length, device="cpu")
    slots = slots_of(cls, token)
    rewritten = (token >= cls.capacity - cls.recent) & (token + cls.recent < seen + length)
    return slots.masked_fill(rewritten, -1)
