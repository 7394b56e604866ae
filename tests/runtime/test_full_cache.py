"""The loop over transformers' own cache."""

from __future__ import annotations

import torch
from tiny_models import CONFIGS, tiny_model
from transformers import DynamicCache

from kvcompile.runtime import generate_full

MODEL = tiny_model(CONFIGS["llama"])
PROMPT = torch.arange(3, 43)[None]


def test_it_answers_as_transformers_does() -> None:
    expected = MODEL.generate(PROMPT, max_new_tokens=12, do_sample=False)[:, PROMPT.shape[1] :]
    seen: list[int] = []
    new = generate_full(
        MODEL, DynamicCache(config=MODEL.config), PROMPT, max_new_tokens=12, on_token=lambda token: seen.extend(token)
    )
    assert new.tolist() == expected.tolist()
    assert seen == new[0].tolist()


@torch.inference_mode()
def test_it_goes_on_after_what_a_cache_holds() -> None:
    whole = generate_full(MODEL, DynamicCache(config=MODEL.config), PROMPT, max_new_tokens=8)
    cache = DynamicCache(config=MODEL.config)
    MODEL(PROMPT[:, :25], past_key_values=cache)
    assert generate_full(MODEL, cache, PROMPT[:, 25:], max_new_tokens=8).tolist() == whole.tolist()


def test_the_token_that_ends_an_answer_is_the_last() -> None:
    whole = generate_full(MODEL, DynamicCache(config=MODEL.config), PROMPT, max_new_tokens=8)[0].tolist()
    end = whole[3]
    new = generate_full(MODEL, DynamicCache(config=MODEL.config), PROMPT, max_new_tokens=8, eos={end})[0].tolist()
    assert new == whole[: whole.index(end) + 1]
