"""What is measured: models with random weights, and plans with really ragged budgets for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvcompile.artifacts import (
    DTYPE_BITS,
    POLICIES,
    Artifact,
    Budgets,
    ByteAccount,
    KvcompileError,
    ModelIdentity,
    Quantiser,
    Scorer,
    Target,
    full_bytes,
    loaded_bytes,
    resident_bytes,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rope_theta": 5e5,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_theta": 1e5, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Shapes as in the `config.json` of each model on the hub."""

BITS = {"16": [(16, 16)], "8": [(8, 8)], "4": [(4, 4)], "mixed": [(16, 16), (8, 8), (8, 4), (4, 4)],
        "mix3": [(67, 3)], "mix2": [(66, 2)]}  # fmt: skip
"""Ids of the codecs of keys and values that the heads of a plan have in turn."""
SPREAD = 0.8
"""Standard deviation of the logarithm of a head's budget. The budgets that `build` finds spread by 0.7 to 1.2."""


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of a known shape with random weights: speed does not depend on them.

    Raises:
        KvcompileError: a shape that is not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**_config(name))
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def shape_of(name: str) -> ModelIdentity:
    """The shape of a model in `CONFIGS` without the model, for plans whose layers are measured alone.

    Raises:
        KvcompileError: a shape that is not known.
    """
    config = _config(name)
    heads = config["num_attention_heads"]
    return ModelIdentity(
        name=name, architecture=config["model_type"], num_layers=config["num_hidden_layers"],
        num_attention_heads=heads, num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads, hidden_size=config["hidden_size"],
        windows=(0,) * config["num_hidden_layers"], dtype="bfloat16", fingerprint="0" * 64,
        samples=np.zeros(0, np.float32),
    )  # fmt: skip


def _config(name: str) -> dict[str, Any]:
    if name not in CONFIGS:
        raise KvcompileError(f"there is no shape {name!r} for random weights: expected one of {', '.join(CONFIGS)}")
    return CONFIGS[name]


def ragged_plan(
    model: ModelIdentity, context: int, batch: int, share: float, dtype: str, kind: str, *, uniform: bool = False
) -> Artifact:
    """A plan for `share` of the full cache's bytes with budgets drawn from a seed, bits of a `kind` of `BITS`, heads of
    policy `scored` and a random scorer; `uniform` gives all heads the same number of tokens."""
    rng = np.random.default_rng(0)
    shape = (model.num_layers, model.num_kv_heads)
    pairs = [BITS[kind][i % len(BITS[kind])] for i in range(shape[0] * shape[1])]
    own = DTYPE_BITS[dtype]
    bits = np.array([[own if b == 16 else b for b in pair] for pair in pairs], np.uint8).reshape(*shape, 2)
    weight = np.ones(shape) if uniform else rng.lognormal(sigma=SPREAD, size=shape)
    target = int(share * batch * full_bytes(model, context, dtype))
    low, high = 0.0, 64.0 * context
    for _ in range(60):  # the largest factor that fits
        middle = (low + high) / 2
        size = batch * resident_bytes(_budgets(middle * weight, context, bits), model.head_dim, DTYPE_BITS[dtype])
        low, high = (middle, high) if size <= target else (low, middle)
    budgets = _budgets(low * weight, context, bits)
    scorer = Scorer(
        rng.standard_normal((*shape, model.hidden_size)).astype(np.float16), np.zeros(shape, np.float32)
    )  # fmt: skip
    quantiser = None
    if kind != "16":
        transform = np.tile(np.eye(model.head_dim, dtype=np.float16), (*shape, 1, 1))
        mean = np.zeros((*shape, model.head_dim), np.float16)
        quantiser = Quantiser(transform, mean, transform.copy(), mean.copy())
    resident = batch * resident_bytes(budgets, model.head_dim, DTYPE_BITS[dtype])
    transient = batch * 2 * context * model.num_kv_heads * model.head_dim * DTYPE_BITS[dtype] // 8
    full = batch * full_bytes(model, context, dtype)
    return Artifact(
        model=model, target=Target(target, context, batch, dtype),
        bytes=ByteAccount(resident, loaded_bytes(scorer, quantiser), transient, full), budgets=budgets,
        predicted_loss=float("nan"), solver={}, calibration={}, versions={}, profile=_rotary(model), scorer=scorer,
        quantiser=quantiser,
    )  # fmt: skip


def _rotary(model: ModelIdentity) -> dict[str, np.ndarray[Any, Any]]:
    """Of no rotation at all: values are fitted, which takes as long as with one."""
    frequency = np.zeros((model.num_layers, model.head_dim), np.float32)
    return {"rotary_frequency": frequency, "rotary_partner": np.arange(model.head_dim, dtype=np.int32)}


def _budgets(tokens: np.ndarray[Any, Any], context: int, bits: np.ndarray[Any, Any]) -> Budgets:
    capacity = np.clip(tokens, 128, context).astype(np.int32)
    order = np.stack([np.lexsort((-row, b[:, 1], b[:, 0])) for row, b in zip(capacity, bits, strict=True)])
    constant = np.full_like(capacity, 4)
    return Budgets(
        policy=np.full(capacity.shape, POLICIES.index("scored"), np.uint8), capacity=capacity, sink=constant,
        recent=np.minimum(64, capacity - 4), k_bits=bits[..., 0].copy(), v_bits=bits[..., 1].copy(),
        head_order=order.astype(np.int32),
    )  # fmt: skip


def fill_randomly(cache: Any, tokens: int) -> None:
    """Make a ragged cache look as after `tokens` tokens a sequence, with random contents."""
    for layer in cache.ragged:
        for tensor in layer.store.tensors():
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256)
            else:
                tensor.normal_().clamp_(-2, 2)
        for stored in (layer.store.keys, layer.store.values):
            stored.scales.fill_(0.01)
        layer.advance(tokens)
    for layer in cache.layers:
        if hasattr(layer, "has_previous_state"):  # of linear attention, whose state is as good as any other
            layer.has_previous_state[0] = True
