"""`ragged_decode` of a layer, against the bytes it reads and against attention over the full cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import ModelIdentity
from kvcompile.bench.flashinfer import ragged_calls
from kvcompile.bench.full_attention import CacheShape, ways
from kvcompile.bench.layers import ragged_layers
from kvcompile.bench.subjects import ragged_plan
from kvcompile.bench.timing import copy_bandwidth, medians, record, stores_for

SAME_TOKENS = "ragged int4, as many tokens"
OURS = {"ragged": ("16", False), "uniform": ("16", True), "ragged int8": ("8", False), "ragged int4": ("4", False),
        "ragged mixed": ("mixed", False), "ragged mix3/int3": ("mix3", False),
        "ragged mix2/int2": ("mix2", False), SAME_TOKENS: ("4", False)}  # fmt: skip
"""Our methods: what widths the heads have, and whether all have the same number of tokens. All have the same bytes, in
which 4 bits keep nearly every token of a quarter; with as many tokens as 16 bits, budgets are as ragged as those."""
FEWER = 4.25 / 16
"""Bytes of a token in 4 bits, codes and scales, to those in 16."""
RAGGED_FLASHINFER = "ragged: FlashInfer"


@dataclass(frozen=True)
class KernelRow:
    """One method: `bytes` of keys, values and scales that it has to read once, median `seconds`, what share of the copy
    bandwidth that is, and how many times as fast as the best method on the full cache it is. `tokens` are the smallest
    and the largest budget of a head. Where it failed, `error` says how, and the numbers are not a number."""

    method: str
    share: float
    bytes: int
    seconds: float
    of_copy: float
    speedup: float
    tokens: tuple[int, int]
    error: str = ""


@dataclass(frozen=True)
class _Subject:
    calls: Sequence[Callable[[], Any]]
    bytes: int
    tokens: tuple[int, int]


@torch.inference_mode()
def measure_kernels(
    model: ModelIdentity, context: int, batch: int, share: float, dtype: str, device: torch.device, rounds: int,
    full: Collection[str] | None = None, ours: Collection[str] = (*OURS, RAGGED_FLASHINFER),
) -> list[KernelRow]:  # fmt: skip
    """Layers of random ragged plans at `share` of the full cache, and full ones, with one token a sequence; by default
    with all methods that the machine has."""
    torch.manual_seed(0)
    heads, group = model.num_kv_heads, model.num_attention_heads // model.num_kv_heads
    kind = getattr(torch, dtype)
    query = torch.randn(batch, heads * group, 1, model.head_dim, dtype=kind, device=device)
    shape = CacheShape(batch, heads, context, model.head_dim, group, kind, device)
    makers = _full(shape, query, full) | _ours(model, context, batch, share, dtype, query, ours)
    subjects: dict[str, _Subject] = {}
    errors: dict[str, str] = {}
    for name, make in makers.items():
        try:
            made = make()
            if made is not None:
                _try(made, device)
                subjects[name] = made
        except Exception as error:  # what one method cannot do is no reason not to measure the others
            errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            gc.collect()
    seconds = medians({name: one.calls for name, one in subjects.items()}, device, rounds)
    copy = copy_bandwidth(device)
    best = min((taken for name, taken in seconds.items() if name.startswith("full")), default=float("nan"))
    found = [
        KernelRow(name, one.bytes / shape.bytes, one.bytes, seconds[name], one.bytes / seconds[name] / copy,
                  best / seconds[name], one.tokens)
        for name, one in subjects.items()
    ]  # fmt: skip
    none = float("nan")
    return found + [KernelRow(name, none, 0, none, none, none, (0, 0), error) for name, error in errors.items()]


@torch.inference_mode()
def measure_groups(
    models: Sequence[ModelIdentity], context: int, batch: int, share: float, dtype: str, bits: str,
    device: torch.device, rounds: int,
) -> dict[int, float]:  # fmt: skip
    """Median seconds of a layer by the size of the group, for models that differ in nothing else: the same stores."""
    layers = ragged_layers(ragged_plan(models[0], context, batch, share, dtype, bits), device)
    calls = {}
    for model in models:
        shape = (batch, model.num_attention_heads, 1, model.head_dim)
        query = torch.randn(shape, dtype=getattr(torch, dtype), device=device)
        calls[str(model.num_attention_heads // model.num_kv_heads)] = layers.calls(query)
    return {int(group): taken for group, taken in medians(calls, device, rounds).items()}


def _full(
    shape: CacheShape, query: torch.Tensor, wanted: Collection[str] | None
) -> dict[str, Callable[[], _Subject | None]]:
    size = (shape.batch, shape.heads, shape.context, shape.head_dim)
    held = [
        [torch.randn(size, dtype=shape.dtype, device=shape.device) for _ in range(2)]
        for _ in range(stores_for(shape.bytes, shape.device) if wanted is None or wanted else 0)
    ]

    def subject(way: Callable[[CacheShape], Any]) -> Callable[[], _Subject]:
        def make() -> _Subject:
            attend = way(shape)
            calls = [lambda keys=keys, values=values: attend(query, keys, values) for keys, values in held]
            return _Subject(calls, shape.bytes, (shape.context, shape.context))

        return make

    every = ways(shape.device)
    return {f"full: {name}": subject(way) for name, way in every.items() if wanted is None or name in wanted}


def _ours(
    model: ModelIdentity, context: int, batch: int, share: float, dtype: str, query: torch.Tensor,
    wanted: Collection[str],
) -> dict[str, Callable[[], _Subject | None]]:  # fmt: skip
    def subject(bits: str, uniform: bool, own: float) -> Callable[[], _Subject]:
        def make() -> _Subject:
            plan = ragged_plan(model, context, batch, own, dtype, bits, uniform=uniform)
            layers = ragged_layers(plan, query.device)
            return _Subject(layers.calls(query), layers.bytes, layers.tokens)

        return make

    def others() -> _Subject | None:
        plan = ragged_plan(model, context, batch, share, dtype, "16")
        if query.device.type != "cuda" or (found := ragged_calls(plan, query)) is None:
            return None
        tokens = plan.budgets.capacity[model.num_layers // 2].tolist()
        return _Subject(*found, (min(tokens), max(tokens)))

    makers: dict[str, Callable[[], _Subject | None]] = {
        name: subject(*kind, share * (FEWER if name == SAME_TOKENS else 1))
        for name, kind in OURS.items()
        if name in wanted
    }
    return makers | ({RAGGED_FLASHINFER: others} if RAGGED_FLASHINFER in wanted else {})


def _try(subject: _Subject, device: torch.device) -> None:
    """Fail here if at all, also where a recording would."""
    if device.type == "cuda":
        record(subject.calls[:1])
        torch.cuda.synchronize()
    else:
        subject.calls[0]()
