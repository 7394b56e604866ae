"""What an artifact says of a model's shape, read from its transformers configuration."""

from __future__ import annotations

from typing import Any

from kvcompile.artifacts.errors import ModelError

SHAPE = (
    "architecture", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim", "hidden_size", "windows", "states",
)  # fmt: skip
"""The fields of a model's identity that are its shape."""

LINEAR = "linear_attention"
"""The type of layers that have a state of fixed size in place of keys and values."""

SLIDING, FULL = "sliding_attention", "full_attention"

SHARING = frozenset({"gemma4_text"})
"""Families that have layers without keys and values of their own, or embeddings of the tokens for every layer."""

CHUNKED = "chunked_attention"
"""The type of layers in which a token sees the chunk of a sequence that it is in, as far as that goes, and nothing
before (Llama-4's)."""


def shape_of(config: Any, name: str) -> dict[str, Any]:
    """The fields `SHAPE` of a model's identity, by their names, from its transformers configuration.

    Raises ModelError for a model without the usual shape.
    """
    config = config.get_text_config()
    try:
        heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
        _check_heads(config, name)
        windows, states = _windows(config), _states(config)
        kv_heads, head_dim = planned_heads(config)
    except AttributeError as error:
        raise ModelError(f"{name} is a {config.model_type} model, expected a decoder of attention layers") from error
    fields = (str(config.model_type), len(windows), heads, kv_heads, head_dim, hidden, windows, states)
    return dict(zip(SHAPE, fields, strict=True))


def kinds_of(config: Any) -> list[str]:
    """The type of every layer, by transformers' names for them."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return [SLIDING] * config.num_hidden_layers if kinds is None else list(kinds)


def heads_of(config: Any, layer: int) -> tuple[int, int]:
    """KV heads of a layer, and elements of a head."""
    config = config.get_text_config()
    one = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    kv_heads = getattr(one, "num_key_value_heads", None) or config.num_attention_heads
    return int(kv_heads), int(getattr(one, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def source_of(config: Any, layer: int) -> int:
    """The layer whose keys and values a layer attends to: its own, or, where it is one of the last layers of a model in
    which these have none, those of the last layer before them that is of its type."""
    return sources_of(config)[layer]


def sources_of(config: Any) -> list[int]:
    """`source_of` every layer."""
    config = config.get_text_config()
    count, sharing = int(config.num_hidden_layers), int(getattr(config, "num_kv_shared_layers", None) or 0)
    found, first = list(range(count)), count - sharing
    if sharing:
        kinds = kinds_of(config)
        found[first:] = [first - 1 - kinds[:first][::-1].index(kind) for kind in kinds[first:]]
    return found


def is_planned(config: Any, layer: int) -> bool:
    """Whether a plan has rows for the heads of a layer. It has none for layers of linear attention, for sliding ones
    whose heads are not in number and size those of the layers of full attention (Gemma-4), and for those that attend to
    the keys and values of another layer."""
    if source_of(config, layer) != layer:
        return False
    config, kinds = config.get_text_config(), kinds_of(config)
    if kinds[layer] in (FULL, LINEAR) or FULL not in kinds or not getattr(config, "is_heterogeneous", False):
        return kinds[layer] != LINEAR
    return heads_of(config, layer) == heads_of(config, kinds.index(FULL))


def which_planned(config: Any) -> list[bool]:
    """By layer, whether a plan has rows for its heads."""
    return [is_planned(config, layer) for layer in range(len(kinds_of(config)))]


def planned_heads(config: Any) -> tuple[int, int]:
    """KV heads of every layer that a plan has rows for, and elements of a head."""
    planned = which_planned(config)
    return heads_of(config, planned.index(True) if any(planned) else 0)


def _windows(config: Any) -> tuple[int, ...]:
    """The sliding window of each layer that a plan is for, or the chunk of one of chunked attention, 0 for full
    attention, read from the config as transformers' own caches read it."""
    widths = {FULL: 0, SLIDING: int(getattr(config, "sliding_window", None) or 0)}
    if config.model_type == "llama4_text":
        widths[CHUNKED] = int(config.attention_chunk_size or 0)
    kinds = kinds_of(config)
    for kind in kinds:
        if kind not in widths and kind != LINEAR:
            raise ModelError(f"the model has a layer of type {kind}, expected {FULL}, {SLIDING} or {LINEAR}")
    return tuple(widths[kind] for kind, planned in zip(kinds, which_planned(config), strict=True) if planned)


def _states(config: Any) -> tuple[int, int]:
    """Elements that one sequence takes in layers that a plan is not for: in the cache dtype, states of convolutions and
    keys and values of sliding windows; and in float32, states of the gated delta rule (arXiv 2412.06464)."""
    kinds, planned = kinds_of(config), which_planned(config)
    own = [kind == SLIDING and source_of(config, i) == i for i, kind in enumerate(kinds)]
    windows = [heads_of(config, i) for i in range(len(kinds)) if own[i] and not planned[i]]
    if windows:
        return 2 * int(config.sliding_window) * sum(heads * size for heads, size in windows), 0
    count = kinds.count(LINEAR)
    if not count:
        return 0, 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return (
        count * (2 * keys + values) * config.linear_conv_kernel_dim,
        count * values * config.linear_key_head_dim,
    )


def _check_heads(config: Any, name: str) -> None:
    """Refuse what one number and one size of heads, with keys and values of their own, cannot describe.

    Raises ModelError."""
    sizes = sorted({heads_of(config, layer) for layer, planned in enumerate(which_planned(config)) if planned})
    known = config.model_type in SHARING
    if getattr(config, "num_kv_shared_layers", None) and not known:
        found = "layers that share keys and values"
    elif getattr(config, "hidden_size_per_layer_input", None) and not known:
        found = "embeddings of the tokens for every layer"
    elif len(sizes) > 1:
        shapes = " and ".join(f"{heads} of {size}" for heads, size in sizes)
        found = f"layers of full attention with different heads ({shapes})"
    else:
        return
    raise ModelError(f"{name} is a {config.model_type} model, which has {found}: a plan by head cannot describe them")
