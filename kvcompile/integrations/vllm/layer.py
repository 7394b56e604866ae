"""Attention layers of a model in vLLM whose keys and values lie in pages of compiled caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import _encode_layer_name

from kvcompile.integrations.vllm.batch import Piece, Waiting
from kvcompile.integrations.vllm.score import Scores
from kvcompile.integrations.vllm.spec import CompiledSpec
from kvcompile.kernels import Transform
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.pages import PageLayout
from kvcompile.runtime.rotation import Rotation
from kvcompile.runtime.store import LayerStore


@dataclass
class Served:
    """What all layers of a model share: the page of a sequence, the prompts that wait, and the states that are kept."""

    page: PageLayout
    waiting: Waiting
    whole_prompts: bool
    most_tokens: int
    """Of a sequence."""
    dtype: torch.dtype
    """Of the model."""
    states: torch.Tensor | None = None
    """Kept pages int8 [states, page bytes], in the host's memory."""


class CompiledAttention(Attention):
    """One layer. The model's first one has the page of a sequence as its spec; the others name it as the layer whose
    cache they share, and use their own part of the page."""

    def setup(
        self,
        served: Served,
        index: int,
        first: CompiledAttention,
        transform: Transform | None,
        rotation: Rotation | None,
        scores: Scores | None,
    ) -> None:
        """`index` is the layer's place in the page; `scores` is given where it has heads that keep scores."""
        self.served, self.index, self.transform, self.rotation = served, index, transform, rotation
        self.scores = scores
        # Buffers are what vLLM brings back when it wakes from a sleep in which it has let go of all weights.
        for what, part in (("transform", transform), ("rotation", rotation)):
            for name, tensor in vars(part).items() if part is not None else ():
                self.register_buffer(f"{what}_{name}", tensor, persistent=False)
        self.store: LayerStore | None = None
        self.prompts: dict[int, LayerPrompt] = {}
        if first is not self:
            self.kv_sharing_target_layer_name = first.layer_name
        self._room: torch.Tensor | None = None
        if not served.whole_prompts:  # now, so that vLLM counts it when it measures what is free
            shape = (served.waiting.slots, 2, 1, self.num_kv_heads, served.most_tokens, self.head_size)
            self._room = torch.zeros(shape, dtype=served.dtype, device=self._k_scale.device)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> CompiledSpec:
        block_size = vllm_config.cache_config.block_size
        return CompiledSpec.of(self.served.page.nbytes, block_size, self.served.whole_prompts)

    @property
    def kv_cache(self) -> torch.Tensor:
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, given: torch.Tensor) -> None:
        # vLLM frees pages by putting nothing in their place, as after a dry run: no view of them may stay.
        self._kv_cache = given
        self.store = None

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """`kv_cache` int8 [pages, 1, 1, page bytes]."""
        self.kv_cache = kv_cache
        self.store = self.served.page.store(self.index, kv_cache.flatten(1), self.transform, self.rotation)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """As vLLM's own: rows [T, heads * D] in and out. The attention is told to wait for the scores."""
        output = query.new_empty(len(query), self.num_heads, self.head_size, dtype=output_dtype or query.dtype)
        torch.ops.vllm.unified_attention_with_output(
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            output,
            _encode_layer_name(self.layer_name),
            kv_cache_dummy_dep=None if self.scores is None else self.scores.written(),
        )
        return output.flatten(1)

    def steps(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        score: torch.Tensor | None,
        places: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """One token a sequence: `query` [B, num_heads, D], `key` and `value` [B, num_kv_heads, D]; as `query`."""
        assert self.store is not None
        return self.store.steps(query, key, value, self.impl.scale, score, places, seen)

    def read(
        self, piece: Piece, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: torch.Tensor | None
    ) -> torch.Tensor:
        """The rows of a piece: `query` [T, num_heads, D], `key` and `value` [T, num_kv_heads, D], `score` [T,
        num_kv_heads]; [T, num_heads, D]."""
        out = torch.empty_like(query)
        n = piece.prompt
        if n:
            q, k, v = (t[:n].transpose(0, 1)[None] for t in (query, key, value))
            out[:n] = self._prompt(piece, q, k, v, None if score is None else score[None, :n])[0].transpose(0, 1)
        if n < len(query):  # answers once more, a token at a time, as they were stored the first time
            places = torch.tensor([piece.block], dtype=torch.int32, device=query.device)
            for t in range(n, len(query)):
                seen = torch.full_like(places, piece.before + t)
                now = slice(t, t + 1)
                scored = None if score is None else score[now]
                out[now] = self.steps(query[now], key[now], value[now], scored, places, seen)
        return out

    def _prompt(
        self, piece: Piece, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: torch.Tensor | None
    ) -> torch.Tensor:
        prompt, scale = self._waiting(piece), self.impl.scale
        if score is not None and piece.slot >= 0:
            score = score.clone()  # the next pass writes its scores to the same place
        origin = piece.before - prompt.filled
        if not origin:
            out = prompt.attend(query, key, value, scale, score)
        else:
            # What follows a kept state sees what is stored of it, and itself.
            seen = prompt.add(query, key, value, scale, score)
            out = self._one(piece.block, origin).look(query, *seen, scale)
        if piece.last:
            self.prompts.pop(piece.slot, None)
            self._keep(prompt, piece.block, origin)
        if piece.keep >= 0:
            assert self.served.states is not None
            own = self.served.page.part(self.index)
            self.served.states[piece.keep, own].copy_(self.kv_cache[piece.block].flatten()[own])
        return out

    def flush(self, slot: int, block: int, origin: int) -> None:
        """Store what has been read of a prompt that waits."""
        self._keep(self.prompts.pop(slot), block, origin)

    def _waiting(self, piece: Piece) -> LayerPrompt:
        assert self.store is not None
        if not piece.first:
            return self.prompts[piece.slot]
        room = None
        if piece.slot >= 0:
            assert self._room is not None
            room = (self._room[piece.slot, 0], self._room[piece.slot, 1])
        uses = self.store.uses_references(piece.length)
        prompt = LayerPrompt(self.store.layout, piece.length, None, room, keep_references=uses)
        if piece.slot >= 0:
            self.prompts[piece.slot] = prompt
        return prompt

    def _keep(self, prompt: LayerPrompt, block: int, origin: int) -> None:
        store = self._one(block, origin)
        if origin:
            keys, values = prompt.read
            store.put(keys, values, prompt.score)
        else:
            store.cut(prompt.ended())

    def _one(self, block: int, seen: int) -> LayerStore:
        assert self.store is not None
        return self.store.one(block, seen)


def layers_of(context: Mapping[str, Any]) -> list[CompiledAttention]:
    """The layers of a model, in order, from vLLM's table of them."""
    return [layer for layer in context.values() if isinstance(layer, CompiledAttention)]


def replace(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer into the model in the place of the one of this name; the module that it belongs to."""
    parent_name, attribute = name.rsplit(".", 1)
    parent = model.get_submodule(parent_name)
    setattr(parent, attribute, layer)
    return parent
