"""What the rows of a batch are: steps of sequences that decode, and pieces of prompts.

vLLM hands over flat rows, a few neighbouring ones for every request. A prompt may come whole or in chunks; what is kept
of it must not depend on that, so a prompt's exact keys and values wait (`Waiting`) until it has been read to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a batch, of the sequence in `block`: the next tokens after the first `before` ones. The
    first `prompt` rows are the prompt's, the others what was answered before vLLM preempted the request, read again.

    `slot`: where the prompt waits (-1: it is here as a whole); `first` and `last`: whether this is the beginning and
    the end of what is read of it; `length`: prompt tokens to read in all, from the beginning or from a kept state on.
    """

    start: int
    stop: int
    block: int
    before: int
    prompt: int
    slot: int
    first: bool
    last: bool
    length: int


@dataclass
class Held:
    """A prompt that waits in `slot`."""

    slot: int
    block: int
    origin: int
    """Tokens that the page held when the prompt began: 0, or those of a kept state."""
    filled: int


@dataclass
class Waiting:
    """Which prompts wait, in `slots` places. `kept` are the blocks that begin with a kept state, and its tokens."""

    slots: int
    kept: dict[int, int] = field(default_factory=dict)
    _held: dict[int, Held] = field(default_factory=dict)

    def begin(self, block: int, tokens: int) -> None:
        """A kept state of this many tokens has been put into a block."""
        self.drop(block)
        self.kept[block] = tokens

    def at(self, block: int) -> int | None:
        """The slot of the prompt that this block's sequence is reading, if it waits."""
        return next((slot for slot, held in self._held.items() if held.block == block), None)

    def end(self, block: int, tokens: int) -> Held | None:
        """What waits of this block's prompt, if it is the first `tokens` of it, and waits no more."""
        slot = self.at(block)
        held = None if slot is None else self._held.pop(slot)
        return held if held is not None and held.origin + held.filled == tokens else None

    def drop(self, block: int) -> None:
        """The sequence that had this block is gone, or its prompt has ended."""
        if (slot := self.at(block)) is not None:
            del self._held[slot]

    def take(self, block: int, origin: int, present: Sequence[int]) -> int:
        """A slot for a prompt that begins. One whose sequence is not in the batch any more is free: vLLM schedules a
        prompt that it has begun in every step, before others, until it is done, preempted or aborted."""
        self.drop(block)
        for slot, held in list(self._held.items()):
            if held.block not in present:
                del self._held[slot]
        slot = next((slot for slot in range(self.slots) if slot not in self._held), None)
        if slot is None:
            raise RuntimeError(
                f'more than {self.slots} prompts are read in chunks at once: give "staged" in '
                "--model-loader-extra-config a larger number"
            )
        self._held[slot] = Held(slot, block, origin, 0)
        return slot

    def piece(self, start: int, stop: int, block: int, before: int, prompt: int, present: Sequence[int]) -> Piece:
        """The piece that rows [start, stop) are; `prompt`: tokens of the request's whole prompt."""
        here = min(max(prompt - before, 0), stop - start)
        slot = self.at(block)
        if before == 0 or (slot is not None and before != self._held[slot].origin + self._held[slot].filled):
            self.drop(block)
            slot = None
        last = before + here == prompt
        if not here:  # nothing but what was answered before
            return Piece(start, stop, block, before, 0, -1, False, False, 0)
        first = slot is None
        if slot is None:
            if before and self.kept.get(block) != before:
                raise RuntimeError(f"block {block} holds no state after {before} tokens")
            self.kept.pop(block, None)
            if last:
                return Piece(start, stop, block, before, here, -1, True, True, here)
            slot = self.take(block, before, present)
        held = self._held[slot]
        held.filled += here
        if last:
            del self._held[slot]
        return Piece(start, stop, block, before, here, slot, first, last, prompt - held.origin)


def split(
    starts: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], blocks: Sequence[int], waiting: Waiting
) -> tuple[list[int], list[Piece]]:
    """The requests of a batch that take a step, and the pieces of the others.

    `starts` [n + 1]: first rows; `lengths` [n]: tokens of every sequence, these rows included; `prompts` [n]: tokens of
    its prompt (0: not known, as in a dry run); `blocks` [n].
    """
    steps, pieces = [], []
    for i, block in enumerate(blocks):
        start, stop = starts[i], starts[i + 1]
        before = lengths[i] - (stop - start)
        prompt = prompts[i] or lengths[i]
        if stop - start == 1 and before + 1 >= prompt and waiting.at(block) is None:
            # A single token on what is stored, or into an empty store: one way for all of them.
            waiting.kept.pop(block, None)
            steps.append(i)
        elif stop > start:
            pieces.append(waiting.piece(start, stop, block, before, prompt, blocks))
    return steps, pieces
