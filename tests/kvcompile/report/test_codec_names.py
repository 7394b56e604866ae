"""Codecs are shown by what people know them by: bits, or a name where the id in the file is neither."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from kvcompile.artifacts import Artifact, read
from kvcompile.cli.tables import budgets
from kvcompile.compiler import resolve
from kvcompile.kernels.codecs import label
from kvcompile.report import page, report_data

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"


def shown(plan: Artifact) -> str:
    text = StringIO()
    Console(file=text, width=200).print(budgets(plan))
    return text.getvalue()


def test_a_codec_whose_id_is_not_its_bits_is_shown_by_name() -> None:
    assert [label(bits) for bits in (4, 8, 16, 136)] == ["4", "8", "16", "fp8"]
    artifact = read(REFERENCE)
    plan = resolve(artifact, mem="40%", kv_dtype="fp8")
    assert "fp8/fp8" in shown(plan)
    assert "136" not in shown(plan)
    assert "8/8" in shown(resolve(artifact, mem="40%", kv_dtype="int8"))


def test_the_page_knows_the_name_and_the_bits() -> None:
    data = report_data(resolve(read(REFERENCE), mem="40%", kv_dtype="fp8"))
    json.dumps(data, allow_nan=False)
    assert data["codecs"]["136"] == {"name": "fp8", "bits": 8}
    assert "8" not in data["codecs"]
    assert "</html>" in page(data)
