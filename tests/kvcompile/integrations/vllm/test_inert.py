"""The plugin installed and not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
OURS = "[name for name in sys.modules if name.startswith('kvcompile')]"


def run(code: str) -> list[str]:
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = eval(done.stdout.splitlines()[-1])
    return found


def test_nothing_of_ours_is_imported() -> None:
    code = f"import sys; from vllm.plugins import load_general_plugins; load_general_plugins(); print({OURS})"
    loaded = run(code)
    assert "kvcompile.integrations.vllm" in loaded
    assert not [
        name for name in loaded if name.startswith(("kvcompile.runtime", "kvcompile.kernels", "kvcompile.artif"))
    ]


def test_plain_vllm_has_its_own_layers(smollm2: Path) -> None:
    code = f"""
import os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
from vllm import LLM, SamplingParams
llm = LLM({str(smollm2)!r}, max_model_len=512, enforce_eager=True, dtype="float32")
llm.generate("A KV cache", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
print({OURS})
"""
    assert not [name for name in run(code) if name.startswith(("kvcompile.runtime", "kvcompile.kernels"))]
