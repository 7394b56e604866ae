"""Attention through the cache, for one group of heads: the branch of a single token and that of several.

In a call whose buffers go in and out in the same memory, writing must come after every reading. Each branch therefore
reads a buffer only through what its writing depends on, or reads what has been written.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvcompile.export.onnx.attend import Case, NewTokens, attend_quantised, exact
from kvcompile.export.onnx.builder import Builder
from kvcompile.export.onnx.groups import Group, Side
from kvcompile.export.onnx.slots import Clock, Next, first_rows, ring_slot, token_of_slot


def one_token(b: Builder, group: Group, new_tokens: NewTokens, case: Case, place: Next) -> tuple[str, dict[str, str]]:
    """Write the token, then attend to what is stored: attention [B, heads, 1, D], and buffers by name."""
    if group.scores is not None and group.heavy:
        written = _replaced(b, group, new_tokens, case, place)
    else:
        written = {
            buffer.name: b.op("TensorScatter", buffer.past, new_tokens.rows[buffer.name], place.slot, axis=2)
            for buffer in group.slotted()
        }
    if group.quantised:
        return attend_quantised(b, group, new_tokens.query, written, place.filled, case), written
    keys, values = (_stored(b, side, written) for side in group.sides())
    return b.op("Attention", new_tokens.query, keys, values, "", "", "", place.filled, scale=case.scale), written


def _replaced(b: Builder, group: Group, new_tokens: NewTokens, case: Case, place: Next) -> dict[str, str]:
    """The token into its ring slot; the one that it held into the slot of the worst heavy one, if it is better."""
    assert group.scores is not None
    first = b.array(first_rows(case.clock.batch, group.count))
    at = b.op("Add", place.at, first)
    held = group.scores.past
    leaving = b.cast(b.op("GatherND", held, at), "float32")
    # From the last heavy slot down to the first: TopK takes the first of equal ones, and the lower slot is to stay.
    last = group.sink + group.heavy - 1
    beyond = group.sink - 1 - group.capacity  # counted from the end, as -1 alone would be the last slot
    downwards = b.op("Slice", held, b.ints(last), b.ints(beyond), b.ints(2), b.ints(-1))
    worst, place_down = b.several("TopK", 2, b.cast(downwards, "float32"), b.ints(1), largest=0)
    victim = b.op("Sub", b.ints(last), place_down)
    # A head that is not full loses nothing: some other slot is then written with what it holds.
    victim = b.op("Where", place.full, victim, place.other)
    victim = b.op("Add", b.op("Mul", b.op("Unsqueeze", victim, b.ints(3)), b.ints(0, 0, 1)), first)
    moves = b.op("And", b.op("Greater", leaving, worst), place.full)
    source = b.op("Where", b.op("Unsqueeze", moves, b.ints(3)), at, victim)
    target = b.concat([victim, at], 2)
    return {
        buffer.name: b.op(
            "ScatterND", buffer.past, target,
            b.concat([b.op("GatherND", buffer.past, source), new_tokens.rows[buffer.name]], 2),
        )
        for buffer in group.slotted()
    }  # fmt: skip


def _stored(b: Builder, side: Side, written: Mapping[str, str]) -> str:
    """All slots of an exact side as float32 [B, count, capacity, D]."""
    rows = written[side.rows.name]
    return b.cast(rows, "float32") if side.rows.dtype != "float32" else rows


def several_tokens(b: Builder, group: Group, new_tokens: NewTokens, case: Case) -> tuple[str, dict[str, str]]:
    """Attend to what is stored and causally to the new tokens, then store what stays: attention [B, heads, T, D], and
    buffers by name."""
    filled = b.op("Min", case.clock.longest, b.ints(group.capacity))
    joined = {
        buffer.name: b.concat([b.cut(buffer.past, 0, filled, 2), new_tokens.rows[buffer.name]], 2)
        for buffer in group.slotted()
    }
    keys, values = (
        _seen(b, side, new, joined, filled, case)
        for side, new in zip(group.sides(), (new_tokens.keys, new_tokens.values), strict=True)
    )
    mask = _mask(b, group, filled, case)
    attended = b.op("Attention", new_tokens.query, keys, values, mask, scale=case.scale)
    source = _sources(b, group, filled, joined, case)
    # [B, count, capacity, 3], the place of every slot's new contents among the joined rows.
    index = b.op("Add", b.op("Mul", b.op("Unsqueeze", source, b.ints(3)), b.ints(0, 0, 1)),
                 b.array(first_rows(case.clock.batch, group.count)))  # fmt: skip
    return attended, {name: b.op("GatherND", rows, index) for name, rows in joined.items()}


def _seen(b: Builder, side: Side, new: str, joined: Mapping[str, str], filled: str, case: Case) -> str:
    """What queries can see of a side, float32 [B, count, filled + T, D]: stored tokens as they are read, then new."""
    rows = joined[side.rows.name]
    if side.scales is None and side.rows.dtype == "float32":
        return rows
    stored = b.cut(rows, 0, filled, 2)
    if side.scales is None:
        return b.concat([b.cast(stored, "float32"), new], 2)
    scales = b.cut(joined[side.scales.name], 0, filled, 2)
    stored = side.codec.load("onnx").decode(b, stored, scales, case.head_dim)
    if side.anchor is None:
        return b.concat([stored, new], 2)
    anchor = b.cut(exact(b, side.anchor), 0, filled, 2)  # one row, or none where nothing is stored
    return b.concat([anchor, b.cut(stored, 1, filled, 2), new], 2)


def _mask(b: Builder, group: Group, filled: str, case: Case) -> str:
    """Which stored and new tokens the queries see: bool [B, 1, T, filled + T]."""
    clock, zero = case.clock, b.scalar(0, "int64")
    slot = b.op("Range", zero, b.op("Squeeze", filled), b.scalar(1, "int64"))
    seen = b.reshape(clock.seen, clock.batch, 1, 1, 1)
    valid = b.op("Less", slot, seen)
    if case.window:
        # A sliding layer is one ring without sinks: a slot holds the last token that is its number modulo the ring.
        last = b.op("Sub", seen, b.ints(1))
        token = b.op("Sub", last, b.op("Mod", b.op("Sub", last, slot), b.ints(group.capacity)))
        query = b.op("Unsqueeze", case.steps, b.ints(1))
        inside = b.op("Greater", token, b.op("Sub", b.op("Add", query, seen), b.ints(case.window)))
        valid = b.op("And", valid, inside)
    shape = b.concat([b.ints(clock.batch, 1), clock.length, filled], 0)
    stored = b.op("Expand", valid, shape)
    among = b.op("Expand", case.causal, b.concat([b.ints(clock.batch, 1), clock.length, clock.length], 0))
    return b.concat([stored, among], 3)


def _sources(b: Builder, group: Group, filled: str, joined: Mapping[str, str], case: Case) -> str:
    """Where among the joined rows every slot's contents come from: int64 [B, count, capacity]."""
    clock, sizes = case.clock, (group.capacity, group.recent)
    seen, total = (b.reshape(x, clock.batch, 1) for x in (clock.seen, clock.total))

    def rows(token: str) -> str:
        """Rows of tokens by number, int64 [B, X]: of stored ones their slot, the ring's or the one they first had."""
        new = b.op("Min", b.op("Sub", token, seen), b.op("Sub", clock.length, b.ints(1)))
        return b.op("Where", b.op("Less", token, seen), ring_slot(b, token, *sizes), b.op("Add", new, filled))

    def of_slots(first: int, last: int) -> str:
        slots = np.arange(first, last)
        return _for_heads(b, rows(token_of_slot(b, total, slots, *sizes)), group, clock)

    if group.scores is None or not group.heavy:
        return of_slots(0, group.capacity)
    edge = group.capacity - group.recent
    # What competes for the heavy slots: what they hold, or come to hold first; and what leaves the ring, one token
    # after another, be it stored or new.
    oldest = b.op("Sub", b.op("Max", seen, b.ints(group.capacity)), b.ints(group.recent))
    leaving = b.op("Add", oldest, case.steps)
    leaves = b.op("Unsqueeze", b.op("Less", leaving, b.op("Sub", total, b.ints(group.recent))), b.ints(1))
    holds = of_slots(group.sink, edge)
    rivals = b.concat([holds, _for_heads(b, rows(leaving), group, clock)], 2)
    score = b.cast(b.op("GatherElements", joined[group.scores.name], rivals, axis=2), "float32")
    held, left = b.cut(score, 0, group.heavy, 2), b.cut(score, group.heavy, np.iinfo(np.int64).max, 2)
    score = b.concat([held, b.op("Where", leaves, left, b.scalar(-np.inf))], 2)
    chosen = b.several("TopK", 2, score, b.ints(group.heavy), largest=1)[1]  # of equal ones the first
    best = b.op("GatherElements", rivals, _arranged(b, chosen, rivals, group, seen), axis=2)
    over = b.op("Unsqueeze", b.op("Greater", total, b.ints(group.capacity)), b.ints(2))
    kept = b.op("Where", over, best, holds)
    sinks = [of_slots(0, group.sink)] if group.sink else []
    return b.concat([*sinks, kept, of_slots(edge, group.capacity)], 2)


def _arranged(b: Builder, chosen: str, rivals: str, group: Group, seen: str) -> str:
    """Which of the rivals [B, count, heavy + T] each heavy slot gets: after a first prompt they lie in the order of
    tokens, later those that stay do not move. So the runtime has it, and decides between equal scores alike."""
    ordered = b.several("TopK", 2, chosen, b.ints(group.heavy), largest=0)[0]
    nothing = b.op("Mul", rivals, b.scalar(0, "int64"))
    one = b.op("Expand", b.ints(1), b.op("Shape", chosen))
    stays = b.cut(b.op("ScatterElements", nothing, chosen, one, axis=2), 0, group.heavy, 2)
    # The n-th slot that is free gets the n-th that enters; those that stay come first in the order of all.
    staying = b.op("ReduceSum", stays, b.ints(2), keepdims=1)
    number = b.op("CumSum", b.op("Sub", b.ints(1), stays), b.scalar(2, "int64"))
    place = b.op("Max", b.op("Sub", b.op("Add", staying, number), b.ints(1)), b.ints(0))
    slots = b.array(np.arange(group.heavy)[None, None])
    moved = b.op("Where", b.cast(stays, "bool"), slots, b.op("GatherElements", ordered, place, axis=2))
    first = b.op("Equal", b.op("Unsqueeze", seen, b.ints(2)), b.ints(0))
    return b.op("Where", first, ordered, moved)


def _for_heads(b: Builder, rows: str, group: Group, clock: Clock) -> str:
    """[B, X] as [B, count, X]."""
    shape = b.concat([b.ints(clock.batch, group.count), b.op("Shape", rows, start=1)], 0)
    return b.op("Expand", b.op("Unsqueeze", rows, b.ints(1)), shape)
