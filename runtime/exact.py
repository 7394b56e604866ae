"""A model's own attention over keys and values that are all there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcompile.artifacts import CacheError
from kvcompile.kernels import LayerLayout, Softmax, prompt_attention
from kvcompile.kernels.softmax import PLAIN, attended
from kvcompile.runtime.policies import POLICIES


def softmax_of(options: Mapping[str, Any]) -> Softmax:
    """How logits become weights, by what transformers hands an attention function beside its tensors: `softcap`, and
    the learned sinks `s_aux` [num_heads]."""
    cap, sinks = options.get("softcap"), options.get("s_aux")
    if cap is None and sinks is None:
        return PLAIN
    return Softmax(cap, None if sinks is None else sinks.detach().float())


def refuse_followers(layout: LayerLayout) -> None:
    """Raises CacheError: a layer with a policy that would have to know this softmax."""
    if any(POLICIES[cls.policy].observes for cls in layout.classes):
        raise CacheError(
            "heads of a policy that learns from every step's attention (h2o) cannot follow a model with learned sinks "
            "or capped logits: build with another policy"
        )


def exact_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softmax: Softmax,
    **options: Any,
) -> torch.Tensor:
    """Attention [B, T, num_heads, D] of `query` [B, num_heads, T, D]: transformers' `sdpa`, which knows neither caps
    nor sinks, or in torch. `mask` bool [B, 1, T, n]; None: causal."""
    if softmax.plain:
        output: torch.Tensor = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling, **options)[0]
        return output
    length, count = query.shape[2], keys.shape[2]
    if mask is None:
        seen = torch.ones(length, count, dtype=torch.bool, device=query.device).tril(count - length)
    else:
        seen = mask[:, :, None, :, :count]
    return attended(query, keys, values, seen, scaling, softmax).transpose(1, 2)


def own_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softmax: Softmax,
    **options: Any,
) -> torch.Tensor:
    """As `exact_attention`; plain causal attention of a prompt, which has no mask, in C on a CPU."""
    if mask is None and query.device.type == "cpu" and not options.get("dropout"):
        return prompt_attention(query, keys, values, None, 0, scaling, softmax=softmax).transpose(1, 2)
    return exact_attention(module, query, keys, values, mask, scaling, softmax, **options)
