"""Reading long prompts and follow-ups layer by layer, and each layer in chunks, so that little grows with them.

The hidden states of the whole prompt are kept, and overwritten in place, layer after layer; of keys and values those of
one layer are there at a time, as it is cut to its budget before the next one reads. Attention within the prompt is
exact, so chunks of any length give what the whole prompt gives, up to rounding. A follow-up, on a filled cache, also
sees what was stored before it, and its own keys and values are there until the layer has read it to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from kvcompile.artifacts import PREFILL_CHUNK, CacheError
from kvcompile.artifacts import prefill_bytes as prefill_bytes
from kvcompile.runtime import masks, token_inputs
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.layer import RaggedLayer
from kvcompile.runtime.linear import LinearLayer
from kvcompile.runtime.parts import decoder_of, reuses


def chunk_length(asked: int | None) -> int:
    """Tokens of a chunk; None: the default.

    Raises:
        CacheError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise CacheError(f"chunks of {asked} prompt tokens were asked for, expected 1 or more")
    return PREFILL_CHUNK if asked is None else asked


def cut_length(asked: int | None) -> int | None:
    """Tokens after which a prompt is cut; None: after its last one alone.

    Raises:
        CacheError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise CacheError(f"a cut every {asked} prompt tokens was asked for, expected 1 or more")
    return asked


@torch.inference_mode()
def read(
    model: Any,
    cache: RaggedCache,
    ids: torch.Tensor,
    real: torch.Tensor,
    start: torch.Tensor,
    chunk: int,
    cut_every: int | None,
) -> torch.Tensor:
    """Read prompts or follow-ups int64 [B, n], left-padded where `real` [B, n] is 0; logits [B, vocab] after the last
    token. `start` [B, 1] counts the tokens before them. They are cut to the budget every `cut_every` columns, and what
    comes next is a follow-up."""
    columns = ids.shape[1]
    piece = cut_every or columns
    pad, positions = columns - real.sum(1), (real.cumsum(1) - 1).clamp(min=0) + start
    padded = int(pad.max())
    for first in range(0, columns, piece):
        now = slice(first, min(first + piece, columns))
        own = (pad - first).clamp(min=0, max=now.stop - first) if padded > first else None
        logits = _read_piece(model, cache, ids[:, now], positions[:, now], own, chunk)
    return logits


def _read_piece(
    model: Any, cache: RaggedCache, ids: torch.Tensor, positions: torch.Tensor, pad: torch.Tensor | None, chunk: int
) -> torch.Tensor:
    columns, filled = ids.shape[1], cache.get_seq_length() > 0
    step = columns == 1 and pad is None
    if filled and pad is not None and cache.observes and len(cache.ragged) < len(cache.layers):
        raise CacheError(
            "padded follow-ups cannot be read with layers of linear attention and a policy that learns from attention "
            "(h2o): give them one sequence at a time"
        )
    if (step or cache.observes) if filled else columns <= chunk:
        return _read_at_once(model, cache, ids, positions, pad)
    return read_prompts(model, cache, ids, positions if pad is not None or filled else positions[:1], pad, chunk)


def _read_at_once(
    model: Any, cache: RaggedCache, ids: torch.Tensor, positions: torch.Tensor, pad: torch.Tensor | None
) -> torch.Tensor:
    options: dict[str, Any] = {"past_key_values": cache, "logits_to_keep": 1}
    if pad is not None:
        if ids.shape[1] == 1:
            # The model takes one column alone for a step, whose token is never padding.
            ids, positions, pad = ids.repeat(1, 2), positions.repeat(1, 2), pad + 1
        real = torch.arange(ids.shape[1], device=ids.device) >= pad[:, None]
        # transformers' mask has a column for all that came before too, which nothing asks for.
        options["attention_mask"] = torch.nn.functional.pad(real.long(), (cache.get_seq_length(), 0), value=1)
    logits: torch.Tensor = model(ids, position_ids=positions, **options).logits
    return logits[:, -1]


@torch.inference_mode()
def read_prompts(
    model: Any, cache: RaggedCache, ids: torch.Tensor, positions: torch.Tensor, pad: torch.Tensor | None, chunk: int
) -> torch.Tensor:
    """Read prompts int64 [B, n] into an empty cache, or follow-ups into a filled one whose policies do not observe,
    `chunk` columns at a time; logits [B, vocab] after the last one.

    Sequence b is the columns from `pad[b]` int64 [B] on (None: no padding); `positions` int64 [1 or B, n].
    """
    embed = model.get_input_embeddings()
    first = embed(ids[:, :chunk])
    hidden = first.new_empty(*ids.shape, first.shape[-1])
    for start in range(0, ids.shape[1], chunk):
        hidden[:, start : start + chunk] = embed(ids[:, start : start + chunk]) if start else first
    del first
    with masks.left_out(), token_inputs.left_out(model), _in_chunks(model, cache, ids, pad, chunk):
        options = {"position_ids": positions, "past_key_values": cache, "logits_to_keep": 1}
        logits: torch.Tensor = model(inputs_embeds=hidden, **options).logits
    return logits[:, -1]


Inputs = Callable[[slice], dict[str, torch.Tensor]]
"""What a layer is given for some columns beside hidden states."""


@contextmanager
def _in_chunks(
    model: Any, cache: RaggedCache, ids: torch.Tensor, pad: torch.Tensor | None, chunk: int
) -> Iterator[None]:
    """Within, every decoder layer takes hidden states of a whole prompt and goes through them in chunks; the last one
    that has a cache hands on those of the last token alone."""
    layers = decoder_of(model).layers
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            inputs = partial(_inputs, model, ids, number)
            if reuses(layer):
                layer.forward = _at_the_end(layer.forward, inputs)
            else:
                last = number == len(cache.layers) - 1
                layer.forward = _chunked(layer.forward, inputs, cache.layers[number], pad, chunk, last)
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = before


def _inputs(model: Any, ids: torch.Tensor, layer: int, now: slice) -> dict[str, torch.Tensor]:
    """By token, where a layer of the model takes such inputs."""
    if not token_inputs.has_token_inputs(model):
        return {}
    embedded = model.get_input_embeddings()(ids[:, now])
    return {"per_layer_input": token_inputs.token_input(model, ids[:, now], embedded, layer)}


def _at_the_end(forward: Callable[..., Any], inputs: Inputs) -> Callable[..., torch.Tensor]:
    """Of a layer that attends to the keys and values of an earlier one, which no later token needs: for the last token
    alone."""

    def read(hidden_states: torch.Tensor, *_: Any, **arguments: Any) -> torch.Tensor:
        now = slice(-1, None)
        output: torch.Tensor = forward(hidden_states[:, now], **_part(arguments, now), **inputs(now))
        return output

    return read


def _chunked(
    forward: Callable[..., Any],
    inputs: Inputs,
    stored: RaggedLayer | LinearLayer,
    pad: torch.Tensor | None,
    chunk: int,
    last: bool,
) -> Callable[..., torch.Tensor]:
    def read(hidden_states: torch.Tensor, *given: Any, **arguments: Any) -> torch.Tensor:
        batch, columns, _ = hidden_states.shape
        linear, rows = isinstance(stored, LinearLayer), [(slice(None), 0)]
        if alone := isinstance(stored, LinearLayer) and pad is not None and stored.has_previous_state[0]:
            # Padding would leave its mark on a state that is there: every sequence by itself, without.
            rows = [(slice(b, b + 1), first) for b, first in enumerate(pad.tolist())]
        for row, first in rows:
            with _reading(stored, batch, columns, pad, row if alone else None):
                for start in range(first, columns, chunk):
                    now = slice(start, start + chunk)
                    part = _part(arguments, now, row)
                    if linear and pad is not None and not alone:
                        part["attention_mask"] = torch.arange(columns, device=pad.device)[now] >= pad[:, None]
                    beside = inputs(now)
                    out = forward(hidden_states[row, now], *(() if beside else given), **part, **beside)
                    hidden_states[row, now] = out[0] if isinstance(out, tuple) else out
        return hidden_states[:, -1:] if last else hidden_states

    return read


def _reading(
    stored: RaggedLayer | LinearLayer, batch: int, columns: int, pad: torch.Tensor | None, row: slice | None
) -> AbstractContextManager[Any]:
    """What a layer's store does while a prompt is read, of one `row` of it (None: of all)."""
    if isinstance(stored, LinearLayer):
        return nullcontext() if row is None else stored.only(row)
    return stored.reading(batch, columns, pad)


def _part(arguments: dict[str, Any], now: slice, row: slice = slice(None)) -> dict[str, Any]:
    """A layer's arguments for some columns, of some rows."""

    def own(table: torch.Tensor) -> torch.Tensor:
        return table[:, now] if len(table) == 1 else table[row, now]

    found = dict(arguments)
    tables = arguments["position_embeddings"]
    # Cosines and sines, or both as complex numbers.
    found["position_embeddings"] = own(tables) if isinstance(tables, torch.Tensor) else tuple(map(own, tables))
    if arguments.get("position_ids") is not None:
        found["position_ids"] = own(arguments["position_ids"])
    return found
