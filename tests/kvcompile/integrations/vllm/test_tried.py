"""Which families are served in vLLM: every one of ours has been tried there, or is refused by name."""

from __future__ import annotations

import pytest
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import CacheError
from kvcompile.integrations.vllm.refusals import UNTRIED, refuse_artifact

TRIED = {"gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"}
"""Those that the tests in vLLM's environment run."""


def test_every_family_is_tried_or_refused() -> None:
    assert {config.model_type for config in CONFIGS.values()} == TRIED | UNTRIED
    assert not TRIED & UNTRIED


@pytest.mark.parametrize("name", CONFIGS)
def test_those_that_were_not_tried_are_refused_by_name(name: str) -> None:
    artifact = make_artifact(tiny_model(CONFIGS[name]))
    if CONFIGS[name].model_type in TRIED:
        refuse_artifact(artifact, artifact.target.context)
        return
    with pytest.raises(CacheError, match=f"{CONFIGS[name].model_type} models have not been tried"):
        refuse_artifact(artifact, artifact.target.context)
