"""How the logits of a layer become weights, where that is more than a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import MASK_ELEMENTS


@dataclass(frozen=True, eq=False)
class Softmax:
    """`cap`: logits are bent to within it, cap tanh(logit / cap) (Gemma-2, arXiv 2408.00118); None: they are not.
    `sinks` f32 [num_heads]: the logit that a query head has learnt of a token that is not there, which takes its part
    of the weight and has no value (GPT-OSS, arXiv 2508.10925); None: there is none."""

    cap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is a softmax and nothing else."""
        return self.cap is None and self.sinks is None

    def of(self, heads: Any, group: int) -> Softmax:
        """That of the KV heads at `heads`, a slice or indices, with `group` query heads each."""
        return self if self.sinks is None else Softmax(self.cap, self.sinks.view(-1, group)[heads].flatten())

    def bent(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of any shape within the cap."""
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def sink_logits(self, group: int) -> torch.Tensor:
        """What every query head has learnt, f32 [num_kv_heads, group, 1, 1]."""
        assert self.sinks is not None
        return self.sinks.view(-1, group, 1, 1)

    def weights(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """Weights f32 [..., H, G, T, n] of logits of the same shape (KV heads, their group, queries, keys), of which
        `seen` bool, broadcast, says whether a query sees the key (None: all). A row adds up to 1, or to less with
        sinks: `share` is what is left for tokens."""
        return self.parted(logits, seen)[0]

    def parted(self, logits: torch.Tensor, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, and the weight f32 [..., H, G, T, 1] of the sinks, None without."""
        logits = self.bent(logits.float())
        if seen is not None:
            # Not -inf: a row that sees nothing, which is padding, would be no number, and so would all that it meets.
            logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        if self.sinks is None:
            return logits.softmax(-1), None
        sinks = self.sink_logits(logits.shape[-3]).expand(*logits.shape[:-1], 1)
        found = torch.cat([logits, sinks], -1).softmax(-1)
        return found[..., :-1], found[..., -1:]

    def share(self, output: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """The output [B, num_heads, T, D] of attention without sinks, as it is with them; `total` f32 [B, num_heads, T]
        is the logarithm of the sum of its exponentials."""
        if self.sinks is None:
            return output
        return (output * torch.sigmoid(total - self.sinks[:, None])[..., None]).to(output.dtype)


PLAIN = Softmax()
"""The softmax and nothing else."""


def attended(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    scaling: float,
    softmax: Softmax,
) -> torch.Tensor:
    """Attention [B, num_heads, T, D] of `query` [B, num_heads, T, D] to `keys` and `values` [B, num_kv_heads, n, D], in
    float32 within and the query's dtype without; `seen` bool, broadcast to [B, num_kv_heads, group, T, n] (None: all).
    Differentiable, in blocks of queries."""
    grouped = query.unflatten(1, (keys.shape[1], -1))
    length, keys, values = query.shape[2], keys.float(), values.float()
    block = max(1, MASK_ELEMENTS // (query.shape[0] * query.shape[1] * keys.shape[2]))
    found = []
    for start in range(0, length, block):
        rows = slice(start, start + block)
        logits = by_group(grouped[:, :, :, rows].float(), keys.mT) * scaling
        part = seen if seen is None or seen.shape[-2] == 1 else seen[..., rows, :]
        found.append(by_group(softmax.weights(logits, part), values).to(query.dtype))
    return torch.cat(found, 3).flatten(1, 2)


def by_group(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Rows [..., H, group, T, X] of query heads times the matrix of their KV head, [..., H, X, Y]: [..., H, group, T,
    Y]. `rows @ matrices.unsqueeze(-3)` would copy a matrix for every query head."""
    return (rows.flatten(-3, -2) @ matrices).unflatten(-2, rows.shape[-3:-1])
