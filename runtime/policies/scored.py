"""The compiled scorer's policy: beside sinks and a ring of recent tokens, what scores best is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels import HeadClass, overwrite
from kvcompile.runtime.policies.base import NewTokens, Placement, Policy, Prompt, ring_slots, slots_of


class Scored(Policy):
    """State a slot: its token's score (f16), which the store holds and decode steps keep up (`kernels.append`).

    When a head is full, the oldest token of the ring has to leave it. If it scores above the worst of the tokens
    between sinks and ring, it takes that one's slot, else it is lost; the new token takes its place in the ring. So the
    worst token that is neither a sink nor recent is the one that goes; of equal ones those in lower slots stay, and
    those between sinks and ring before the one that leaves it.
    """

    references = True

    def score(self, prompt: Prompt) -> torch.Tensor:
        assert prompt.score is not None
        # As the state holds them, so that the choice does not depend on when a token came.
        return prompt.score.half().float()

    def remember(self, state: list[torch.Tensor], token: torch.Tensor, score: torch.Tensor) -> None:
        state[0][:, :, : token.shape[2]] = score.half()

    def extend(
        self, state: list[torch.Tensor], cls: HeadClass, new_tokens: NewTokens, seen: Sequence[int]
    ) -> Placement:
        assert new_tokens.score is not None
        length, device = new_tokens.new.shape[2], new_tokens.new.device
        slot = torch.full((len(seen), cls.count, length), -1, device=device)
        moves: list[tuple[torch.Tensor, torch.Tensor]] = []
        for b, n in enumerate(seen):
            real = new_tokens.real[b]
            own, source, to_slot = self._extend_one(state[0][b], cls, new_tokens.score[b][:, real].half(), n)
            slot[b, :, real] = own
            moves.append((source, to_slot))
        most = max(source.shape[1] for source, _ in moves)
        source = torch.full((len(seen), cls.count, most), -1, device=device)
        to_slot = source.clone()
        for b, (one, to) in enumerate(moves):
            source[b, :, : one.shape[1]], to_slot[b, :, : to.shape[1]] = one, to
        return Placement(slot, source, to_slot)

    def _extend_one(
        self, kept: torch.Tensor, cls: HeadClass, score: torch.Tensor, seen: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One sequence, what feeding tokens one by one would lead to: slots [count, T] of new tokens, and the moves.

        Tokens leave the ring in order, old ones first and then, where there are more than it holds, new ones; the best
        of them and of the heavy tokens stay.
        """
        length, device = score.shape[1], score.device
        slot = ring_slots(cls, seen, length).to(device).repeat(cls.count, 1)
        gone = max(seen + length - max(cls.capacity, seen), 0)  # tokens that leave the ring
        first = max(seen, cls.capacity) - cls.recent  # number of the first of them
        numbers = torch.arange(first, first + gone, device=device)
        old = numbers[numbers < seen]
        source = slots_of(cls, old)
        fresh = numbers[len(old) :] - seen  # places among the new tokens
        leaving = torch.cat([kept[:, source], score[:, fresh]], dim=1)

        # Tokens on their way to the heavy slots while the store fills up are written by `slot` itself.
        heavy = kept[:, cls.sink : cls.capacity - cls.recent].clone()
        filling = torch.arange(seen, seen + length, device=device)
        filling = filling[(filling >= cls.sink) & (filling < cls.capacity - cls.recent)]
        heavy[:, filling - cls.sink] = score[:, filling - seen]

        # A stable sort: of equal scores the one in the lower slot stays, before those that leave the ring.
        order = torch.cat([heavy, leaving], dim=1).sort(dim=1, descending=True, stable=True).indices
        stays = torch.zeros(cls.count, heavy.shape[1] + gone, dtype=torch.bool, device=device)
        stays.scatter_(1, order[:, : heavy.shape[1]], True)
        enters, free = stays[:, heavy.shape[1] :], ~stays[:, : heavy.shape[1]]
        # The n-th token that enters takes the n-th slot that is free.
        slots = free.int().argsort(dim=1, descending=True, stable=True) + cls.sink
        rank = (enters.cumsum(1) - 1).clamp(min=0)
        target = slots.gather(1, rank) if slots.shape[1] and gone else torch.full_like(rank, -1)
        target = torch.where(enters, target, -1)

        # A new token whose slot on the way in has been given away is not stored, unless it enters anew.
        taken = torch.zeros(cls.count, cls.capacity + 1, dtype=torch.bool, device=device)
        taken.scatter_(1, torch.where(enters, target, cls.capacity), True)
        taken[:, cls.capacity] = False
        slot = torch.where((slot >= 0) & taken.gather(1, slot.clamp(min=0)), -1, slot)
        slot[:, fresh] = target[:, len(old) :]
        written = torch.cat([target[:, : len(old)], slot], dim=1)
        values = torch.cat([leaving[:, : len(old)], score], dim=1)
        overwrite(kept[None, ..., None], values[None, ..., None], written[None])
        return slot, source.expand(cls.count, -1), target[:, : len(old)]
