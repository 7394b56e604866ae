"""Reading long prompts layer by layer, and each layer in chunks, so that little grows with them.

The hidden states of the whole prompt are kept, and overwritten in place, layer after layer; of keys and values those of
one layer are there at a time, as it is cut to its budget before the next one reads. Attention within the prompt is
exact, so chunks of any length give what the whole prompt gives, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvcompile.artifacts import PREFILL_CHUNK, CacheError
from kvcompile.artifacts import prefill_bytes as prefill_bytes
from kvcompile.runtime import masks
from kvcompile.runtime.cache import RaggedCache, RaggedLayer


def chunk_length(asked: int | None) -> int:
    """Tokens of a chunk; None: the default.

    Raises:
        CacheError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise CacheError(f"chunks of {asked} prompt tokens were asked for, expected 1 or more")
    return PREFILL_CHUNK if asked is None else asked


@torch.inference_mode()
def read_prompts(
    model: Any, cache: RaggedCache, ids: torch.Tensor, positions: torch.Tensor, pad: torch.Tensor | None, chunk: int
) -> torch.Tensor:
    """Read prompts int64 [B, n] into an empty cache, `chunk` columns at a time; logits [B, vocab] after the last one.

    Sequence b is the columns from `pad[b]` int64 [B] on (None: no padding); `positions` int64 [1 or B, n].
    """
    embed = model.get_input_embeddings()
    first = embed(ids[:, :chunk])
    hidden = first.new_empty(*ids.shape, first.shape[-1])
    for start in range(0, ids.shape[1], chunk):
        hidden[:, start : start + chunk] = embed(ids[:, start : start + chunk]) if start else first
    del first
    with masks.left_out(), _in_chunks(model, cache, pad, chunk):
        options = {"position_ids": positions, "past_key_values": cache, "logits_to_keep": 1}
        logits: torch.Tensor = model(inputs_embeds=hidden, **options).logits
    return logits[:, -1]


@contextmanager
def _in_chunks(model: Any, cache: RaggedCache, pad: torch.Tensor | None, chunk: int) -> Iterator[None]:
    """Within, every decoder layer takes hidden states of a whole prompt and goes through them in chunks; the last one
    hands on those of the last token alone."""
    layers = model.get_decoder().layers
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, stored in zip(layers, cache.layers, strict=True):
            layer.forward = _chunked(layer.forward, stored, pad, chunk, last=stored is cache.layers[-1])
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = before


def _chunked(
    forward: Callable[..., Any], stored: RaggedLayer, pad: torch.Tensor | None, chunk: int, last: bool
) -> Callable[..., torch.Tensor]:
    def read(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        batch, columns, _ = hidden_states.shape
        with stored.reading(batch, columns, pad):
            for start in range(0, columns, chunk):
                now = slice(start, start + chunk)
                out = forward(hidden_states[:, now], **_part(arguments, now))
                hidden_states[:, now] = out[0] if isinstance(out, tuple) else out
        return hidden_states[:, -1:] if last else hidden_states

    return read


def _part(arguments: dict[str, Any], now: slice) -> dict[str, Any]:
    """A layer's arguments for some columns."""
    found = dict(arguments)
    cos, sin = arguments["position_embeddings"]
    found["position_embeddings"] = cos[:, now], sin[:, now]
    if arguments.get("position_ids") is not None:
        found["position_ids"] = arguments["position_ids"][:, now]
    return found
