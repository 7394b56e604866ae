"""What cannot be served is refused in one sentence, before weights are read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import write

pytest.importorskip("vllm")
import vllm_engines
from vllm_engines import EXACT, engine, solved


def sentence(model: Path, artifact: Path, **settings: Any) -> str:
    from kvcompile.artifacts import KvcompileError

    with pytest.raises(KvcompileError) as caught, engine(model, artifact, **settings):
        pass
    found = str(caught.value)
    assert "\n" not in found
    return found


def test_another_models_artifact(smollm2: Path, tmp_path: Path) -> None:
    write(make_artifact(tiny_model(CONFIGS["llama"]), context=2048), tmp_path / "tiny.kvb")
    assert "the artifact is for" in sentence(smollm2, tmp_path / "tiny.kvb")


def test_other_weights(smollm2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in smollm2.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    weights = load_file(smollm2 / "model.safetensors")
    weights["model.layers.7.mlp.up_proj.weight"] *= 1.01
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "weights are not those the artifact is for" in sentence(tmp_path, EXACT)
    with engine(tmp_path, EXACT, extra={"fingerprint": "ignore"}):
        pass


def test_a_context_above_the_artifacts(smollm2: Path) -> None:
    assert "--max-model-len 4096 or less" in sentence(smollm2, EXACT, max_model_len=8192)


def test_a_step_with_too_few_tokens(smollm2: Path) -> None:
    """Without chunks; vLLM itself has a word on that."""
    with (
        pytest.raises(Exception, match="max_num_batched_tokens"),
        engine(smollm2, EXACT, enable_chunked_prefill=False, max_num_batched_tokens=512),
    ):
        pass


def test_speculative_decoding(smollm2: Path) -> None:
    """In a process of its own: n-grams load numba, whose library the next engine of a process trips over."""
    code = f"""
from vllm_engines import EXACT, engine
speculative = {{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
with engine({str(smollm2)!r}, EXACT, speculative_config=speculative):
    pass
"""
    environment = os.environ | {"PYTHONPATH": str(Path(vllm_engines.__file__).parent)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert "CacheError: speculative decoding cannot work" in done.stderr.splitlines()[-1]


def test_a_policy_that_observes(smollm2: Path, tmp_path: Path) -> None:
    h2o = solved(EXACT, tmp_path / "h2o.kvb", "--mem", "25%", "--allocator", "uniform", "--policy", "h2o")
    assert "the token policy h2o cannot be served" in sentence(smollm2, h2o)


def test_a_damaged_file(smollm2: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.kvb"
    damaged.write_bytes(EXACT.read_bytes()[:-1000])
    assert str(damaged) in sentence(smollm2, damaged)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"), ({"enable_lora": True}, "LoRA"),
        ({"extra": {"staged": 0}}, '"staged"'), ({"extra": {"fingerprint": "maybe"}}, '"fingerprint"'),
    ],
)  # fmt: skip
def test_settings(smollm2: Path, settings: dict[str, Any], word: str) -> None:
    assert word in sentence(smollm2, EXACT, **settings)
