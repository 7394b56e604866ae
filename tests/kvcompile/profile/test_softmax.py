"""Capped logits and learned sinks in what a profile makes of attention, against explicit numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.kernels import Changes, Softmax
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, pack
from kvcompile.profile.losses import losses
from kvcompile.profile.retrieval import attention_rows
from kvcompile.profile.utility import utilities

HEADS, GROUP, TOKENS, OWN, DIM = 2, 3, 20, 6, 8
SOFTMAXES = {
    "plain": Softmax(),
    "capped": Softmax(cap=0.7),
    "sinks": Softmax(sinks=torch.tensor([2.0, -3.0, 0.0, 1.0, -1.0, 0.3])),
}


@dataclass(frozen=True)
class Asked:
    kind: str
    first: int
    ids: NDArray[np.int64]


@pytest.fixture(params=SOFTMAXES.values(), ids=SOFTMAXES)
def softmax(request: pytest.FixtureRequest) -> Softmax:
    found: Softmax = request.param
    return found


def setting(softmax: Softmax) -> tuple[Attention, Context, Tensor]:
    """A follow-up of six tokens to a context, its queries as the model gives them, and the gradient at its output."""
    draw = torch.Generator().manual_seed(0)
    context = Context(
        [], [torch.randn(HEADS, TOKENS, DIM, generator=draw)], [torch.randn(HEADS, TOKENS, DIM, generator=draw)]
    )
    query, upstream = torch.randn(2, HEADS * GROUP, OWN, DIM, generator=draw)
    key, value = torch.randn(2, HEADS, OWN, DIM, generator=draw)
    return Attention(0, query, key, value, 0.5, None, softmax), context, upstream


def explicit(call: Attention, keys: Tensor, alive: Tensor | None = None) -> Tensor:
    """Weights [H, G, T, n + m]; of the context's tokens those that are `alive` bool [n]."""
    both = torch.cat([keys, call.key], 1)
    logits = torch.stack([call.query[q] @ both[q // GROUP].T * call.scaling for q in range(HEADS * GROUP)])
    if call.softmax.cap is not None:
        logits = call.softmax.cap * torch.tanh(logits / call.softmax.cap)
    seen = torch.ones(OWN, TOKENS + OWN, dtype=torch.bool).tril(TOKENS)
    if alive is not None:
        seen[:, :TOKENS] &= alive
    total = torch.exp(logits).mul(seen)
    sinks = 0 if call.softmax.sinks is None else call.softmax.sinks.exp()[:, None, None]
    return (total / (total.sum(-1, keepdim=True) + sinks)).view(HEADS, GROUP, OWN, -1)


def test_utilities(softmax: Softmax) -> None:
    call, context, _ = setting(softmax)
    packed = pack(TOKENS, [Asked("quote", 0, np.arange(OWN))])
    wanted = explicit(call, context.keys[0])[..., :TOKENS].amax((1, 2))
    torch.testing.assert_close(utilities(call, context, packed), wanted)


def test_rows_of_one_sequence(softmax: Softmax) -> None:
    call, context, _ = setting(softmax)
    query = torch.cat([call.query.repeat(1, 4, 1)[:, :TOKENS], call.query], 1)
    key, value = torch.cat([context.keys[0], call.key], 1), torch.cat([context.values[0], call.value], 1)
    whole = Attention(0, query, key, value, 0.5, None, softmax)
    found = attention_rows(whole, torch.arange(TOKENS, TOKENS + OWN))
    torch.testing.assert_close(found.view(HEADS, GROUP, OWN, -1), explicit(call, context.keys[0]))


def test_the_loss_of_evicting_half(softmax: Softmax) -> None:
    call, context, upstream = setting(softmax)
    packed = pack(TOKENS, [Asked("quote", 0, np.arange(OWN))])
    alive = torch.arange(TOKENS) % 2 == 0
    entry = (~alive).int()[None, :, None].repeat(HEADS, 1, 1)
    found = losses(call, upstream, context, packed, Changes(entry, 1))
    values = torch.cat([context.values[0], call.value], 1)[:, None]
    change = (explicit(call, context.keys[0], alive) - explicit(call, context.keys[0])) @ values
    error = (change * upstream.view(HEADS, GROUP, OWN, DIM)).sum((1, 3))
    np.testing.assert_allclose(found.evicted["quote"][:, 0, 0], error.square().mean(1) / 2, rtol=1e-4)
