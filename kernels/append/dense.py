"""`append` in torch: all heads of a layer at once, whatever their capacities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from kvcompile.kernels.buffers import Buffers, as_stored
from kvcompile.kernels.codecs import CODECS
from kvcompile.kernels.layout import EXACT, KINDS, OTHER, SCORED, HeadRow, LayerLayout


class Heads(NamedTuple):
    """Some heads of a layer: their storage positions and the first of their rows somewhere, int64 [n]."""

    position: torch.Tensor
    row: torch.Tensor


class Tables(NamedTuple):
    """What never changes about a layer: int64 [H] a size, and its heads by the codec that they are stored in."""

    capacity: torch.Tensor
    sink: torch.Tensor
    recent: torch.Tensor
    scored: Heads
    sections: tuple[int, ...]
    """Scores of a sequence as sink, heavy and recent ones, head after head."""
    keys: dict[int, Heads]
    values: dict[int, Heads]


def _tables(layout: LayerLayout, device: torch.device) -> Tables:
    key = ("append", device)
    if key not in layout.memo:
        layout.memo[key] = _made(layout.rows, device)
    tables: Tables = layout.memo[key]
    return tables


def _made(rows: tuple[HeadRow, ...], device: torch.device) -> Tables:
    def numbers(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def heads(chosen: list[tuple[int, int]]) -> Heads:
        return Heads(numbers([h for h, _ in chosen]), numbers([row for _, row in chosen]))

    def side(name: str) -> dict[int, Heads]:
        found = {}
        for codec in (EXACT, *CODECS):
            chosen = [
                (h, getattr(row, f"{name}_row"))
                for h, row in enumerate(rows)
                if row.kind != OTHER and getattr(row, f"{name}_codec") == codec
            ]
            if chosen:
                found[codec] = heads(chosen)
        return found

    scored = [(h, row) for h, row in enumerate(rows) if row.kind == SCORED]
    sections = [n for _, row in scored for n in (row.sink, row.capacity - row.sink - row.recent, row.recent)]
    return Tables(
        *(numbers([getattr(row, name) for row in rows]) for name in ("capacity", "sink", "recent")),
        heads([(h, row.score) for h, row in scored]), tuple(sections), side("k"), side("v"),
    )  # fmt: skip


def append(
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    score: torch.Tensor | None,
    seen: Sequence[int] | torch.Tensor,
) -> None:
    """See `api.append`."""
    tables = _tables(layout, new_keys.device)
    count = torch.as_tensor(seen, dtype=torch.int64, device=new_keys.device)[:, None]
    over = count - tables.capacity
    slot = torch.where(over < 0, count, tables.capacity - tables.recent + over.clamp(min=0) % tables.recent)
    to = slot
    if score is not None and len(tables.scored.position):
        to = _rescue(scores, tables, slot, over, score)
    for stored, places, new in ((keys, tables.keys, new_keys), (values, tables.values, new_values)):
        for codec, heads in places.items():
            _write(stored, codec, heads, slot, to, new)
    if isinstance(seen, torch.Tensor) or 0 in seen:
        for stored, new in ((keys, new_keys), (values, new_values)):
            for cls in layout.classes:
                if KINDS.get(cls.policy, OTHER) != OTHER:
                    stored.write_anchor(cls, new[:, cls.heads, None], slot[:, cls.heads, None])


def _rescue(
    scores: torch.Tensor, tables: Tables, slot: torch.Tensor, over: torch.Tensor, score: torch.Tensor
) -> torch.Tensor:
    """Note the new token's score, and where what it overwrites goes: [B, H], its own slot if nowhere."""
    heads = tables.scored
    own = slot.index_select(1, heads.position)
    row = own + heads.row
    leaving = scores.gather(1, row)
    if any(tables.sections[1::3]):
        heavy = [part.mT for part in scores.split(tables.sections, 1)[1::3]]
        # `min` finds the first of equal ones; the victim is the last, as the lower slot stays.
        padded = pad_sequence(heavy, batch_first=True, padding_value=float("inf")).flip(1)
        worst, victim = padded.min(1)
        victim = padded.shape[1] - 1 - victim
        moves = (leaving > worst.mT) & (over.index_select(1, heads.position) >= 0)
        own = torch.where(moves, victim.mT + tables.sink.index_select(0, heads.position), own)
        scores.scatter_(1, own + heads.row, leaving)
    scores.scatter_(1, row, score.index_select(1, heads.position).half())
    return slot.index_copy(1, heads.position, own)


def _write(stored: Buffers, codec: int, heads: Heads, slot: torch.Tensor, to: torch.Tensor, new: torch.Tensor) -> None:
    new = new.index_select(1, heads.position)
    sequence = torch.arange(len(new), device=new.device)[:, None]
    row = heads.row + slot.index_select(1, heads.position)
    target = row if to is slot else heads.row + to.index_select(1, heads.position)
    for rows, part in zip(stored.parts(codec), as_stored(new, codec), strict=True):
        if to is not slot:
            rows[sequence, target] = rows[sequence, row]
        rows[sequence, row] = part.to(rows.dtype)
