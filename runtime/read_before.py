"""A prompt that the model has read already, for caches of several artifacts: read once, and not once for each."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from kvcompile.kernels import Softmax
from kvcompile.runtime.attach import Attachment
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.exact import own_attention, softmax_of
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.masks import mask
from kvcompile.runtime.parts import attention_input, attention_modules, decoder_of, planned
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.references import References

IMPLEMENTATION = "kvcompile_read"
"""Name under which transformers knows the attention that a prompt is read with: the runtime's own."""


@dataclass(frozen=True)
class Asked:
    """Of one layer's attention: its reference queries (`runtime.references`), what multiplies their logits, and how
    these become weights."""

    references: References
    scaling: float
    softmax: Softmax

    def of(self, order: list[int]) -> Asked:
        """With the KV heads, and their groups of query heads, in this order."""
        grouped = self.references.query.unflatten(1, (len(order), -1))
        references = replace(self.references, query=grouped[:, order].flatten(1, 2))
        return replace(self, references=references, softmax=self.softmax.of(order, grouped.shape[2]))


_asked: ContextVar[list[Asked]] = ContextVar("kvcompile_asked")
"""What the layers have been asked in the forward pass under way."""


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt of n tokens as the model itself has read it, by layer: `hidden` [1, n, d], what goes into its
    attention, `keys` and `values` [1, num_kv_heads, n, D], rotary embedding applied, in the model's order of heads, and
    what they were `asked`."""

    hidden: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    asked: tuple[Asked, ...]

    def __len__(self) -> int:
        return self.keys[0].shape[2]

    def full_cache(self, model: Any) -> Cache:
        """Another cache of transformers that holds the prompt."""
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache


@torch.inference_mode()
def read_prompt(model: Any, ids: Tensor) -> ReadPrompt | None:
    """Have a model without an attachment read a prompt int64 [1, n]. None where a layer is left with less than all of
    its keys and values: one with a sliding window, or of linear attention."""
    if not all(map(planned, decoder_of(model).layers)):
        return None  # also of layers whose window holds all of a short prompt
    # Here and not on import: transformers' module of models loads scipy where it is installed.
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
    hidden: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(attention_input(args, kwargs))

    cache: Any = DynamicCache(config=model.config)
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in attention_modules(model)]
    previous, asked = model.config._attn_implementation, list[Asked]()
    token = _asked.set(asked)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        model(ids, past_key_values=cache, logits_to_keep=1)
    finally:
        model.set_attn_implementation(previous)
        _asked.reset(token)
        for hook in hooks:
            hook.remove()
    stored = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if any(keys is None or keys.shape[2] != ids.shape[1] for keys, _ in stored):
        return None
    keys, values = zip(*stored, strict=True)
    return ReadPrompt(tuple(hidden), keys, values, tuple(asked))


def looks_at_queries(attachment: Attachment) -> bool:
    """Whether a policy of the artifact goes by a prompt's attention, which a `ReadPrompt` does not have."""
    policies = {POLICIES[cls.policy] for layout in attachment.layouts for cls in layout.classes}
    return any(policy.queries or policy.sums for policy in policies)


@torch.inference_mode()
def filled(attachment: Attachment, *prompts: ReadPrompt) -> RaggedCache:
    """A new cache, a sequence each, in which the policies have cut prompts to the budget as if the attached model had
    read them; of a model in one process whose policies do not look at queries (`looks_at_queries`)."""
    cache = attachment.new_cache(len(prompts))
    for number, layer in enumerate(cache.ragged):
        order, scorer = attachment.orders[number], attachment.scorers[number]
        for sequence, prompt in enumerate(prompts):
            hidden, keys, values = (part[number] for part in (prompt.hidden, prompt.keys, prompt.values))
            keys, values, asked = keys[:, order], values[:, order], prompt.asked[number].of(order)
            no_queries = keys.new_empty(1, keys.shape[1], 0, keys.shape[3])
            read = LayerPrompt(layer.store.layout, len(prompt), None, softmax=asked.softmax)
            read.add(no_queries, keys, values, asked.scaling, None if scorer is None else scorer(hidden))
            read.references = asked.references
            layer.store.one(sequence, 0).cut(read)
        layer.store.count([len(prompt) for prompt in prompts])
        layer.columns = max(map(len, prompts))
    return cache


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    scale, softmax = query.shape[-1] ** -0.5 if scaling is None else scaling, softmax_of(options)
    lengths = torch.full((len(key),), key.shape[2], device=key.device)
    references = References.none_yet(query, key.shape[1], lengths).seen(query, torch.zeros_like(lengths))
    _asked.get().append(Asked(references, scale, softmax))
    return own_attention(module, query, key, value, attention_mask, scale, softmax, **options), None
