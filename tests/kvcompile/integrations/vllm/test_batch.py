"""How a batch of an engine is parted into steps and pieces of prompts, whatever its scheduler does."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.integrations.vllm.batch import Mark, Piece, Waiting, only_steps, split


@dataclass
class Sequence:
    """What a test's scheduler knows of a request, and what has been done with its tokens."""

    block: int
    prompt: int
    shared: int = 0
    tokens: int = 0
    """Prompt and answer so far; those that are read: `done`."""
    done: int = 0
    read: list[tuple[int, int]] = field(default_factory=list)
    """Prompt pieces as (first token, tokens)."""
    cuts: list[int] = field(default_factory=list)
    stepped: list[int] = field(default_factory=list)


def run(sequences: list[Sequence], chunks: list[int], waiting: Waiting) -> None:
    """One step of an engine: sequence i reads `chunks[i]` tokens."""
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk)
    waiting.marks = {s.block: Mark(s.shared, 7) for s in sequences if s.done < s.shared}
    lengths = [s.done + chunk for s, chunk in zip(sequences, chunks, strict=True)]
    steps, pieces = split(starts, lengths, [s.prompt for s in sequences], [s.block for s in sequences], waiting)
    by_block = {s.block: s for s in sequences}
    for i in steps:
        sequences[i].stepped.append(sequences[i].done)
    for piece in pieces:
        s = by_block[piece.block]
        if piece.prompt:
            s.read.append((piece.before, piece.prompt))
            if piece.last:
                s.cuts.append(piece.before + piece.prompt)
                assert (piece.keep == 7) == (piece.before + piece.prompt == s.shared)
        s.stepped += range(piece.before + piece.prompt, piece.before + piece.stop - piece.start)
    covered = sorted(row for piece in pieces for row in range(piece.start, piece.stop)) + [starts[i] for i in steps]
    assert sorted(covered) == list(range(starts[-1]))
    for s, chunk in zip(sequences, chunks, strict=True):
        s.done += chunk


@given(st.data())
def test_every_token_is_read_once_and_prompts_are_cut_at_their_ends(data: st.DataObject) -> None:
    """One prompt at a time is in the making, as in vLLM; others decode, are preempted and read again."""
    sequences = [
        Sequence(block + 1, prompt, data.draw(st.integers(0, prompt)))
        for block, prompt in enumerate(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    ]
    waiting = Waiting(1)
    for s in sequences:
        s.tokens = s.prompt
    for _ in range(60):
        running = [s for s in sequences if s.done]
        budget = data.draw(st.integers(len(sequences) + 1, 9))
        batch: list[tuple[Sequence, int]] = []
        for s in [*running, *(s for s in sequences if not s.done)]:
            chunk = min(s.tokens - s.done, budget)
            if chunk:
                batch.append((s, chunk))
                budget -= chunk
        batch = data.draw(st.permutations(batch))  # engines sort the requests of a batch as they like
        run([s for s, _ in batch], [chunk for _, chunk in batch], waiting)
        for s, _ in batch:
            if s.done == s.tokens:
                s.tokens += 1  # it has answered another token
        victim = data.draw(st.integers(0, 3 * len(sequences)))
        if victim < len(sequences):
            check(sequences[victim])
            preempted = sequences[victim]
            preempted.done, preempted.read, preempted.cuts, preempted.stepped = 0, [], [], []
    for s in sequences:
        check(s)


def check(s: Sequence) -> None:
    """Prompt tokens once each and in order, cut where the shared part and the whole end; then step after step."""
    tokens = [t for first, count in s.read for t in range(first, first + count)] + s.stepped
    assert tokens == list(range(s.done))
    ends = [end for end in sorted({s.shared, s.prompt} - {0}) if end <= s.done]
    # A last token of its own is a step, which ends the prompt as well.
    assert s.cuts == [end for end in ends if end - 1 not in s.stepped]


def test_a_state_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="block 3 holds no state of 40 tokens"):
        split([0, 5], [45], [45], [3], Waiting(1))


def test_a_kept_state_is_read_on_from() -> None:
    waiting = Waiting(1)
    waiting.begin(3, 40)
    assert split([0, 5], [45], [45], [3], waiting) == ([], [Piece(0, 5, 3, 40, 5, -1, True, True, 5)])
    waiting.begin(3, 44)
    assert split([0, 1], [45], [45], [3], waiting) == ([0], [])
    assert not waiting.kept


def test_more_prompts_than_places() -> None:
    with pytest.raises(RuntimeError, match='"staged"'):
        split([0, 5, 10], [5, 5], [9, 9], [1, 2], Waiting(1))


def test_a_prompt_that_ends_makes_room_for_one_that_is_before_it_in_the_batch() -> None:
    waiting = Waiting(1)
    split([0, 2048], [2048], [3548], [1], waiting)
    _, pieces = split([0, 548, 2048], [548, 3548], [3000, 3548], [2, 1], waiting)
    assert [(piece.block, piece.slot, piece.last) for piece in pieces] == [(1, 0, True), (2, 0, False)]


def test_a_prompt_that_is_gone_makes_room() -> None:
    waiting = Waiting(1)
    split([0, 5], [5], [9], [1], waiting)
    _, (piece,) = split([0, 4], [4], [9], [2], waiting)
    assert piece.slot == 0
    assert waiting.at(1) is None


def test_dry_runs_are_whole_prompts() -> None:
    assert split([0, 3, 6], [3, 3], [0, 0], [0, 0], Waiting(1))[1] == [
        Piece(0, 3, 0, 0, 3, -1, True, True, 3), Piece(3, 6, 0, 0, 3, -1, True, True, 3)
    ]  # fmt: skip


def test_a_block_of_a_prompt_that_is_gone_belongs_to_the_next() -> None:
    """Whichever of the two new prompts comes first, the one in pieces finds the place of the one that is gone."""
    waiting = Waiting(1)
    split([0, 5], [5], [9], [5], waiting)
    _, pieces = split([0, 6, 16], [6, 10], [30, 10], [7, 5], waiting)
    assert [(piece.block, piece.slot, piece.last) for piece in pieces] == [(7, 0, False), (5, -1, True)]
    assert waiting.at(5) is None


@pytest.mark.parametrize("rest", [1, 2, 5])
def test_a_kept_state_may_be_loaded_into_a_batch_of_single_tokens(rest: int) -> None:
    """Of `rest` tokens after it the first comes alone; metadata are made before states are loaded."""
    waiting = Waiting(2)
    assert only_steps([41], [40 + rest], [3], waiting) == []
    waiting.load(3, 40)
    waiting.ahead = {}
    if rest > 1:
        steps, pieces = split([0, rest - 1], [40 + rest], [40 + rest], [3], waiting)
        whole = [(piece.before, piece.prompt, piece.first, piece.last) for piece in pieces]
        assert (steps, whole) == (([0], []) if rest == 2 else ([], [(41, rest - 1, True, True)]))
    # The block's next sequence begins with the same state, and brings more than a token at once.
    waiting.load(3, 40)
    (piece,) = split([0, 4], [44], [50], [3], waiting)[1]
    assert (piece.before, piece.first) == (40, True)


def test_what_waits_is_stored_before_a_batch_of_single_tokens() -> None:
    waiting = Waiting(2)
    split([0, 6], [6], [9], [3], waiting)
    (held,) = only_steps([7], [9], [3], waiting)
    assert (held.block, held.origin, held.filled) == (3, 0, 6)
    assert waiting.kept == {3: 7}
    assert only_steps([8], [9], [3], waiting) == []
    assert waiting.kept == {3: 8}
