"""A decode step of exported models in ONNX Runtime, beside the same model exported with its full cache.

python benchmarks/onnx_decode.py ARTIFACT [--context 4096] [--threads 2]

ARTIFACT is a file with curves (any that `kvcompile build` wrote), from which plans are solved for a full float32 cache
and for a quarter of the bytes in several types. Steps of all models take turns, so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import tempfile
import time
from pathlib import Path
from runpy import run_path

import numpy as np
import torch

from kvcompile.artifacts import read
from kvcompile.compiler import resolve
from kvcompile.export.onnx import export
from kvcompile.models import load

ROUNDS, STEPS = 8, 8
PLANS = {
    "full cache, float32": ("100%", "fp32"),
    "25 %, float32": ("25%", "fp32"),
    "25 %, float16": ("25%", "fp16"),
    "25 %, bfloat16": ("25%", "bf16"),
    "25 %, 8 bits": ("25%", "int8"),
    "25 %, 8 and 4 bits": ("25%", "auto"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    given = read(args.artifact)
    loaded = load(given.model.name, dtype=torch.float32, device="cpu")
    example = run_path(str(Path(__file__).parent.parent / "examples" / "onnx_generate.py"))
    ids = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, args.context).tolist()
    filled = args.context - (ROUNDS + 1) * STEPS
    times: dict[str, list[float]] = {name: [] for name in PLANS}
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name, (mem, kv_dtype) in PLANS.items():
            plan = resolve(given, mem=mem, context=args.context, batch=1, kv_dtype=kv_dtype)
            export(plan, loaded.model, loaded.tokenizer, Path(folder) / name)
            models[name] = example["Model"](Path(folder) / name, args.threads)
            for first in range(0, filled, 1024):
                models[name](ids[first : min(first + 1024, filled)])
        for round_ in range(ROUNDS + 1):
            for name, model in models.items():
                start = time.perf_counter()
                for token in ids[filled + round_ * STEPS :][:STEPS]:
                    model([token])
                if round_:  # the first warms up
                    times[name].append((time.perf_counter() - start) / STEPS * 1000)

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxruntime"))
    print(f"{given.model.name}, {args.context} tokens, {args.threads} CPU threads, Python {platform.python_version()}, "
          f"{versions}, {datetime.date.today()}\n")  # fmt: skip
    print("| cache | MB | ms a token | least | times the full cache |\n|---|---|---|---|---|")
    full = np.array(times["full cache, float32"])
    for name, found in times.items():
        ratio = statistics.median(full / np.array(found))
        print(f"| {name} | {models[name].cache_bytes / 1e6:.1f} | {statistics.median(found):.1f} | {min(found):.1f} | "
              f"{ratio:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
