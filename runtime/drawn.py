"""How much attention the tokens of a prompt draw."""

from __future__ import annotations

import torch

from kvcompile.artifacts import LOGITS_AT_ONCE
from kvcompile.kernels.softmax import PLAIN, Softmax


def attention_drawn(
    query: torch.Tensor, keys: torch.Tensor, pad: torch.Tensor | None, scaling: float, softmax: Softmax = PLAIN
) -> torch.Tensor:
    """The attention that the last T of n columns pay to each of them, summed over queries and the group: f32 [B, H, n].

    `query` [B, H, group, T, D], `keys` [B, H, n, D]; sequence b is the columns from `pad[b]` on (None: all).
    """
    batch, heads, group, length, _ = query.shape
    count = keys.shape[2]
    column = torch.arange(count, device=keys.device)
    padding = None if pad is None else column < pad[:, None]  # [B, n]
    total = torch.zeros(batch, heads, count, dtype=torch.float32, device=keys.device)
    block = max(1, LOGITS_AT_ONCE // (batch * group * count))
    for h in range(heads):
        wanted = keys[:, h].float().mT
        for t in range(0, length, block):
            rows = column[count - length + t :][:block]
            hidden = (column > rows[:, None])[None, None]  # [B or 1, 1, T, n]
            if padding is not None:
                hidden = hidden | padding[:, None, None]
            # The group's queries as rows of one product, so that keys are not repeated.
            asked = query[:, h, :, t : t + block].float().flatten(1, 2)
            logits = (asked @ wanted).mul_(scaling).unflatten(1, (group, -1))
            if softmax.plain:
                weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
            else:
                one = softmax.of(slice(h, h + 1), group)
                weights = one.weights(logits[:, None], ~hidden[:, None])[:, 0]
            if padding is not None:  # a query that is padding sees nothing, and its softmax is no number
                weights.masked_fill_(padding[:, rows][:, None, :, None], 0)
            total[:, h] += weights.sum((1, 2))
            del logits, weights  # before the next ones are formed
    return total
