"""What the benchmarks of single operations share: one layer of Qwen2.5-7B's shape with ragged budgets, and a table."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import Artifact, ModelIdentity, identify
from kvcompile.bench.subjects import CONFIGS, ragged_plan
from kvcompile.bench.timing import copy_bandwidth, medians
from kvcompile.kernels import Buffers, LayerLayout
from kvcompile.runtime.layouts import layer_layouts

ROUNDS = 21


@dataclass(frozen=True)
class Layer:
    """A layer whose store is full: `context` tokens a sequence, a quarter of the full cache's bytes."""

    model: ModelIdentity
    plan: Artifact
    layout: LayerLayout
    keys: Buffers
    values: Buffers
    context: int
    batch: int
    device: torch.device

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)

    @property
    def seen(self) -> torch.Tensor:
        return torch.full((self.batch,), self.context, dtype=torch.int32, device=self.device)

    @property
    def stored_bytes(self) -> int:
        """Of keys, values and scales."""
        return sum(t.numel() * t.element_size() for side in (self.keys, self.values) for t in side.tensors())


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--group", type=int, default=7, help="query heads a KV head")
    return parser


def layer(args: argparse.Namespace, bits: str) -> Layer:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = CONFIGS["qwen2.5-7b"]
    heads, head_dim = shape["num_key_value_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    changed = {"num_hidden_layers": 1, "num_attention_heads": args.group * heads, "head_dim": head_dim}
    config = AutoConfig.for_model(**shape | changed | {"vocab_size": 97, "intermediate_size": 64})
    model = identify(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), "one layer of qwen2.5-7b")
    plan = ragged_plan(model, args.context, args.batch, 0.25, "bfloat16", bits)
    layout = layer_layouts(plan)[0]
    keys, values = (
        Buffers(layout, [getattr(c, name) for c in layout.classes], head_dim, torch.bfloat16, device, args.batch)
        for name in ("k_bits", "v_bits")
    )
    return Layer(model, plan, layout, keys, values, args.context, args.batch, device)


def report(
    name: str,
    args: argparse.Namespace,
    calls: Mapping[str, Callable[[], Any]],
    moved: Mapping[str, float],
    *,
    recorded: bool = True,
) -> None:
    """Time the calls in turn, on a GPU `recorded` as CUDA graphs, and print a table in Markdown with what a reader
    has to know to compare it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        seconds = medians(calls, device, ROUNDS, recorded=recorded)
        bandwidth = copy_bandwidth(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "triton"))
    print(
        f"{name}, {args.batch} x {args.context} tokens at 25 %, groups of {args.group}, {where}, Python "
        f"{platform.python_version()}, {versions}, {datetime.date.today().isoformat()}\n\n"
        "| | us | MB | of copy bandwidth |\n|---|---|---|---|"
    )
    for case, taken in seconds.items():
        share = moved[case] / taken / bandwidth
        print(f"| {case} | {taken * 1e6:.1f} | {moved[case] / 1e6:.2f} | {share:.1%} |")
