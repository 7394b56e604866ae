"""What the layers of some models (Gemma-4 E2B and E4B) are given for every token beside the residual stream: embeddings
of their own and a product with the residual stream before the first layer.

Transformers makes those of all layers at once, several times what the residual stream takes. Here a layer's are made
when it is its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import embedding, linear

from kvcompile.runtime.parts import decoder_of

Rows = Callable[[torch.Tensor, slice], torch.Tensor]
"""Columns `own` of the rows of a table, of tokens int64 [B, n]: [B, n, P]."""

ROWS = "kvcompile_rows"
"""Attribute of a table of embeddings whose weights are not there: its `Rows`."""


def has_token_inputs(model: Any) -> bool:
    """Whether the layers of a model take such inputs."""
    return bool(getattr(decoder_of(model), "hidden_size_per_layer_input", 0))


def token_input(model: Any, ids: torch.Tensor, embedded: torch.Tensor, layer: int) -> torch.Tensor:
    """The input [B, n, P] of a layer for tokens `ids` int64 [B, n], of which `embedded` [B, n, d] is the residual
    stream before the first layer."""
    decoder = decoder_of(model)
    size = decoder.hidden_size_per_layer_input
    own = slice(layer * size, (layer + 1) * size)
    table = decoder.embed_tokens_per_layer
    rows: Rows | None = getattr(table, ROWS, None)
    found = embedding(ids, table.weight[:, own]) if rows is None else rows(ids, own)
    found = found * table.embed_scale.to(table.weight.dtype)
    product = linear(embedded, decoder.per_layer_model_projection.weight[own])
    product = decoder.per_layer_projection_norm(product * decoder.per_layer_model_projection_scale)
    total: torch.Tensor = (product + found) * decoder.per_layer_input_scale
    return total


@contextmanager
def left_out(model: Any) -> Iterator[None]:
    """Within, the model does not make them, and its layers are given zeros that take no memory."""
    decoder = decoder_of(model)
    if not has_token_inputs(model):
        yield
        return
    shape = (len(decoder.layers), decoder.hidden_size_per_layer_input)

    def nothing(embedded: torch.Tensor, *_: Any) -> torch.Tensor:
        return embedded.new_zeros(1).expand(*embedded.shape[:2], *shape)

    try:
        decoder.get_per_layer_inputs = lambda *_: None
        decoder.project_per_layer_inputs = nothing
        yield
    finally:
        del decoder.get_per_layer_inputs, decoder.project_per_layer_inputs
