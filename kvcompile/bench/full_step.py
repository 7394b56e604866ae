"""A decode step of a model with the full cache: transformers' static cache, with its own attention or another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import heads_of
from kvcompile.bench.full_attention import Attend, CacheShape
from kvcompile.bench.timing import record
from kvcompile.runtime.parts import decoder_of, reuses

NAME = "kvcompile-bench"
"""Under which another attention is registered with transformers, which then makes no mask."""


@dataclass(frozen=True)
class Step:
    """One method's step: the bytes of its cache, and a call that reads the last token of every sequence and leaves the
    next. `recorded`: whether it is one CUDA graph (None: it will not be)."""

    cache_bytes: int
    run: Callable[[], Any]
    recorded: bool | None


def cache_shapes(model: Any, batch: int, context: int) -> dict[int, CacheShape]:
    """Of the model's full cache, by the numbers of the layers that have keys and values of their own."""
    every, query_heads = decoder_of(model).layers, model.config.get_text_config().num_attention_heads
    own = [n for n, layer in enumerate(every) if hasattr(layer, "self_attn") and not reuses(layer)]
    heads = {number: heads_of(model.config, number) for number in own}
    return {
        number: CacheShape(batch, count, context, size, query_heads // count, model.dtype, model.device)
        for number, (count, size) in heads.items()
    }


@contextmanager
def full_step(
    model: Any, batch: int, context: int, steps: int, way: Callable[[CacheShape], Attend] | None = None
) -> Iterator[Step]:
    """A step, at most `steps` times, with a full cache of random numbers: on a GPU transformers' static cache with the
    step recorded as a CUDA graph, on a CPU its dynamic one.

    With another `way` of attending, the static cache is attended to as a whole and without a mask. Its last `steps`
    slots are still to be written, so it reads what the full cache of `context` tokens has, and the text is another.
    """
    static = model.device.type == "cuda" or way is not None
    shapes = cache_shapes(model, batch, context)
    token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    first = context - steps - 3 if static else context  # three steps before the first that counts
    position = torch.full((batch, 1), first, dtype=torch.int64, device=model.device)
    previous = model.config._attn_implementation
    with torch.inference_mode():
        if way is not None:
            _register(way(next(iter(shapes.values()))))
            model.set_attn_implementation(NAME)
        try:
            cache = _filled_static(model, token, position, context) if static else _filled_dynamic(model, shapes)

            def step() -> None:
                logits = model(token, position_ids=position, past_key_values=cache).logits
                token.copy_(logits[:, -1].argmax(-1)[:, None])
                position.add_(1)

            on_gpu = model.device.type == "cuda"
            run = record([step]) if on_gpu else step
            yield Step(sum(shape.bytes for shape in shapes.values()), run, on_gpu or None)
        finally:
            model.set_attn_implementation(previous)


def _register(attend: Attend) -> None:
    from transformers import AttentionInterface

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        return attend(query, key, value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)


def _filled_static(model: Any, token: torch.Tensor, position: torch.Tensor, context: int) -> Any:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context)
    model(token, position_ids=position, past_key_values=cache)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue  # linear attention, or another layer's keys and values
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(int(position[0, 0]))
    return cache


def _filled_dynamic(model: Any, shapes: Mapping[int, CacheShape]) -> Any:
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    for number, shape in shapes.items():
        size = (shape.batch, shape.heads, shape.context, shape.head_dim)
        cache.update(torch.randn(size, dtype=model.dtype), torch.randn(size, dtype=model.dtype), number)
    return cache
