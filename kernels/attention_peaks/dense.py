"""`attention_peaks` in torch, in blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.softmax import Softmax

BLOCK = 128
"""Rows whose logits are there at once."""


def attention_peaks(
    query: Tensor, keys: Tensor, own_keys: Tensor, places: Tensor, scaling: float, window: int, softmax: Softmax
) -> Tensor:
    """See `api.attention_peaks`."""
    keys, own_keys = keys.float(), own_keys.float()
    heads, length, head_dim = keys.shape
    most = keys.new_full((heads, length), -torch.inf)
    for some in torch.split(torch.arange(len(places), device=keys.device), BLOCK):
        rows = query[:, some].float().reshape(heads, -1, head_dim) * scaling  # [H, G T, D]
        # Later tokens of the follow-up are seen by none of these rows.
        seen = int(places[some[-1]]) + 1
        at = (places[some] + length).repeat(rows.shape[1] // len(some))[:, None]
        # [H, G T, n] and [H, G T, seen]: logits on the context and on the follow-up itself, apart, because only the
        # first are of interest and both are in the softmax.
        past, rest = softmax.bent(rows @ keys.mT), softmax.bent(rows @ own_keys[:, :seen].mT)
        column = torch.arange(length + seen, device=keys.device)
        hidden = (column > at) | (column <= at - window) if window else column > at
        past.masked_fill_(hidden[:, :length], -torch.inf)
        rest.masked_fill_(hidden[:, length:], -torch.inf)
        # log P[t, j] = logit[t, j] - log sum exp; the largest logarithm is that of the largest probability.
        total = torch.logaddexp(past.logsumexp(-1), rest.logsumexp(-1))
        if softmax.sinks is not None:
            total = torch.logaddexp(total, softmax.sinks.view(heads, -1).repeat_interleave(len(some), 1))
        torch.maximum(most, past.sub_(total[..., None]).amax(1), out=most)
    return most.exp_()
