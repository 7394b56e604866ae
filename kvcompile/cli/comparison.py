"""Two answers beside each other, and where they part (`kvcompile run --compare`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvcompile.cli.answer import Answer
from kvcompile.cli.output import approximate

SIDE_BY_SIDE = 100
"""Columns of a terminal from which on the answers stand beside each other."""
BEFORE, AFTER = 12, 4
"""Tokens shown before and after the place where two answers part."""


@dataclass(frozen=True)
class Parting:
    """Two answers of one prompt first differ in token `at`; `before` is the text they share until there, shortened,
    `budget` and `full` how each goes on ("" where it ends)."""

    at: int
    before: str
    budget: str
    full: str


def part(tokenizer: Any, budget: Sequence[int], full: Sequence[int]) -> Parting | None:
    """Where two answers, as token ids, part; None if they are the same, token by token."""
    if list(budget) == list(full):
        return None
    pairs = zip(budget, full, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(budget), len(full)))

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    before = text(budget[max(at - BEFORE, 0) : at])
    return Parting(
        at, ("..." if at > BEFORE else "") + before, text(budget[at : at + AFTER]), text(full[at : at + AFTER])
    )


@dataclass(frozen=True)
class Comparison:
    """Both answers to a prompt of `prompt_tokens` tokens, under an artifact for contexts of `context` tokens; `parting`
    is None where they are the same, token by token."""

    context: int
    prompt_tokens: int
    budget: Answer
    full: Answer
    parting: Parting | None


def show(console: Console, found: Comparison) -> None:
    """Print both answers with their figures, where they part, and in the last line what was saved."""
    beside = console.is_terminal and console.width >= SIDE_BY_SIDE
    answers = _columns(found.budget, found.full) if beside else _rows(found.budget, found.full)
    verdict = Text(f"\n{parting_line(found.parting)}\n{saved_line(found)}")
    # Lines of a pipe are not broken: who reads them looks for whole ones.
    console.print(answers, verdict, sep="\n", soft_wrap=not console.is_terminal)


def parting_line(parting: Parting | None) -> str:
    """Where the answers part, in words."""
    if parting is None:
        return "The same answer, token by token."
    ends = [repr(text) if text else "nothing more" for text in (parting.budget, parting.full)]
    place = f"after {parting.before!r}" if parting.before else "at once"
    return f"The answers part at token {parting.at + 1}: {place} the artifact has {ends[0]}, the full cache {ends[1]}."


def saved_line(found: Comparison) -> str:
    """What the budget saved for this prompt."""
    budget, full = found.budget.cache_bytes, found.full.cache_bytes
    same = "the same answer" if found.parting is None else "another answer"
    tokens = found.prompt_tokens + len(found.budget.tokens)
    if budget >= full:
        # The budget is allocated for the artifact's context, whatever the prompt; a DynamicCache grows with it.
        return (
            f"Saved: nothing at {tokens} tokens, of which the full cache takes {approximate(full)}; the artifact's "
            f"{approximate(budget)} are for {found.context} tokens; {same}."
        )
    return (
        f"Saved: {approximate(full - budget)} of {approximate(full)} of KV cache at {tokens} tokens, "
        f"{full / budget:.1f} times smaller; {same}."
    )


def _figures(answer: Answer) -> str:
    return (
        f"cache {approximate(answer.cache_bytes)} ({answer.cache_bytes} bytes)\n"
        f"{len(answer.tokens)} new tokens at {answer.tokens_per_second:.1f} a second, after a prefill of "
        f"{answer.prefill_seconds:.1f} s"
    )


def _columns(budget: Answer, full: Answer) -> RenderableType:
    table = Table("with the artifact", "with the full cache", show_lines=True, expand=True)
    # Text and not str: an answer may hold what rich takes for markup.
    table.add_row(Text(budget.text.strip()), Text(full.text.strip()))
    table.add_row(Text(_figures(budget)), Text(_figures(full)))
    for column in table.columns:
        column.ratio = 1
    return table


def _rows(budget: Answer, full: Answer) -> RenderableType:
    parts = []
    for title, answer in (("With the artifact", budget), ("With the full cache", full)):
        parts += [Text(f"{title}:\n\n{answer.text.strip()}\n"), Text(f"{_figures(answer)}\n")]
    return Group(*parts)
