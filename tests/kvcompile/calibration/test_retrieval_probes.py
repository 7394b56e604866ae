"""Probes: the ranges hold the facts, the facts hold the answer."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kvcompile.calibration.family import Family
from kvcompile.calibration.probes import Probe, draw_probes

PROSE = Family("prose", tuple(partial(str, f"Chapter {i}. " + "It rained on the hills. " * 80) for i in range(5)))


def facts(tokenizer: Any, probe: Probe) -> list[str]:
    return [tokenizer.decode(probe.prompt_ids[start:stop]) for start, stop in probe.needles]


@pytest.mark.parametrize("length", [500, 777, 1024])
def test_prompts_have_the_length_asked_for(tokenizer: Any, bos: list[int], length: int) -> None:
    for probe in draw_probes(tokenizer, [PROSE], length, 4, seed=0):
        assert len(probe.prompt_ids) == length
        assert list(probe.prompt_ids[: len(bos)]) == bos
        assert 0 not in probe.prompt_ids[len(bos) :]


def test_ranges_hold_the_facts(tokenizer: Any) -> None:
    drawn = draw_probes(tokenizer, [PROSE], 900, 6, seed=3)
    assert [probe.kind for probe in drawn] == ["direct", "reasoning"] * 3
    for probe in drawn:
        answer = tokenizer.decode(probe.answer_ids).strip()
        assert re.fullmatch(r"[0-9]{7}", answer)
        found = facts(tokenizer, probe)
        number = [fact for fact in found if answer in fact]
        assert len(number) == 1
        assert re.fullmatch(rf"\nThe special magic number for [a-z]+-[a-z]+ is {answer}\.\n", number[0])
        spans = sorted(probe.needles)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_two_hops_lead_from_the_question_to_the_answer(tokenizer: Any) -> None:
    for probe in draw_probes(tokenizer, [PROSE], 900, 6, seed=3)[1::2]:
        together = "".join(facts(tokenizer, probe))
        partner = re.search(r"secret partner of (\S+) is (\S+)\.", together)
        assert partner
        assert f"magic number for {partner[2]} is {tokenizer.decode(probe.answer_ids).strip()}." in together
        question = tokenizer.decode(probe.prompt_ids).rsplit("\n\n", 1)[1]
        assert question.endswith(f"The special magic number for the secret partner of {partner[1]} is")
        assert partner[2] not in question


def test_the_answer_is_nowhere_but_in_the_facts(tokenizer: Any) -> None:
    for probe in draw_probes(tokenizer, [PROSE], 900, 4, seed=1):
        whole = tokenizer.decode(probe.prompt_ids)
        assert whole.count(tokenizer.decode(probe.answer_ids).strip()) == 1


def test_short_text_is_served_again(tokenizer: Any) -> None:
    (probe,) = draw_probes(tokenizer, [Family("short", (partial(str, "One line only."),))], 1024, 1, seed=0)
    assert len(probe.prompt_ids) == 1024


def test_a_seed_gives_the_same_probes_and_another_seed_others(tokenizer: Any) -> None:
    first, again, other = (draw_probes(tokenizer, [PROSE], 400, 2, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.prompt_ids, b.prompt_ids) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.answer_ids, b.answer_ids) for a, b in zip(first, other, strict=True))
