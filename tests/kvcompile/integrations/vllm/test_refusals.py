"""What cannot be served is refused in one sentence, before weights are read."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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


def settings(**changed: Any) -> Any:
    """A stand-in for vLLM's settings, as they are by default."""
    known = {
        "pipeline_parallel_size": 1, "data_parallel_size": 1, "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1, "cache_dtype": "auto", "dtype": torch.bfloat16, "max_model_len": 8192,
        "max_num_batched_tokens": 2048, "max_num_seqs": 256, "enable_chunked_prefill": True,
        "long_prefill_token_threshold": 0,
    }  # fmt: skip
    every = SimpleNamespace(**(known | changed))
    parts = ("parallel_config", "scheduler_config", "cache_config", "model_config")
    return SimpleNamespace(speculative_config=None, lora_config=None, **dict.fromkeys(parts, every))


def test_several_prompts_in_chunks_at_once() -> None:
    from kvcompile.artifacts import CacheError
    from kvcompile.integrations.vllm.refusals import refuse_settings

    several = settings(long_prefill_token_threshold=512)
    with pytest.raises(CacheError, match="up to 4 prompts are read in chunks at once"):
        refuse_settings(several, 3)
    refuse_settings(several, 4)
    refuse_settings(settings(), 1)


def test_the_dtype_of_the_cache() -> None:
    from kvcompile.artifacts import CacheError
    from kvcompile.integrations.vllm.refusals import refuse_settings

    refuse_settings(settings(cache_dtype="bfloat16"), 1)
    with pytest.raises(CacheError, match="give --kv-cache-dtype bfloat16 in place of fp8_e4m3"):
        refuse_settings(settings(cache_dtype="fp8_e4m3"), 1)


@pytest.mark.parametrize(
    ("mode", "given", "fits"), [("NONE", None, True), ("FULL", 10**9, True), ("FULL", None, False)]
)
def test_pages_for_trying_graphs_out(mode: str, given: int | None, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 pages, of which one has no room."""
    from vllm.config import CUDAGraphMode

    from kvcompile.artifacts import CacheError
    from kvcompile.integrations.vllm.adopt import Serving

    config: Any = settings(kv_cache_memory_bytes=given)
    config.compilation_config = SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode], max_cudagraph_capture_size=512)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (255_999, 10**9))
    serving = Serving(Any, Any, config, [])
    expected = nullcontext() if fits else pytest.raises(CacheError, match="or --max-num-seqs 255 or less")
    with expected:
        serving._check_trial(1000, torch.device("cuda"))


@pytest.mark.parametrize(("head_size", "codec", "recorded"), [(64, 32, True), (512, 32, False), (64, "fp8", False)])
def test_steps_that_wait_for_a_gpu_are_not_recorded(
    head_size: int, codec: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    from kvcompile.integrations.vllm import backend
    from kvcompile.kernels import HeadSpec, LayerLayout
    from kvcompile.kernels.codecs import names

    bits = names().get(codec, codec)
    layout = LayerLayout.from_heads([HeadSpec("recent", 8, 4, 4, bits, bits)])
    layer = SimpleNamespace(
        _k_scale=SimpleNamespace(is_cuda=True), head_size=head_size, index=0,
        served=SimpleNamespace(page=SimpleNamespace(layers=[layout])),
    )  # fmt: skip
    monkeypatch.setattr(backend, "layers_of", lambda context: [layer])
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    found = backend.Builder.get_cudagraph_support(config, None)
    assert (found != AttentionCGSupport.NEVER) == recorded
