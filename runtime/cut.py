"""Which tokens of a prompt the heads keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels import HeadClass, LayerLayout
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.references import ReferredHead


def kept_of(
    prompt: LayerPrompt,
    layout: LayerLayout,
    state: Sequence[list[torch.Tensor]],
    referred: Sequence[ReferredHead] = (),
) -> list[torch.Tensor]:
    """The columns of prompts that a layer's heads keep, class by class as in `kept_columns`; what their policies
    remember of them goes into `state`. In `referred` heads the prompt's references have a say."""
    pad, chosen = prompt.columns - prompt.lengths.long(), []
    scores = [
        POLICIES[cls.policy].score(prompt.of(cls)) if own or prompt.columns > cls.capacity else None
        for cls, own in zip(layout.classes, state, strict=True)
    ]
    if referred:
        scores = with_references(scores, referred)
    for cls, own, score in zip(layout.classes, state, scores, strict=True):
        column = kept_columns(cls, prompt.columns, pad, score)
        if own and score is not None:
            token = column - pad[:, None, None]
            slot = torch.arange(column.shape[2], device=pad.device)
            empty = (slot >= prompt.lengths[:, None])[:, None]
            worth = score.gather(2, column).masked_fill(empty, 0)
            POLICIES[cls.policy].remember(own, token.masked_fill(empty, 0), worth)
        chosen.append(column)
    return chosen


def with_references(
    scores: Sequence[torch.Tensor | None], referred: Sequence[ReferredHead]
) -> list[torch.Tensor | None]:
    """Scores of prompts' columns, f32 [B, count, n] class by class, as they are with what references say of them."""
    found = [None if score is None else score.clone() for score in scores]
    for one in referred:
        table = found[one.which]
        assert table is not None
        row = table[one.b, one.place, one.own]
        row.copy_(one.attended.scores(row))
    return found


def kept_tokens(cls: HeadClass, count: int, score: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which of `count` prompt tokens each head keeps, by slot: int64 [cls.count, min(count, capacity)].

    First the sinks, then the best by `score` f32 [cls.count, `count`] (None: the latest; of equal ones the earliest),
    then the ring of recent ones.
    """
    pad = torch.zeros(1, dtype=torch.int64, device=device)
    return kept_columns(cls, count, pad, None if score is None else score[None])[0]


def kept_columns(cls: HeadClass, columns: int, pad: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
    """The same for prompts side by side in `columns` columns, of which those from `pad[b]` int64 [B] on are sequence b:
    the columns kept, by slot, int64 [B, cls.count, min(columns, capacity)]. Of a sequence that is shorter than that,
    the slots after its last token have no meaning. `score` f32 [B, cls.count, columns].
    """
    slots = min(columns, cls.capacity)
    slot = torch.arange(slots, device=pad.device)
    first = pad[:, None]
    whole = (first + slot).clamp(max=columns - 1)[:, None].expand(-1, cls.count, -1)
    if columns <= cls.capacity:
        return whole
    ring_start = columns - cls.recent
    ring = torch.arange(cls.recent, device=pad.device)
    # The ring turns with the number of tokens, so that the next one overwrites the oldest.
    ring = ring_start + (ring - (columns - first - cls.capacity)) % cls.recent
    heavy = _best(score, first + cls.sink, ring_start, cls, columns)
    cut = torch.cat(
        [
            (first + slot[: cls.sink])[:, None].expand(-1, cls.count, -1),
            heavy,
            ring[:, None].expand(-1, cls.count, -1),
        ],
        dim=2,
    )
    fits = (columns - first <= cls.capacity)[:, None]
    return torch.where(fits, whole, cut)


def _best(score: torch.Tensor | None, start: torch.Tensor, stop: int, cls: HeadClass, columns: int) -> torch.Tensor:
    """The columns for the heavy slots, in order, of those from `start` int64 [B, 1] to `stop`."""
    count = cls.capacity - cls.sink - cls.recent
    column = torch.arange(columns, device=start.device)
    if score is None or not count:
        return torch.arange(stop - count, stop, device=start.device).expand(len(start), cls.count, -1)
    free = (column >= start) & (column < stop)
    # What is not to be chosen comes after the worst of the others. Sorted and not `topk`, whose choice between equal
    # scores is anyone's guess: in float16 many are equal.
    ranked = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~free[:, None], -torch.inf)
    best = ranked.sort(dim=2, descending=True, stable=True).indices[:, :, :count]
    return best.sort(dim=2).values
