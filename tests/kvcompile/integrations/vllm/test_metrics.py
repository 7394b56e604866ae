"""Gauges beside vLLM's own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from kvcompile.artifacts import read
from kvcompile.integrations.vllm import metrics
from kvcompile.integrations.vllm.figures import page_bytes
from kvcompile.integrations.vllm.metrics import GAUGES, Metrics

ROOT = Path(__file__).parents[4]
REFERENCE = ROOT / "artifacts" / "reference" / "smollm2-135m-4096-25pct.kvb"


def config(load_format: str = "kvcompile", artifact: str = str(REFERENCE), blocks: int | None = 22, ranks: int = 1):
    return SimpleNamespace(
        load_config=SimpleNamespace(load_format=load_format, model_loader_extra_config={"artifact": artifact}),
        cache_config=SimpleNamespace(num_gpu_blocks=blocks),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(served_model_name="model", max_model_len=4096),
    )


def values(engine: int = 0) -> dict[str, Any]:
    labels = {"model_name": "model", "engine": str(engine)}
    return {name: REGISTRY.get_sample_value(name, labels) for name in GAUGES}


def test_it_is_what_vllm_takes_for_a_logger_of_all_engines() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(name, value)] = project["entry-points"]["vllm.stat_logger_plugins"].items()
    assert EntryPoint(name, value, "vllm.stat_logger_plugins").load() is Metrics
    assert issubclass(Metrics, AggregateStatLoggerBase)
    Metrics(vllm_config=config(), engine_indexes=[0]).record(None, None, mm_cache_stats=None, engine_idx=0)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_nothing_of_ours_is_imported_or_set_for_other_load_formats(load_format: str) -> None:
    code = (
        "import sys; from types import SimpleNamespace as N\n"
        "from kvcompile.integrations.vllm.metrics import Metrics\n"
        f"Metrics(N(load_config=N(load_format={load_format!r})), [0]).log_engine_initialized()\n"
        "ours = sorted(name for name in sys.modules if name.startswith('kvcompile'))\n"
        "allowed = ['kvcompile'] + ['kvcompile.integrations' + rest for rest in ('', '.vllm', '.vllm.metrics')]\n"
        "assert ours == allowed, ours\n"
        "from prometheus_client import REGISTRY, generate_latest\n"
        "assert b'kvcompile' not in generate_latest(REGISTRY)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gauges() -> None:
    artifact = read(REFERENCE)
    for _ in range(2):  # a second engine in one process
        Metrics(config(), [0]).log_engine_initialized()
    assert values() == {
        "kvcompile_bytes_per_sequence": artifact.bytes.resident,
        "kvcompile_page_bytes": page_bytes(artifact),
        "kvcompile_full_cache_share": 0.25,
        "kvcompile_sequences": 21,
    }


def test_engines_share_the_blocks() -> None:
    Metrics(config(blocks=40, ranks=3), [2, 3]).log_engine_initialized()
    assert values(2) == values(3)
    assert values(2)["kvcompile_sequences"] == 19
    assert values(2)["kvcompile_page_bytes"] == page_bytes(read(REFERENCE), 3)


def test_an_artifact_out_of_reach_costs_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(metrics.log, "warning", lambda text, *values: said.append(text % values))
    Metrics(config(artifact="/nowhere/x.kvb"), [7]).log_engine_initialized()
    assert set(values(7).values()) == {None}
    assert "the API server cannot read it: " in said[0]
