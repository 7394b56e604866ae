"""vLLM engines for tests, one at a time in the test's own process."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXACT, ROUNDED = (
    ROOT / "artifacts" / "reference" / f"smollm2-135m-{name}.kvb" for name in ("4096-25pct", "2048-12.5pct")
)
"""SmolLM2 with heads in bfloat16, and with scored heads of 4 and 8 bits."""

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
if importlib.util.find_spec("vllm"):  # elsewhere, other tests of the same process want the hub
    os.environ.update(SETTINGS | os.environ)


@contextmanager
def engine(model: Path, artifact: Path | None, **settings: Any) -> Iterator[Any]:
    """`vllm.LLM` with this artifact, or plain; gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    extra = settings.pop("extra", {})
    if artifact is not None:
        settings |= {"load_format": "kvcompile", "model_loader_extra_config": {"artifact": str(artifact), **extra}}
    llm = LLM(str(model), **{"max_model_len": 2048, "enforce_eager": True, "dtype": "float32", **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm: Any, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[list[int]]:
    """Tokens that an engine answers with, all prompts at once."""
    return [list(answer.token_ids) for answer in _answers(llm, prompts, count, **options)]


def weighed(llm: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[dict[int, float]]]:
    """Log-probabilities of the 20 likeliest tokens at each step of greedy answers, likeliest first."""
    return [
        [{token: found.logprob for token, found in step.items()} for step in answer.logprobs]
        for answer in _answers(llm, prompts, count, logprobs=20)
    ]


def worse(answer: Sequence[int], steps: Sequence[dict[int, float]]) -> float:
    """By how many nats the first token of `answer` that is not the likeliest is less likely; 0 where all are."""
    for token, step in zip(answer, steps, strict=True):
        best = max(step, key=lambda other: step[other])
        if token != best:
            return step[best] - step.get(token, -float("inf"))
    return 0.0


def _answers(llm: Any, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def solved(source: Path, out: Path, *arguments: str) -> Path:
    """An artifact solved anew; in a process of its own, as vLLM trips over scipy where that has been imported."""
    command = [sys.executable, "-P", "-m", "kvcompile", "build", "--from", str(source), "-o", str(out), *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return out
