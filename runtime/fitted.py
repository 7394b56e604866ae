"""Values of a prompt's kept tokens, fitted so that attention to them comes to what attention to all of it would.

What is evicted takes its values out of every later output. The values that stay can make up for that: at reference
queries (`runtime.references`), whose attention to the whole prompt is known, they are the least squares solution (after
Attention Matching, arXiv 2602.16284, where kept keys get a bias too). Here

    V' = V + (W'W + ridge I)^-1 W' (O - W V)

for weights W [R, m] that R reference queries give to the m kept tokens, and their exact outputs O [R, D] over all n:
the ridge keeps the change small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.references import HeadReferences, referred_heads
from kvcompile.runtime.rotation import Rotation

RIDGE = 1e-4
"""A reference query. KL is the same with 1.5e-5 and 5e-5, and a tenth higher with 5e-4 (docs/results.md)."""


def fit_values(prompt: LayerPrompt, kept: Sequence[torch.Tensor], rotation: Rotation) -> torch.Tensor:
    """Values [B, num_kv_heads, n, D] of prompts with those of `kept` tokens (`kept_of`) fitted, where references are
    used."""
    pad = prompt.columns - prompt.lengths.long()
    values = prompt.values.clone()
    for one in referred_heads(prompt, rotation):
        columns = kept[one.which][one.b, one.place]
        stored = prompt.keys[one.b, one.head, one.own], prompt.values[one.b, one.head, one.own]
        values[one.b, one.head, columns] = fit_head(one.references, *stored, columns - pad[one.b]).to(values.dtype)
    return values


def fit_head(references: HeadReferences, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Values f32 [m, D] of one KV head's `kept` int64 [m] tokens, of `keys` and `values` [n, D]: see above."""
    keys, values = keys.float(), values.float()
    weights, residual = [], []
    for logits, counts in references.logits(keys):
        some = references.softmax.weights(logits[..., kept], None)[0]
        residual.append((references.softmax.weights(logits, None)[0] @ values - some @ values[kept]) * counts)
        weights.append(some * counts)
    w, left = torch.cat(weights, 1).flatten(0, 1), torch.cat(residual, 1).flatten(0, 1)
    ridge = RIDGE * len(w)
    # The same either way; the smaller system is solved.
    if len(w) < len(kept):
        return values[kept] + w.mT @ _solved(w @ w.mT, left, ridge)
    return values[kept] + _solved(w.mT @ w, w.mT @ left, ridge)


def _solved(gram: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    gram.diagonal().add_(ridge)
    # Not `solve`, and without a look at whether it worked, for which the host would have to wait.
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram)[0])
