"""What of a transformers decoder goes into the graph: weights, and the few ways in which families differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvcompile.artifacts import Artifact, ModelError

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Names in a configuration -> what `blocks.activated` knows."""


@dataclass(frozen=True)
class Linear:
    """A projection: `weight` [out, in], `bias` [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """A root mean square norm: `weight`, as it is multiplied with."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Mlp:
    """A gated one: `gate_up` [2 * width, in] as one projection or as two, the gate first."""

    gate_up: tuple[Linear, ...]
    down: Linear


@dataclass(frozen=True)
class Experts:
    """A mixture: the `chosen` best of the router's softmax, `normalised` to a sum of 1 or not."""

    router: Tensor
    experts: tuple[Mlp, ...]
    chosen: int
    normalised: bool


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding: `frequencies` [rotated / 2] and the `factor` on cosine and sine."""

    frequencies: Tensor
    factor: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer, KV heads in the model's own order. `after_attention` and `after_mlp` are norms on what is
    added to the residual stream."""

    before_attention: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float
    rotary: Rotary
    after_attention: Norm | None
    before_mlp: Norm
    mlp: Mlp | Experts
    after_mlp: Norm | None


@dataclass(frozen=True)
class Decoder:
    """A whole model: `embedding` [vocabulary, hidden_size], whose rows are multiplied by `embedding_factor`; the last
    `norm`; `head` [vocabulary, hidden_size]; logits are bent to within `softcap`, if there is one."""

    embedding: Tensor
    embedding_factor: float
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    activation: str
    softcap: float | None


def decoder(model: Any, artifact: Artifact) -> Decoder:
    """The parts of a transformers causal LM.

    Raises:
        ModelError: one of a family, or with a setting, that is not known here.
    """
    config = model.config.get_text_config()
    architecture = config.model_type
    if architecture not in ARCHITECTURES:
        raise ModelError(f"cannot write a {architecture!r} model as ONNX, expected one of {', '.join(ARCHITECTURES)}")
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name not in ACTIVATIONS:
        raise ModelError(f"cannot write the activation {name!r} as ONNX, expected one of {', '.join(ACTIVATIONS)}")
    body = model.get_decoder()
    head = model.get_output_embeddings()
    return Decoder(
        embedding=body.embed_tokens.weight,
        embedding_factor=float(getattr(body.embed_tokens, "embed_scale", getattr(config, "embedding_multiplier", 1.0))),
        layers=tuple(
            ARCHITECTURES[architecture](layer, _rotary(body.rotary_emb, config, i, artifact.target.context))
            for i, layer in enumerate(body.layers)
        ),
        norm=_norm(body.norm),
        head=_times(Linear(head.weight, head.bias), 1 / getattr(config, "logits_scaling", 1.0)),
        activation=ACTIVATIONS[name],
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _llama(layer: nn.Module, rotary: Rotary) -> Layer:
    """Llama, Mistral, Qwen2, Qwen3, and the mixtures of their kind."""
    attention: Any = layer.self_attn
    projections = [_linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return _layer(layer, rotary, projections, _mlp(layer.mlp))


def _phi3(layer: nn.Module, rotary: Rotary) -> Layer:
    """Phi-3: queries, keys and values in one projection, gate and up in another."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    config = attention.config
    sizes = [n * attention.head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    projections = [Linear(part) for part in attention.qkv_proj.weight.split(sizes)]
    return _layer(layer, rotary, projections, Mlp((_linear(mlp.gate_up_proj),), _linear(mlp.down_proj)))


def _gemma3(layer: nn.Module, rotary: Rotary) -> Layer:
    """Gemma 3: norms on what is added to the residual stream too."""
    return dataclasses.replace(
        _llama(layer, rotary),
        after_attention=_norm(layer.post_attention_layernorm),
        before_mlp=_norm(layer.pre_feedforward_layernorm),
        after_mlp=_norm(layer.post_feedforward_layernorm),
    )


def _granite(layer: nn.Module, rotary: Rotary) -> Layer:
    """Granite: a factor on what is added to the residual stream, which goes into the last projections."""
    found, factor = _llama(layer, rotary), float(layer.residual_multiplier)  # type: ignore[arg-type]
    assert isinstance(found.mlp, Mlp)
    mlp = dataclasses.replace(found.mlp, down=_times(found.mlp.down, factor))
    return dataclasses.replace(found, output=_times(found.output, factor), mlp=mlp)


def _smollm3(layer: nn.Module, rotary: Rotary) -> Layer:
    """SmolLM3: some layers have no rotary embedding, which is one that never turns."""
    attention: Any = layer.self_attn
    still = dataclasses.replace(rotary, frequencies=rotary.frequencies * 0, factor=1.0)
    return _llama(layer, rotary if attention.use_rope else still)


def _layer(layer: nn.Module, rotary: Rotary, projections: Sequence[Linear], mlp: Mlp | Experts) -> Layer:
    """A layer with norms before attention and MLP alone; `projections` are those of queries, keys and values."""
    attention: Any = layer.self_attn
    query, key, value = projections
    return Layer(
        before_attention=_norm(layer.input_layernorm),
        query=query,
        key=key,
        value=value,
        output=_linear(attention.o_proj),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        scale=attention.scaling,
        rotary=rotary,
        after_attention=None,
        before_mlp=_norm(layer.post_attention_layernorm),
        mlp=mlp,
        after_mlp=None,
    )


ARCHITECTURES: dict[str, Callable[[nn.Module, Rotary], Layer]] = {
    "gemma3_text": _gemma3,
    "granite": _granite,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "phi3": _phi3,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3_moe": _llama,
    "smollm3": _smollm3,
}


def _linear(module: Any) -> Linear:
    return Linear(module.weight, module.bias)


def _times(linear: Linear, factor: float) -> Linear:
    """The projection whose output is `factor` times as large."""
    if factor == 1:
        return linear
    return Linear(linear.weight * factor, None if linear.bias is None else linear.bias * factor)


def _norm(module: Any) -> Norm:
    if type(module).__name__.startswith("Gemma"):
        return Norm(module.weight.float() + 1, module.eps)  # as `Gemma3RMSNorm` multiplies
    return Norm(module.weight, module.variance_epsilon)


def _mlp(module: Any) -> Mlp | Experts:
    if not hasattr(module, "experts"):
        return Mlp((_linear(module.gate_proj), _linear(module.up_proj)), _linear(module.down_proj))
    experts = zip(module.experts.gate_up_proj, module.experts.down_proj, strict=True)
    return Experts(
        router=module.gate.weight,
        experts=tuple(Mlp((Linear(gate_up),), Linear(down)) for gate_up, down in experts),
        chosen=module.gate.top_k,
        normalised=getattr(module.gate, "norm_topk_prob", True),
    )


def _rotary(module: Any, config: Any, layer: int, context: int) -> Rotary:
    kind, prefix = module.rope_type, ""
    if isinstance(kind, dict):  # one embedding for each type of layer
        kind, prefix = kind[config.layer_types[layer]], f"{config.layer_types[layer]}_"
    if kind == "dynamic" or (kind == "longrope" and context > module.original_max_seq_len):
        raise ModelError(
            f"cannot write the {kind!r} rotary embedding for {context} tokens as ONNX, as it changes with the length "
            "of the text: build for a context within the model's original one"
        )
    return Rotary(getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}attention_scaling"))
