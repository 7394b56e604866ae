"""Binding an artifact to a model: heads are permuted once, and attention goes through the ragged cache."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface

from kvcompile.artifacts import (
    Artifact,
    CacheError,
    ModelError,
    check_identity,
    fetch,
    heads_of,
    identify,
)
from kvcompile.artifacts.schema import chunk_of
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.exact import exact_attention, own_attention, softmax_of
from kvcompile.runtime.joined import separate
from kvcompile.runtime.layer import RaggedLayer
from kvcompile.runtime.layer_scorer import LayerScorer
from kvcompile.runtime.layouts import layer_layouts, window_layout
from kvcompile.runtime.linear import LinearLayer
from kvcompile.runtime.masks import mask
from kvcompile.runtime.parts import attention_input, attention_modules, decoder_of, planned, reuses, sources, windowed
from kvcompile.runtime.reorder import ARCHITECTURES, inverse, permute_heads
from kvcompile.runtime.rotation import layer_rotation
from kvcompile.runtime.tensor_parallel import TensorParallel
from kvcompile.runtime.transforms import layer_transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        self.hooks = (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, RaggedCache):
            return
        if cache.attachment != self.attachment:
            raise CacheError("this cache was made for another attachment: take one from this attachment's new_cache()")
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
        if self.layer is not None and self.source is not None:
            if self.last:
                self.layer.end_reuse()
            self.layer = None
        elif self.layer is not None:
            self.layer.expected = False
            self.layer.score = None
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


def _register() -> None:
    # Here and not on import: transformers' module of models loads scipy where it is installed.
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)


class Attachment:
    """A model with an artifact bound to it. The model computes what it did before, with plain caches too; with a cache
    from `new_cache` it stays within the artifact's budget."""

    def __init__(self, model: PreTrainedModel, artifact: Artifact, references: bool = True) -> None:
        architecture = model.config.get_text_config().model_type
        if architecture not in ARCHITECTURES:
            raise ModelError(
                f"cannot reorder the heads of a {architecture!r} model, expected one of {', '.join(ARCHITECTURES)}"
            )
        self._attention = attention_modules(model)
        layers = decoder_of(model).layers
        self._windowed = [layer.self_attn for layer in layers if windowed(layer)]
        self._sources = sources(model)
        self._reusing = [layer.self_attn for layer in layers if reuses(layer)]
        """Modules that attend to the keys and values of an earlier layer."""
        if any(hasattr(module, BINDING) for module in self._attention):
            raise ModelError("this model has an artifact attached already: call detach() on that attachment first")
        check_identity(artifact.model, identify(model, artifact.model.name))
        self.model = model
        self.artifact = artifact
        # All that can fail comes before the model is touched.
        self.ranks = TensorParallel.of(model)
        self.ranks.check(model, artifact)
        self._orders = self.ranks.orders(artifact)
        self.orders = own = [self.ranks.own(order) for order in self._orders]
        """By layer, the model's KV heads in the order in which they are stored here."""
        self.layouts = layer_layouts(artifact, own)
        self.scorers = self._scorers(own)
        self._transforms = [
            layer_transform(artifact.quantiser, i, order, layout, module.o_proj.weight.device)
            for i, (order, layout, module) in enumerate(zip(own, self.layouts, self._attention, strict=True))
        ]
        self._rotations = [
            layer_rotation(artifact, i, module.o_proj.weight.device) if references else None
            for i, module in enumerate(self._attention)
        ]
        _register()
        self._id = uuid.uuid4().hex
        self._previous = model.config._attn_implementation
        self._permute(undo=False)
        bound = [*zip(self._attention, self.scorers, strict=True), *((module, None) for module in self._windowed)]
        for module, scorer in bound:
            setattr(module, BINDING, Binding(self._id, module, scorer, chunk_of(artifact.model)))
        for module in self._reusing:
            source = self._sources[module.layer_idx]
            last = source not in self._sources[module.layer_idx + 1 :]
            setattr(module, BINDING, Binding(self._id, module, source=source, last=last))
        model.set_attn_implementation(IMPLEMENTATION)

    def new_cache(self, batch_size: int = 1) -> RaggedCache:
        """An empty cache for `batch_size` sequences, all of its memory allocated where the model is now: after a move
        to another device it is refused, and another one has to be taken.

        Raises:
            CacheError: a batch below 1.
        """
        if batch_size < 1:
            raise CacheError(f"a batch of {batch_size} sequences was asked for, expected 1 or more")
        dtype = getattr(torch, self.artifact.target.dtype)
        devices = [module.o_proj.weight.device for module in self._attention]
        self._transforms = [
            None if transform is None else transform.to(device)
            for transform, device in zip(self._transforms, devices, strict=True)
        ]
        self._rotations = [
            None if rotation is None else rotation.to(device)
            for rotation, device in zip(self._rotations, devices, strict=True)
        ]
        parts = zip(self.layouts, devices, self._transforms, self._rotations, strict=True)
        ragged = iter(
            RaggedLayer(layout, self.artifact.model.head_dim, dtype, device, batch_size, transform, rotation)
            for layout, device, transform, rotation in parts
        )
        layers = [
            next(ragged) if planned(layer) else self._left_alone(layer, dtype, batch_size)
            for layer in decoder_of(self.model).layers
            if not reuses(layer)
        ]
        for module in self._reusing:
            layers[self._sources[module.layer_idx]].reused = True
        return RaggedCache(layers, self._id)

    def detach(self) -> None:
        """Give the model back as it was, bit for bit; its ragged caches cannot be used any more. Safe to repeat."""
        if not hasattr(self._attention[0], BINDING):
            return
        for module in (*self._attention, *self._windowed, *self._reusing):
            for hook in getattr(module, BINDING).hooks:
                hook.remove()
            delattr(module, BINDING)
        separate(one for one in self.model.modules() if isinstance(one, nn.Linear))
        self._permute(undo=True)
        self.model.set_attn_implementation(self._previous)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _left_alone(self, layer: Any, dtype: torch.dtype, batch: int) -> RaggedLayer | LinearLayer:
        """What a cache has of a layer that a plan is not for."""
        if not windowed(layer):
            return LinearLayer(layer.linear_attn, dtype, layer.linear_attn.out_proj.weight.device, batch)
        module = layer.self_attn
        num_kv_heads, head_dim = heads_of(module.config, module.layer_idx)
        layout = window_layout(num_kv_heads, module.config.sliding_window, self.artifact.target.dtype)
        return RaggedLayer(layout, head_dim, dtype, module.o_proj.weight.device, batch)

    def _scorers(self, own: list[list[int]]) -> list[LayerScorer | None]:
        """By layer, for the heads that are here; None where none of them has the policy `scored`."""
        scorer = self.artifact.scorer
        return [
            LayerScorer(scorer, i, order, self._attention[i].o_proj.weight)
            if scorer is not None and any(cls.policy == "scored" for cls in self.layouts[i].classes)
            else None
            for i, order in enumerate(own)
        ]

    def _permute(self, undo: bool) -> None:
        identity = self.artifact.model
        for module, row in zip(self._attention, self._orders, strict=True):
            order = inverse(row) if undo else row
            followers = [one for one in self._reusing if self._sources[one.layer_idx] == module.layer_idx]
            for one in (module, *followers):
                permute_heads(identity.architecture, one, order, identity.num_attention_heads, identity.head_dim)


def attach(model: PreTrainedModel, artifact: str | Path | Artifact, *, references: bool = True) -> Attachment:
    """Bind an artifact to a transformers causal LM, in place; usable as a context manager that detaches.

    `artifact` is a file, a repository on the hub (`owner/name`, `owner/name@revision`, `owner/name:file.kvb`), or what
    `read` gave. `references`: where the artifact has a rotary embedding, queries of the prompt itself say beside the
    scorer which of its tokens stay (`runtime.references`), and their values make up for the others (`runtime.fitted`);
    False: the scorer alone chooses, and values are stored as they are.

    Raises:
        ArtifactError: a file or repository that cannot be read or fails a check.
        ModelError: another model than the artifact's, an unsupported one, or one that is attached already.
    """
    return Attachment(model, artifact if isinstance(artifact, Artifact) else fetch(artifact), references)
