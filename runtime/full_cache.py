"""The decode loop over transformers' own cache, which keeps all it is given: what a budget is compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from kvcompile.runtime.sampling import Sampling


@torch.inference_mode()
def generate_full(
    model: Any,
    cache: Any,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    on_token: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """New tokens int64 [1, up to max_new_tokens] after one prompt `ids` int64 [1, n], or after what a `DynamicCache`
    holds already and then `ids`; the last one is the one of `eos` that ended the answer. `on_token` is given each,
    int64 [1] on the host."""
    chosen, fed, new = sampling or Sampling(), ids.to(model.device), list[torch.Tensor]()
    while len(new) < max_new_tokens and not (new and int(new[-1]) in eos):
        logits = model(fed, past_key_values=cache, logits_to_keep=1).logits
        fed = chosen.choose(logits[:, -1])[:, None]
        new.append(fed[0].cpu())
        if on_token is not None:
            on_token(new[-1])
    return torch.stack(new, dim=1)
