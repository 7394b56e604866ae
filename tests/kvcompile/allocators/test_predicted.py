"""Predicted losses of plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcompile.allocators.optimal import Optimal
from kvcompile.allocators.predicted import family_losses, predicted_loss
from kvcompile.stages import RETRIEVAL


def test_questions_count_as_much_as_all_texts(make_problem) -> None:
    """As in the plans that a profile runs, whose measured loss is half that of an episode's text, half of its
    questions'."""
    problem = make_problem(families=4)
    plan = Optimal()(problem)
    *texts, questions = family_losses(problem, plan)
    assert predicted_loss(problem, plan) == pytest.approx((sum(texts) + questions) / 4)  # four families of text

    named = replace(problem.profile, families=(*problem.profile.families[:-1], RETRIEVAL))
    assert predicted_loss(replace(problem, profile=named), plan) == pytest.approx((sum(texts) / 3 + questions) / 2)
