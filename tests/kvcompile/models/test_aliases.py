"""Aliases: well formed, found in any case, suggested when misspelt."""

from __future__ import annotations

import re

import pytest

from kvcompile.models.aliases import ALIASES, closest, hub_id


@pytest.mark.parametrize(
    "alias",
    [
        "qwen2.5-7b",
        "qwen2.5-0.5b",
        "qwen3-8b",
        "llama-3-8b",
        "llama-3.1-8b",
        "mistral-7b",
        "smollm2-135m",
        "gemma-2-9b",
        "gemma-3-4b",
        "gemma-4-31b",
        "gpt-oss-20b",
        "granite-3.3-8b",
        "olmo-2-7b",
        "qwen3-next-80b-a3b",
        "qwen3.5-4b",
        "smollm3-3b",
    ],
)
def test_the_promised_aliases_are_there(alias: str) -> None:
    assert hub_id(alias) is not None
    assert hub_id(alias.upper()) == hub_id(alias)


def test_every_alias_leads_to_a_hub_id_of_its_size() -> None:
    for alias, repo_id in ALIASES.items():
        assert alias == alias.lower()
        assert re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9.-]+", repo_id)
        size = re.search(r"-(\d+x)?[\d.]+[bm]\b", alias)
        assert size is None or size[0] in repo_id.lower()
    assert len(set(ALIASES.values())) == len(ALIASES)


def test_a_misspelt_alias_is_recognised() -> None:
    assert closest("qwen2.5_7b") == "qwen2.5-7b"
    assert closest("SmolLM-135m") == "smollm2-135m"
    assert closest("zzz") is None
    assert hub_id("zzz") is None
