"""How long Triton compiles before the first step of a plan on a GPU; none is needed.

    python benchmarks/first_compile.py ARTIFACT [--threads 1 2 4] [--batch 1]

loads the artifact's model on the CPU and has the kernels that its steps and cuts launch compiled for sm_90, once for
every number of threads, each in a process with an empty cache of Triton's. Triton is told that there is a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch


class StandIn:
    """What Triton asks a driver when it compiles."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def compiled(path: str, threads: int, batch: int) -> None:
    """Compile, and print the seconds and the kernels."""
    from triton.runtime import driver

    from kvcompile.artifacts import read
    from kvcompile.kernels import compiling
    from kvcompile.kernels.compact.triton import _compact
    from kvcompile.kernels.new_token.triton import _new_token
    from kvcompile.kernels.ragged_decode.triton import _decode
    from kvcompile.models import load
    from kvcompile.runtime import attach
    from kvcompile.runtime.compiled import compile_cuts
    from kvcompile.runtime.fused import FusedStep

    driver.set_active(StandIn())
    compiling.THREADS = threads
    artifact = read(path)
    model = load(artifact.model.name, device="cpu").model
    with torch.inference_mode(), attach(model, artifact) as kv:
        cache, step = kv.new_cache(batch), FusedStep(model)
        start = time.monotonic()
        compile_cuts(cache, model.dtype)
        cut = time.monotonic()
        step.compile(cache)
        end = time.monotonic()
    counts = [len(kernel.device_caches[0][0]) for kernel in (_compact, _decode, _new_token)]
    print(f"{threads:7} {cut - start:8.1f} {end - cut:8.1f} {counts[0]:8} {counts[1]:14} {counts[2]:10}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        compiled(given.artifact, given.threads[0], given.batch)
        sys.exit()
    print("threads  cuts, s  step, s  compact  ragged_decode  new_token", flush=True)
    for number in given.threads:
        with tempfile.TemporaryDirectory() as folder:
            own = {"TRITON_CACHE_DIR": folder, "KVCOMPILE_KERNELS": "triton", "TRITON_INTERPRET": "0"}
            command = [sys.executable, __file__, given.artifact, "--here", "--threads", str(number)]
            subprocess.run([*command, "--batch", str(given.batch)], check=True, env=os.environ | own)
