"""A profile of a model that is read from its checkpoint is that of the model held whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import saved, streamed, whole
from profiles import assert_same, material

from kvcompile.models.room import Room
from kvcompile.profile import measure, perplexity, read_rotary

Tiny = Callable[..., Any]


@pytest.mark.parametrize("tied", [False, True])
def test_every_family(tiny: Tiny, family: str, tied: bool, tmp_path: Path) -> None:
    folder = saved(tiny(family, tie_word_embeddings=tied), tmp_path)
    assert_same(measure(streamed(folder), material(), seed=0), measure(whole(folder), material(), seed=0))


def test_sixteen_bits(tiny: Tiny, tmp_path: Path) -> None:
    folder = saved(tiny().to(torch.bfloat16), tmp_path)
    assert_same(measure(streamed(folder), material(), seed=0), measure(whole(folder), material(), seed=0))


@pytest.mark.parametrize("episodes", [1, 3])
@pytest.mark.parametrize("family_", ["llama", "qwen3_moe"])
def test_each_weight_is_read_at_most_four_times_whatever_the_number_of_episodes(
    tiny: Tiny, family_: str, episodes: int, tmp_path: Path, reads: Counter[str]
) -> None:
    model = streamed(saved(tiny(family_), tmp_path))
    found = material()
    found = replace(found, fit=found.fit * episodes, measure=found.measure * episodes)
    measure(model, found, seed=0, room=Room(0, 0))
    # Once for the rotary embedding, twice up and once down, and the first layer stays where it turns up again.
    for number, expected in enumerate([3, 4, 4]):
        assert {count for key, count in reads.items() if f".layers.{number}." in key} == {expected}
    assert {reads[key] for key in ("model.embed_tokens.weight", "lm_head.weight")} == {2}


def test_layers_that_are_attended_to_later_are_read_once_more(tiny: Tiny, tmp_path: Path, reads: Counter[str]) -> None:
    """At most six times all the same; and of a table of inputs by token no more than the rows that are wanted."""
    measure(streamed(saved(tiny("gemma4_text, shared"), tmp_path)), material(), seed=0, room=Room(0, 0))
    for number, expected in enumerate([4, 5, 4, 4, 4, 4]):
        assert {count for key, count in reads.items() if f".layers.{number}." in key} == {expected}
    assert not any("embed_tokens_per_layer" in key for key in reads)


def test_a_plan_and_a_perplexity_are_one_reading_each(tiny: Tiny, tmp_path: Path, reads: Counter[str]) -> None:
    folder = saved(tiny("qwen2"), tmp_path)
    model, there = streamed(folder), whole(folder)
    windows = [episode.context for episode in material().measure]
    budgets = np.full((3, 2), 12, np.int32)
    reads.clear()
    assert perplexity(model, windows, budgets, 4) == perplexity(there, windows, budgets, 4)
    assert set(reads.values()) == {1}


def test_rotary_embedding(tiny: Tiny, family: str, tmp_path: Path) -> None:
    folder = saved(tiny(family), tmp_path)
    one, other = read_rotary(streamed(folder), 100), read_rotary(whole(folder), 100)
    assert np.array_equal(one.frequency, other.frequency)
    assert np.array_equal(one.partner, other.partner)
