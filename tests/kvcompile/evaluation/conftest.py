"""Codecs that are only measured are known while these tests run, and not in those after them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcompile.evaluation.codecs import register_codecs
from kvcompile.kernels.codecs import CODECS


@pytest.fixture(autouse=True, scope="package")
def others_codecs() -> Iterator[None]:
    register_codecs()
    yield
    for id in [id for id, codec in CODECS.items() if not codec.format_version]:
        del CODECS[id]
