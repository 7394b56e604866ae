"""A decode step of a plain decoder in about ten launches a layer.

Queries, keys and values are one product, and so are gate and up; a norm comes with the residual sum before it, and all
that happens to a token between its projections and the store is one kernel. Sums are rounded where the model's own are,
so that logits agree with it up to the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from kvcompile.kernels import add_norm, new_token, ragged_decode, restore, silu_mul
from kvcompile.kernels.compiling import compiling
from kvcompile.kernels.dispatch import prefers_kernels
from kvcompile.kernels.new_token.api import in_triton
from kvcompile.kernels.new_token.parts import HeadNorms, LinearScorer
from kvcompile.runtime.binding import BINDING
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.counting import Lengths, count_step, one_more
from kvcompile.runtime.joined import Linear, joinable, joined
from kvcompile.runtime.layer import RaggedLayer
from kvcompile.runtime.parts import attention_modules
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.store import LayerStore

FAMILIES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"})
"""Whose layers are norm, attention, norm and a gated MLP with `silu`, and nothing else."""


@dataclass(frozen=True)
class LayerParts:
    """The tensors of one layer of a model; norms are weights [d]."""

    input_norm: torch.Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    scorer: LinearScorer | None
    scaling: float
    rotates: bool


class FusedStep:
    """One step of a model with an artifact attached, for caches of that attachment; see `fusable`."""

    def __init__(self, model: Any) -> None:
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self._epsilon = float(self._decoder.norm.variance_epsilon)
        self._layers = [_parts(layer) for layer in self._decoder.layers]
        self._places = _places(model)
        getattr(attention_modules(model)[0], BINDING).steps.add(self)

    def let_go(self) -> None:
        """Hold none of the model's weights any more; for an attachment that ends."""
        self._layers = []

    def fits(self, model: Any) -> bool:
        """Whether the model's weights still lie where they did."""
        return self._places == _places(model)

    def compile(self, cache: RaggedCache) -> None:
        """Compile the kernels of a step on this cache side by side, once for all caches like it; none changes."""
        norm, first = self._layers[0].input_norm, cache.ragged[0].store
        if not prefers_kernels(norm):
            return
        x, part = norm.new_empty(first.batch, len(norm)), norm.new_empty(first.batch, first.keys.head_dim)
        with compiling(first.layout, "step", first.batch) as needed:
            for parts, layer in zip(self._layers, cache.ragged, strict=True) if needed else ():
                if not in_triton(x, layer.store.layout, first.keys.head_dim):  # torch would write
                    continue
                for delta in (None, x):
                    add_norm(x, delta, parts.input_norm, self._epsilon)
                qkv = x.new_empty(first.batch, len(parts.qkv[0]))
                _met(parts, layer.store, qkv, x, part, part, layer.store.lengths())
                silu_mul(x.new_empty(first.batch, len(parts.gate_up[0])))

    def __call__(self, token: torch.Tensor, position: torch.Tensor, cache: RaggedCache) -> torch.Tensor:
        """Logits [B, vocabulary] after `token` int64 [B, 1], which has the number `position` int64 [B, 1] in its
        sequence; its keys and values are stored."""
        total, delta = self._decoder.embed_tokens(token)[:, 0], None
        cos, sin = (part[:, 0] for part in self._decoder.rotary_emb(total[:, None], position))
        still = torch.ones_like(cos), torch.zeros_like(sin)  # layers without rotary embedding, of SmolLM3
        # All layers count alike, so that one launch says what each will have, and one counts for all of them.
        stores = [layer.store for layer in cache.ragged]
        after = one_more(stores[0].lengths())
        for parts, layer in zip(self._layers, cache.ragged, strict=True):
            total, x = add_norm(total, delta, parts.input_norm, self._epsilon)
            attended = _attended(parts, layer, x, *((cos, sin) if parts.rotates else still), after)
            delta = linear(attended, *parts.output)
            total, x = add_norm(total, delta, parts.mlp_norm, self._epsilon)
            delta = linear(silu_mul(linear(x, *parts.gate_up)), *parts.down)
        count_step(stores)
        _, x = add_norm(total, delta, self._decoder.norm.weight, self._epsilon)
        logits: torch.Tensor = self._head(x)
        return logits


def fusable(model: Any, cache: RaggedCache) -> bool:
    """Whether `FusedStep` knows this model, nobody watches its modules, and every head of the cache has a policy that
    `append` places. Not with a cache of another attachment or on another device: the model's own step refuses it."""
    binding = getattr(attention_modules(model)[0], BINDING, None)
    if (
        binding is None
        or binding.attachment != cache.attachment
        or cache.ragged[0].store.keys.exact.device != model.device
    ):
        return False
    config = model.config.get_text_config()
    plain = (
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and _rotates_whole_heads(config)
        and type(model.get_output_embeddings()) is nn.Linear
    )
    policies = {cls.policy for layer in cache.ragged for cls in layer.store.layout.classes}
    if not plain or _watched(model) or any(POLICIES[name].observes for name in policies):
        return False
    return all(joinable(group) for layer in model.get_decoder().layers for group in _groups(layer))


def _rotates_whole_heads(config: Any) -> bool:
    named = getattr(config, "partial_rotary_factor", None), (config.rope_parameters or {}).get("partial_rotary_factor")
    return all(part in (None, 1.0) for part in named)


def _watched(model: Any) -> bool:
    """Whether anyone beside the attachment has hooks on a module, or has put another `forward` in its place, as
    `device_map` over several devices and tensor parallelism do: a step would not call them."""
    own = {layer.self_attn for layer in model.get_decoder().layers}
    return any(
        len(hooks) > (module in own) or "forward" in vars(module)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    )


def _places(model: Any) -> list[tuple[int, torch.dtype]]:
    return [(parameter.data_ptr(), parameter.dtype) for parameter in model.parameters()]


def _groups(layer: Any) -> list[list[nn.Module]]:
    """The linear layers of a decoder layer, those that have the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    names = [(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj")), (attention, ("o_proj",), ())]
    names += [(mlp, ("gate_up_proj",), ("gate_proj", "up_proj")), (mlp, ("down_proj",), ())]
    found = []
    for module, one, several in names:
        chosen = one if hasattr(module, one[0]) else several
        found.append([getattr(module, name) for name in chosen if hasattr(module, name)])
    return [group for group in found if group]


def _parts(layer: Any) -> LayerParts:
    attention = layer.self_attn
    qkv, output, gate_up, down = (joined(group) for group in _groups(layer))  # type: ignore[arg-type]
    norms = None
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm, attention.k_norm
        norms = HeadNorms(query.weight, key.weight, float(query.variance_epsilon))
    own = getattr(attention, BINDING).scorer
    scorer = None if own is None else LinearScorer(own.weight, own.bias)
    return LayerParts(
        layer.input_layernorm.weight, qkv, norms, output, layer.post_attention_layernorm.weight, gate_up, down, scorer,
        float(attention.scaling), bool(getattr(attention, "use_rope", True)),
    )  # fmt: skip


def _attended(
    parts: LayerParts, layer: RaggedLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, after: Lengths
) -> torch.Tensor:
    """Attention [B, Hq D] of the token whose normed hidden state is `x` [B, d], stored on the way. Sequences have
    `after` tokens then."""
    out = _met(parts, layer.store, linear(x, *parts.qkv), x, cos, sin, after)
    layer.columns += 1
    return out.flatten(1)


def _met(
    parts: LayerParts, store: LayerStore, qkv: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    after: Lengths,
) -> torch.Tensor:  # fmt: skip
    """Its attention [B, Hq, 1, D] from its projections [B, (Hq + 2 H) D] on."""
    stored = (store.keys, store.values)
    query = new_token(
        qkv, cos, sin, *stored, store.scores, store.layout, store.lengths(),
        transform=store.transform, norms=parts.head_norms, hidden=x, scorer=parts.scorer,
    )  # fmt: skip
    out = ragged_decode(query, *stored, store.layout, after, scaling=parts.scaling)
    return out if store.transform is None else restore(out, store.transform, store.layout)
