"""What joins attention modules to the ragged cache: a hook that finds the layer, and an attention function."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface

from kvcompile.artifacts import CacheError
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.exact import exact_attention, own_attention, softmax_of
from kvcompile.runtime.layer import RaggedLayer
from kvcompile.runtime.layer_scorer import LayerScorer
from kvcompile.runtime.masks import mask
from kvcompile.runtime.parts import attention_input

IMPLEMENTATION = "kvcompile"
"""Name under which our attention function is registered with transformers."""
BINDING = "_kvcompile_binding"
"""Attribute of an attention module that holds its `Binding`."""


class Binding:
    """Passes the cache layer of the forward pass under way from a hook on the attention module to its attention
    function, which transformers calls without the cache. `chunk`: tokens after which the model's chunked attention
    would forget them, None where it has none; `source`: the number of the layer that the module `reuses` the keys and
    values of (None: it has its own), of which it is the `last` one to do so."""

    def __init__(
        self,
        attachment: str,
        module: nn.Module,
        scorer: LayerScorer | None = None,
        chunk: int | None = None,
        source: int | None = None,
        last: bool = False,
    ) -> None:
        self.attachment = attachment
        self.scorer = scorer
        self.chunk = chunk
        self.source, self.last = source, last
        self.layer: RaggedLayer | None = None
        self.steps: WeakSet[Any] = WeakSet()
        """Of the first layer: the fused steps, which hold weights of the model while it is attached."""
        self.hooks = (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()  # a pass that was interrupted (KeyboardInterrupt), after which torch calls no hook
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, RaggedCache):
            return
        if cache.attachment != self.attachment:
            raise CacheError("this cache was made for another attachment: take one from this attachment's new_cache()")
        if (found := module.config._attn_implementation) != IMPLEMENTATION:  # type: ignore[union-attr]
            raise CacheError(
                f"the model's attention was set to {found!r} since an artifact was attached, and would not see this "
                f"cache: call model.set_attn_implementation({IMPLEMENTATION!r}), or detach() and attach again"
            )
        hidden = attention_input(args, kwargs)
        if self.source is not None:
            self.layer = cache.layers[self.source]
            return
        layer: RaggedLayer = cache.layers[module.layer_idx]
        if self.chunk is not None and layer.get_seq_length() + hidden.shape[1] > self.chunk:
            found = (
                f"the model attends in chunks of {self.chunk} tokens, and a compiled cache holds the first one alone"
            )
            raise CacheError(f"{found}: end sequences after {self.chunk} tokens, padding included")
        self.layer, layer.expected = layer, True
        if self.scorer is not None:
            layer.score = self.scorer(hidden)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.layer is not None and self.source is not None and self.last:
            self.layer.end_reuse()
        self._forget()

    def _forget(self) -> None:
        if self.layer is not None and self.source is None:
            self.layer.expected, self.layer.score = False, None
        self.layer = None


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Through the ragged cache where one is in use, else as the model's own attention."""
    scale, softmax = query.shape[-1] ** -0.5 if scaling is None else scaling, softmax_of(kwargs)

    binding: Binding | None = getattr(module, BINDING, None)
    if binding is None or binding.layer is None:
        return exact_attention(module, query, key, value, attention_mask, scale, softmax, **kwargs), None

    def prompt() -> torch.Tensor:
        return own_attention(module, query, key, value, attention_mask, scale, softmax, **kwargs)

    if binding.source is not None:
        return binding.layer.attend_again(query, scale, softmax, prompt), None
    return binding.layer.attend(query, key, value, attention_mask, scale, prompt, softmax), None


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers."""
    # Here and not on import: transformers' module of models loads scipy where it is installed.
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
