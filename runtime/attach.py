"""Binding an artifact to a model: heads are permuted once, and attention goes through the ragged cache."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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
from kvcompile.runtime.binding import BINDING, IMPLEMENTATION, Binding, register
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.joined import separate
from kvcompile.runtime.layer import RaggedLayer
from kvcompile.runtime.layer_scorer import LayerScorer
from kvcompile.runtime.layouts import layer_layouts, window_layout
from kvcompile.runtime.linear import LinearLayer
from kvcompile.runtime.parts import attention_modules, decoder_of, planned, reuses, sources, windowed
from kvcompile.runtime.reorder import ARCHITECTURES, inverse, permute_heads
from kvcompile.runtime.rotation import layer_rotation
from kvcompile.runtime.tensor_parallel import TensorParallel
from kvcompile.runtime.transforms import layer_transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Attachment:
    """A model with an artifact bound to it. The model computes what it did before, with plain caches too; with a cache
    from `new_cache` it stays within the artifact's budget. Only one thread at a time may call it, as its modules know
    the cache of the pass under way."""

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
        register()
        self._id = uuid.uuid4().hex
        self._previous = model.config._attn_implementation
        self._moved: list[tuple[nn.Module, list[int]]] = []
        try:
            self._bind()
        except BaseException:
            self._give_back()
            raise

    def _bind(self) -> None:
        self._permute()
        bound = [*zip(self._attention, self.scorers, strict=True), *((module, None) for module in self._windowed)]
        for module, scorer in bound:
            setattr(module, BINDING, Binding(self._id, module, scorer, chunk_of(self.artifact.model)))
        for module in self._reusing:
            source = self._sources[module.layer_idx]
            last = source not in self._sources[module.layer_idx + 1 :]
            setattr(module, BINDING, Binding(self._id, module, source=source, last=last))
        self.model.set_attn_implementation(IMPLEMENTATION)

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
        own = self.artifact.model
        parts = zip(self.layouts, devices, self._transforms, self._rotations, own.windows, strict=True)
        ragged = iter(
            RaggedLayer(layout, own.head_dim, dtype, device, batch_size, transform, rotation, window)
            for layout, device, transform, rotation, window in parts
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
        binding = getattr(self._attention[0], BINDING, None)
        if binding is None or binding.attachment != self._id:
            return  # it has been detached, and another one may be attached
        self._give_back()

    def _give_back(self) -> None:
        bound = [one for one in (*self._attention, *self._windowed, *self._reusing) if hasattr(one, BINDING)]
        for module in bound:
            for hook in getattr(module, BINDING).hooks:
                hook.remove()
            for step in getattr(module, BINDING).steps:
                step.let_go()  # or its weights would be there twice from here on
        separate(one for one in self.model.modules() if isinstance(one, nn.Linear))
        while self._moved:
            module, order = self._moved[-1]
            self._reorder(module, inverse(order))
            self._moved.pop()
        self.model.set_attn_implementation(self._previous)
        for module in bound:  # last, so that what was short of memory can be tried again
            delattr(module, BINDING)

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

    def _permute(self) -> None:
        for module, order in zip(self._attention, self._orders, strict=True):
            followers = [one for one in self._reusing if self._sources[one.layer_idx] == module.layer_idx]
            for one in (module, *followers):
                self._reorder(one, order)
                self._moved.append((one, order))

    def _reorder(self, module: nn.Module, order: list[int]) -> None:
        own = self.artifact.model
        permute_heads(own.architecture, module, order, own.num_attention_heads, own.head_dim)


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
