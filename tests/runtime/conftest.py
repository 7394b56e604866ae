"""Tiny random models of every supported family, and artifacts for them with budgets of a test's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
from tiny_models import CONFIGS, SHAPE, tiny_model
from transformers import LlamaConfig, PreTrainedModel

from kvcompile.artifacts import Artifact


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A fresh tiny model of each family, in float32."""
    return tiny_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model(CONFIGS["llama"])


@pytest.fixture
def one_layer() -> PreTrainedModel:
    return tiny_model(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))


@pytest.fixture
def gemma3() -> PreTrainedModel:
    return tiny_model(CONFIGS["gemma3"])


@pytest.fixture(scope="session")
def make_artifact() -> Callable[..., Artifact]:
    def make(model: PreTrainedModel, *args: Any, **options: Any) -> Artifact:
        if options.get("policy") == "h2o" and model.config.model_type in tiny_models.WITHOUT_H2O:
            pytest.skip("h2o is refused for this family")
        return tiny_models.make_artifact(model, *args, **options)

    return make
