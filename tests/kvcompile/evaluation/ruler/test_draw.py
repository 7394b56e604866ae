"""Samples as token ids: of the length asked for, and the same for a seed."""

from __future__ import annotations

import re

import pytest

from kvcompile.artifacts import TargetError
from kvcompile.evaluation.ruler import TASKS, draw_samples, essay_documents

NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}
DOCUMENTS = essay_documents(None)


@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192])
def test_samples_fill_the_context(smollm2_tokenizer, length: int) -> None:
    samples = draw_samples(smollm2_tokenizer, TASKS, length, 2, 0, DOCUMENTS)
    assert [(one.task, one.number) for one in samples] == [(name, i) for name in TASKS for i in range(2)]
    for one in samples:
        assert one.new_tokens == NEW_TOKENS.get(one.task, 128)
        used = len(one.context) + len(one.question) + one.new_tokens
        # The next unit would not fit; a common word less often adds three entries, a UUID needle a hundred tokens.
        assert length - 110 < used <= length, one.task
        read = smollm2_tokenizer.decode(one.context)
        assert all(expected in read for expected in one.expected)
        rest = smollm2_tokenizer.decode(one.question)
        assert one.asked in rest
        assert not any(expected in rest for expected in one.expected)


def test_the_seed_says_all(smollm2_tokenizer) -> None:
    def drawn(seed: int) -> list[tuple[object, ...]]:
        samples = draw_samples(smollm2_tokenizer, TASKS, 1024, 2, seed, DOCUMENTS)
        return [(one, one.context.tolist(), one.question.tolist()) for one in samples]

    first = drawn(5)
    assert drawn(5) == first
    assert not any(one in first for one in drawn(6))
    assert all(a[0].expected != b[0].expected for a, b in zip(first[::2], first[1::2], strict=True))


def test_more_samples_begin_with_the_same(smollm2_tokenizer) -> None:
    tasks = {"vt": TASKS["vt"]}
    few, many = (draw_samples(smollm2_tokenizer, tasks, 1024, count, 0, DOCUMENTS) for count in (1, 3))
    assert many[0].context.tolist() == few[0].context.tolist()


@pytest.mark.parametrize("name", TASKS)
def test_the_least_length_is_named(smollm2_tokenizer, name: str) -> None:
    tasks = {name: TASKS[name]}
    with pytest.raises(TargetError, match=f"100 tokens is too short for {name}: expected") as refusal:
        draw_samples(smollm2_tokenizer, tasks, 100, 3, 0, DOCUMENTS)
    least = int(re.findall(r"expected (\d+) or more", str(refusal.value))[0])
    assert len(draw_samples(smollm2_tokenizer, tasks, least, 3, 0, DOCUMENTS)) == 3
    with pytest.raises(TargetError, match="too short"):
        draw_samples(smollm2_tokenizer, tasks, least - 1, 3, 0, DOCUMENTS)
