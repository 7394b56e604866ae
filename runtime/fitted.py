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
from kvcompile.runtime.references import HeadReferences, ReferredHead

RIDGE = 1e-4
"""A reference query. KL is the same with 1.5e-5 and 5e-5, and a tenth higher with 5e-4 (docs/results.md)."""


def fit_values(prompt: LayerPrompt, kept: Sequence[torch.Tensor], referred: Sequence[ReferredHead]) -> torch.Tensor:
    """Values [B, num_kv_heads, n, D] of prompts with those of `kept` tokens (`kept_of`) fitted in `referred` heads."""
    values = prompt.values.clone() if referred else prompt.values
    for one in referred:
        at = one.b, one.head, kept[one.which][one.b, one.place]
        values[at] = fit_head(one.references, one.attended.output, prompt.keys[at], prompt.values[at]).to(values.dtype)
    return values


def fit_head(
    references: HeadReferences, output: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Values f32 [m, D] of one KV head's kept tokens, of which these are the `keys` and `values` [m, D]; `output`
    [group, r, D] is that of its references over all tokens: see above."""
    values = values.float()
    w = torch.cat(list(references.weights(keys.float())), 1).flatten(0, 1)
    left = output.flatten(0, 1) - w @ values
    ridge = RIDGE * len(w)
    # The same either way; the smaller system is solved.
    if len(w) < len(values):
        return values + w.mT @ _solved(w @ w.mT, left, ridge)
    return values + _solved(w.mT @ w, w.mT @ left, ridge)


def _solved(gram: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    gram.diagonal().add_(ridge)
    # Not `solve`, and without a look at whether it worked, for which the host would have to wait.
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram)[0])
