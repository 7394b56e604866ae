"""Everything that needs a GPU, in one run and as one table beside what is asked for: `make gpu-check`.

    python benchmarks/gpu_check.py [--context 32768] [--batch 16] [--out results.json]

Tests of the kernels and the decode loop, memcheck where compute-sanitizer is installed, attention of one layer for
Qwen2.5-7B's shape and other group sizes, and decoding end to end with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvcompile.artifacts import ModelIdentity, identify
from kvcompile.bench.decode import measure_decode
from kvcompile.bench.kernels import measure_kernels
from kvcompile.bench.subjects import ragged_plan, random_model

SHARE = 0.25
TESTS = ["tests/kernels", "tests/runtime/test_decode.py"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a GPU")
    checks = Checks()
    run_tests(checks)
    device = torch.device("cuda")
    model = random_model("qwen2.5-7b", torch.bfloat16, device)
    identity = identify(model, "qwen2.5-7b")
    found = {"kernels": kernels(checks, identity, args), "decode": decode(checks, model, identity, args)}
    setting = {
        "gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "context": args.context,
        "batch": args.batch, "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")},
    }  # fmt: skip
    args.out.write_text(json.dumps({"setting": setting, "checks": checks.rows, **found}, indent=1) + "\n")
    console = Console(width=120)
    console.print(", ".join(f"{name} {value}" for name, value in setting.items()))
    table = Table("check", "measured", "asked for", "")
    for row in checks.rows:
        table.add_row(row["check"], row["measured"], row["asked"], "met" if row["met"] else "NOT MET")
    console.print(table)
    sys.exit(not all(row["met"] for row in checks.rows))


class Checks:
    """Lines of the table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, check: str, measured: str, asked: str, met: bool) -> None:
        self.rows.append({"check": check, "measured": measured, "asked": asked, "met": met})
        print(f"{check}: {measured} (asked for: {asked})", flush=True)


def run_tests(checks: Checks) -> None:
    command = [sys.executable, "-m", "pytest", "-q", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    checks.add(
        "tests on the GPU", (done.stdout.strip().splitlines() or ["nothing"])[-1], "all pass", not done.returncode
    )
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:])
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        checks.add("memcheck", "compute-sanitizer is not installed", "clean", False)
        return
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *command, "-k", "not spills"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    checks.add("memcheck", (done.stdout.strip().splitlines() or ["nothing"])[-1], "clean", not done.returncode)


def kernels(checks: Checks, identity: ModelIdentity, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seconds: dict[int, float] = {}
    for group in (7, 5, 8, 4, 1):
        shape = dataclasses.replace(identity, num_attention_heads=group * identity.num_kv_heads)
        rows = measure_kernels(shape, args.context, args.batch, SHARE, "bfloat16", torch.device("cuda"), 21)
        found[f"group {group}"] = [dataclasses.asdict(row) for row in rows]
        named = {row.method: row for row in rows}
        ragged, uniform = named["ragged"], named["uniform"]
        seconds[group] = ragged.seconds
        if group != 7:
            continue
        for name, least in (("ragged", 0.9), ("ragged int8", 0.8), ("ragged int4", 0.7)):
            asked = f"{least:.0%}" if name != "ragged int8" else "-"
            checks.add(f"{name}, of copy bandwidth", f"{named[name].of_copy:.1%}", asked, named[name].of_copy >= least)
        least = 0.9 / ragged.share
        checks.add("ragged, times the best full", f"{ragged.speedup:.2f}", f"{least:.2f}", ragged.speedup >= least)
        ratio = (ragged.seconds / ragged.bytes) / (uniform.seconds / uniform.bytes)
        checks.add("ragged, time a byte of uniform", f"{ratio:.3f}", "1.1", ratio <= 1.1)
    for group in (5, 7):
        ratio = seconds[group] / seconds[8]
        checks.add(f"group {group}, time of group 8", f"{ratio:.3f}", "1.05", ratio <= 1.05)
    return found


def decode(checks: Checks, model: Any, identity: ModelIdentity, args: argparse.Namespace) -> list[dict[str, Any]]:
    plan = ragged_plan(identity, args.context, args.batch, SHARE, "bfloat16", "16")
    full, ours = measure_decode(model, plan, args.batch, args.context, 64)
    ratio = ours.tokens_per_second / full.tokens_per_second
    checks.add("tokens a second, times transformers' static cache", f"{ratio:.2f}", "1.8", ratio >= 1.8)
    checks.add("weights and cache, of copy bandwidth", f"{ours.of_copy:.1%}", "75%", ours.of_copy >= 0.75)
    checks.add("host waits inside a step", str(ours.host_syncs), "0", ours.host_syncs == 0)
    return [dataclasses.asdict(row) for row in (full, ours)]


if __name__ == "__main__":
    main()
