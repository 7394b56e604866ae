"""Keep a head's chosen tokens: the checked entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.compact import dense


def compact(store: torch.Tensor, prompt: torch.Tensor, token: torch.Tensor) -> None:
    """Fill the first slots of every head with chosen prompt tokens: `store[h, s] = prompt[h, token[h, s]]`.

    One sequence of one class: `store` [H, capacity, D], `prompt` [H, n, D], `token` int64 [H, kept], kept <= capacity.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if not (store.shape[0] == prompt.shape[0] == token.shape[0] and token.shape[1] <= store.shape[1]):
        raise ValueError(
            f"store {tuple(store.shape)}, prompt {tuple(prompt.shape)} and token {tuple(token.shape)} do not fit"
        )
    dense.compact(store, prompt, token)
