"""Where the parts of a transformers causal LM are."""

from __future__ import annotations

from typing import Any

from kvcompile.artifacts import is_planned, source_of, sources_of


def decoder_of(model: Any) -> Any:
    """The module that has the decoder layers, the last norm and the rotary embedding."""
    found = model.get_decoder()
    # Llama-4's causal LM names itself, as it looks for its decoder under the name it has in the model that sees too.
    return found.model if found is model else found


def attention_modules(model: Any) -> list[Any]:
    """The attention modules of the decoder layers that a plan is for, first to last."""
    return [layer.self_attn for layer in decoder_of(model).layers if planned(layer)]


def planned(layer: Any) -> bool:
    """Whether a plan has rows for the heads of a decoder layer (`kvcompile.artifacts.is_planned`)."""
    module = getattr(layer, "self_attn", None)
    return module is not None and is_planned(module.config, module.layer_idx)


def windowed(layer: Any) -> bool:
    """Whether a decoder layer has a sliding window of keys and values that a plan leaves alone."""
    return hasattr(layer, "self_attn") and not planned(layer) and not reuses(layer)


def reuses(layer: Any) -> bool:
    """Whether a decoder layer attends to the keys and values of an earlier one and has none of its own."""
    module = getattr(layer, "self_attn", None)
    return module is not None and source_of(module.config, module.layer_idx) != module.layer_idx


def sources(model: Any) -> list[int]:
    """By decoder layer, the number of the one whose keys and values it attends to (`kvcompile.artifacts.source_of`);
    its own where it is of linear attention."""
    return sources_of(model.config)


def attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states [B, n, d] that an attention module is called with, whichever way they are handed on."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
