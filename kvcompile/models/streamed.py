"""A model that does not fit: laid out without numbers, whose parts read their weights from the checkpoint when they are
used and give them up after that.

It is a transformers model like any other, and every forward pass works. What goes through it layer by layer
(`kvcompile.profile`) keeps a part where it is for as long as it is needed (`kvcompile.models.resident`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.allocator import give_back
from kvcompile.models.checkpoint import Checkpoint
from kvcompile.models.implementation import attention_of
from kvcompile.models.pieces import register_sampler, rows, sample
from kvcompile.models.progress import no_progress_bars
from kvcompile.models.resident import register, resident
from kvcompile.models.ties import untie
from kvcompile.runtime.parts import decoder_of
from kvcompile.runtime.token_inputs import ROWS, has_token_inputs

Renamed = dict[str, str] | None  # patterns of tensors' names, and what replaces them


def stream(
    folder: Path, config: Any, name: str, dtype: torch.dtype | None, device: torch.device, renamed: Renamed = None
) -> Any:
    """The causal LM of a folder, of which no more than norms and the like is in memory.

    `dtype` defaults to the checkpoint's own; `renamed` says how tensors' names in it differ from the model's.
    Raises ModelError for a checkpoint that cannot be read or lacks a tensor.
    """
    give_back()
    checkpoint = Checkpoint(folder, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype or config.dtype or checkpoint.dtype,
            attn_implementation=attention_of(config.get_text_config()),
            trust_remote_code=False,
        )
    model.eval().requires_grad_(False)
    loader = Loader(model, checkpoint, device, renamed)
    _make_buffers(model, device)
    parts = [model.get_input_embeddings(), *decoder_of(model).layers, model.get_output_embeddings()]
    if has_token_inputs(model):  # a table of several gigabytes, of which a sequence takes its tokens' rows
        table = decoder_of(model).embed_tokens_per_layer
        parts.append(table)
        setattr(table, ROWS, partial(rows, loader, table.weight))
    for part in parts:
        register(part, _Part(loader, _slots(part.modules())))
    _keep_embedding(model)
    streamed = {module for part in parts for module in part.modules()}
    _Part(loader, _slots(module for module in model.modules() if module not in streamed)).bring()
    register_sampler(model, partial(sample, loader))
    return model


@dataclass(frozen=True)
class _Slot:
    """A place for a parameter."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter

    def set(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter


def _slots(modules: Iterable[nn.Module]) -> list[_Slot]:
    """Every place of some modules that has a parameter."""
    return [_Slot(m, name) for m in modules for name, parameter in m._parameters.items() if parameter is not None]


class Loader:
    """Puts tensors of a checkpoint into a model, under transformers' names and joined as transformers joins them."""

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device, renamed: Renamed) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.mapping = get_model_conversion_mapping(model, renamed)
        self.sources, self.joined = self._assign()
        untie(model, checkpoint, self.stored)
        # Parameters without numbers, by what they are: tied ones have several names.
        self.empty = dict(model.named_parameters(remove_duplicate=False))
        self.slots = {key: _Slot(*_place(model, key)) for key in self.empty}
        self.names: dict[int, list[str]] = {}
        for key, parameter in self.empty.items():
            self.names.setdefault(id(parameter), []).append(key)
        self._check()

    def stored(self, name: str) -> str | None:
        """The tensor of the checkpoint that a parameter is, by its name; None where there is none, or it is made of
        several or of parts."""
        several = self.sources.get(name, ())
        return several[0] if len(several) == 1 and name not in self.joined else None

    def _assign(self) -> tuple[dict[str, list[str]], set[str]]:
        """Of every parameter's name the tensors of the checkpoint that it is made of; and the names of those that are
        made of several, or of parts."""
        renamings = [one for one in self.mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in self.mapping if isinstance(one, WeightConverter)]
        prefix, empty = self.model.base_model_prefix, self.model.state_dict()
        sources: dict[str, list[str]] = {}
        joined: set[str] = set()
        for key in self.checkpoint.tensors:
            target, pattern = rename_source_key(key, renamings, converters, prefix, empty)
            if target not in empty and key in empty:
                target, pattern = rename_source_key(key, [], [], prefix, empty)
            sources.setdefault(target, []).append(key)
            if pattern is not None:
                joined.add(target)
        return sources, joined

    def _check(self) -> None:
        """Refuse a checkpoint that lacks tensors; what is split or joined shows when it is loaded."""
        if self.joined:
            return
        missing = sorted(names[0] for names in self.names.values() if not any(name in self.sources for name in names))
        if missing:
            raise ModelError(lacking(self.checkpoint.name, missing))
        for target, keys in self.sources.items():
            if target in self.empty and self.checkpoint.tensors[keys[0]].shape != tuple(self.empty[target].shape):
                stored, wanted = self.checkpoint.tensors[keys[0]].shape, tuple(self.empty[target].shape)
                raise ModelError(
                    f"{self.checkpoint.name} has {keys[0]} of shape {list(stored)}, expected {list(wanted)} by its "
                    "configuration"
                )

    def keys(self, empty: Iterable[nn.Parameter]) -> list[str]:
        """The tensors of the checkpoint that parameters are made of."""
        names = (name for parameter in empty for name in self.names[id(parameter)])
        return [key for name in names for key in self.sources.get(name, ())]

    def load(self, empty: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
        """Parameters with numbers in place of empty ones, by the identity of these."""
        wanted = list(empty)
        weights = {key: _Lazy(self.checkpoint, key) for key in self.keys(wanted)}
        options = LoadStateDictConfig(device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=self.mapping)
        with no_progress_bars():
            convert_and_load_state_dict_in_model(self.model, weights, options)
        found: dict[int, nn.Parameter] = {}
        for parameter in wanted:
            for name in self.names[id(parameter)]:
                loaded = self.slots[name].parameter
                if not loaded.is_meta:
                    loaded.requires_grad_(False)
                    found[id(parameter)] = loaded
                    self.slots[name].set(parameter)
        if missing := [self.names[id(p)][0] for p in wanted if id(p) not in found]:
            raise ModelError(lacking(self.checkpoint.name, sorted(missing)))
        return found


class _Part:
    """The weights of one part of a model."""

    def __init__(self, loader: Loader, slots: list[_Slot]) -> None:
        self.loader, self.slots = loader, slots
        self.empty = [slot.parameter for slot in slots]

    def bring(self) -> None:
        loaded = self.loader.load(self.empty)
        for slot, empty in zip(self.slots, self.empty, strict=True):
            slot.set(loaded[id(empty)])

    def release(self) -> None:
        for slot, empty in zip(self.slots, self.empty, strict=True):
            slot.set(empty)

    def ahead(self) -> None:
        self.loader.checkpoint.ahead(self.loader.keys(self.empty))


@dataclass(frozen=True)
class _Lazy:
    """A tensor of a checkpoint that is read when transformers asks for it."""

    checkpoint: Checkpoint
    key: str

    def __getitem__(self, _: Any) -> Tensor:
        return self.checkpoint.read(self.key)


def lacking(name: str, missing: list[str]) -> str:
    """The sentence for a checkpoint without some tensors."""
    return f"{name} is incomplete: its checkpoint lacks {len(missing)} tensors, the first of them {missing[0]}"


def _place(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def _keep_embedding(model: Any) -> None:
    """Have the embedding at hand as soon as the decoder is given tokens: Llama-4's moves them to where its weights are,
    before it calls it."""
    decoder = decoder_of(model)
    own, embedding = decoder.forward, model.get_input_embeddings()

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args or kwargs.get("input_ids") is not None
        with resident(embedding if given else None):
            return own(*args, **kwargs)

    decoder.forward = forward


def _make_buffers(model: Any, device: torch.device) -> None:
    """Compute what is computed and not stored: frequencies of rotary embedding, scales of embeddings."""
    for module in model.modules():
        empty = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        if empty:
            for name, buffer in empty.items():
                module._buffers[name] = torch.zeros_like(buffer, device=device)
            model._init_weights(module)
