"""vLLM with a compiled cache beside plain vLLM, with equal memory for the cache: requests at once, and tokens a second.

    python benchmarks/serve.py MODEL ARTIFACT --megabytes 100

64 requests of 1,500 tokens, 128 new ones each, all there from the beginning: more than either cache holds. Each engine
is a process of its own, one after the other, in an environment with vLLM. Prints a line of JSON for each, and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parents[1] / "examples" / "handbook.txt"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One engine's run of the workload."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {}
    if options.engine == "kvcompile":
        settings = {"load_format": "kvcompile", "model_loader_extra_config": {"artifact": options.artifact}}
    memory = options.megabytes * 10**6
    llm = LLM(
        options.model, max_model_len=options.context, enforce_eager=True, dtype=options.dtype, max_num_seqs=256,
        kv_cache_memory_bytes=memory, max_num_batched_tokens=options.chunk, enable_prefix_caching=False, **settings,
    )  # fmt: skip
    ids = AutoTokenizer.from_pretrained(options.model)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    ids = ids * (1 + (options.prompt + options.requests) // len(ids))
    prompts = [{"prompt_token_ids": ids[i : i + options.prompt]} for i in range(options.requests)]
    sampling = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    llm.generate([{"prompt_token_ids": ids[:64]}], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    for i, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(i), prompt, sampling)
    most, preempted, start = 0, 0, time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        most = max(most, len(scheduler.running))
        preempted = max([preempted, *(r.num_preemptions for r in scheduler.running)])
    seconds = time.perf_counter() - start
    return {
        "engine": options.engine, "memory": memory, "at_once": most, "most_preemptions": preempted,
        "seconds": round(seconds, 1), "new_tokens_a_second": round(options.requests * options.new / seconds, 1),
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a repository on the hub")
    parser.add_argument("artifact")
    parser.add_argument("--megabytes", type=int, default=100, help="of the cache, for either engine")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens that an engine's step has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", choices=["plain", "kvcompile"], help="measure this one alone, here")
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measured(options)), flush=True)
        return
    found = {}
    for engine in ("plain", "kvcompile"):
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[engine] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found[engine]), flush=True)
    plain, ours = found["plain"], found["kvcompile"]
    ratios = {key: round(ours[key] / plain[key], 2) for key in ("at_once", "new_tokens_a_second")}
    print(json.dumps({"ratios": ratios}))


if __name__ == "__main__":
    main()
