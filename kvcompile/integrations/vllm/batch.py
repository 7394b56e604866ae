"""What the rows of a batch are: steps of sequences that decode, and pieces of prompts.

vLLM hands over flat rows, a few neighbouring ones for every request. A prompt may come whole or in chunks; what is kept
of it must not depend on that, so a prompt's exact keys and values wait (`Waiting`) until it has been read to its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a batch, of the sequence in `block`: the next tokens after the first `before` ones. The
    first `prompt` rows are the prompt's, the others what was answered before vLLM preempted the request, read again.

    `slot`: where the prompt waits (-1: it is here as a whole); `first` and `last`: whether this is the beginning and
    the end of what is read of it; `length`: prompt tokens to read in all, from the beginning or from a kept state on;
    `keep`: where the state at its end is kept (-1: nowhere).
    """

    start: int
    stop: int
    block: int
    before: int
    prompt: int = 0
    slot: int = -1
    first: bool = False
    last: bool = False
    length: int = 0
    keep: int = -1


class Mark(NamedTuple):
    """The state of a request after its first `tokens` tokens is a shared prefix: read to there, cut, and then read on.
    `keep` is where it is kept (-1: not in this step)."""

    tokens: int
    keep: int


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
    """Which prompts wait, in `slots` places. `kept` are the blocks that begin with a kept state, and its tokens;
    `marks` the blocks of the batch under way whose prompts have a shared prefix; `ahead` those of `only_steps` whose
    prompts go on, and their tokens after it."""

    slots: int
    kept: dict[int, int] = field(default_factory=dict)
    marks: Mapping[int, Mark] = field(default_factory=dict)
    ahead: Mapping[int, int] = field(default_factory=dict)
    _held: dict[int, Held] = field(default_factory=dict)

    def begin(self, block: int, tokens: int) -> None:
        """A kept state of this many tokens has been put into a block."""
        self.drop(block)
        self.kept[block] = tokens

    def load(self, block: int, tokens: int) -> None:
        """The same for a batch that is under way, in which the block may have taken a step beyond it."""
        if self.ahead.get(block) != tokens + 1:
            self.begin(block, tokens)

    def at(self, block: int) -> Held | None:
        """The prompt that this block's sequence is reading, if it waits."""
        return next((held for held in self._held.values() if held.block == block), None)

    def end(self, block: int, tokens: int) -> Held | None:
        """What waits of this block's prompt, if it is the first `tokens` of it, and waits no more."""
        held = self.at(block)
        self.drop(block)
        return held if held is not None and held.origin + held.filled == tokens else None

    def check(self, block: int, before: int) -> None:
        """A block's sequence has `before` tokens now: what waits there is another one's, which had the block before,
        where it is not so many."""
        held = self.at(block)
        if held is not None and (before == 0 or before != held.origin + held.filled):
            self.drop(block)

    def drop(self, block: int) -> None:
        """The sequence that had this block is gone, or its prompt has ended."""
        if (held := self.at(block)) is not None:
            del self._held[held.slot]

    def take(self, block: int, origin: int, present: Sequence[int]) -> Held:
        """A place for a prompt that begins. That of a sequence that is not in the batch any more is free: vLLM
        schedules a prompt that it has begun in every step, before others, until it is done, preempted or aborted."""
        for slot, held in list(self._held.items()):
            if held.block not in present:
                del self._held[slot]
        free = next((slot for slot in range(self.slots) if slot not in self._held), None)
        if free is None:
            raise RuntimeError(
                f'more than {self.slots} prompts are read in chunks at once: give "staged" in '
                "--model-loader-extra-config a larger number"
            )
        self._held[free] = Held(free, block, origin, 0)
        return self._held[free]

    def piece(self, rows: tuple[int, int], block: int, before: int, end: int, keep: int, present: list[int]) -> Piece:
        """The piece that these rows are, of a prompt (or a part of one) that ends after `end` tokens."""
        (start, stop), held = rows, self.at(block)
        here = min(end - before, stop - start)
        last, first = before + here == end, held is None
        if held is None:
            kept = self.kept.pop(block, None)
            if before and kept != before:
                raise RuntimeError(f"block {block} holds no state of {before} tokens")
            if last:
                return Piece(start, stop, block, before, here, -1, True, True, here, keep)
            held = self.take(block, before, present)
        held.filled += here
        if last:
            self.drop(block)
        return Piece(start, stop, block, before, here, held.slot, first, last, end - held.origin, keep)


def only_steps(lengths: list[int], prompts: list[int], blocks: list[int], waiting: Waiting) -> list[Held]:
    """What has to be stored before a batch of single tokens, as in `split`. vLLM replays a recorded step for any such
    batch, and a token may be a prompt's, where a chunk is one token long: what waits of that prompt is stored first,
    and the token is a step like the others. States are loaded after this and before the step."""
    found, ahead = [], {}
    for length, prompt, block in zip(lengths, prompts, blocks, strict=True):
        if (held := waiting.end(block, length - 1)) is not None:
            found.append(held)
        if length < prompt:
            waiting.begin(block, length)
            ahead[block] = length
    waiting.ahead = ahead
    return found


def split(
    starts: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], blocks: list[int], waiting: Waiting
) -> tuple[list[int], list[Piece]]:
    """The requests of a batch that take a step, and the pieces of the others, in the order in which they are read.

    `starts` [n + 1]: first rows; `lengths` [n]: tokens of every sequence, these rows included; `prompts` [n]: tokens of
    its prompt (0: not known, as in a dry run); `blocks` [n].
    """
    steps: list[int] = []
    pieces: list[Piece] = []
    for i, block in enumerate(blocks):
        waiting.check(block, lengths[i] - (starts[i + 1] - starts[i]))
    # A batch may have a prompt that begins before one that ends: what waits is read first, and makes room.
    for i in sorted(range(len(blocks)), key=lambda i: waiting.at(blocks[i]) is None):
        block, row, stop = blocks[i], starts[i], starts[i + 1]
        before = lengths[i] - (stop - row)
        prompt = prompts[i] or lengths[i]
        mark = waiting.marks.get(block, Mark(0, -1))
        if stop - row == 1 and before + 1 >= prompt and waiting.at(block) is None and before >= mark.tokens:
            # A single token on what is stored, or into an empty store: one way for all of them.
            waiting.kept.pop(block, None)
            steps.append(i)
            continue
        for end in sorted({min(mark.tokens, prompt), prompt}):
            here = min(end - before, stop - row)
            if here <= 0:
                continue
            then = stop if end == prompt else row + here
            keep = mark.keep if before + here == mark.tokens else -1
            pieces.append(waiting.piece((row, then), block, before, end, keep, blocks))
            row, before = row + here, before + here
            if before == end < prompt:
                waiting.begin(block, end)
        if row < stop and before >= prompt and (not pieces or pieces[-1].stop <= row):
            pieces.append(Piece(row, stop, block, before))  # nothing but what was answered before
    return steps, pieces
