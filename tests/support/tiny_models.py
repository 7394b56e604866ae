"""Tiny random models of every supported family, and artifacts for them with budgets of a test's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from kvcompile.artifacts import (
    DTYPE_BITS,
    POLICIES,
    Artifact,
    Budgets,
    ByteAccount,
    Quantiser,
    Scorer,
    Target,
    full_bytes,
    identify,
    loaded_bytes,
    resident_bytes,
    state_bytes,
    token_limits,
)

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip

YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 16,
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4,
    "initializer_range": 0.1,
}  # fmt: skip
"""Beside a layer of attention two of linear attention, with weights that do not make much of rounding."""
SHARED = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 8, "use_double_wide_mlp": True,
}  # fmt: skip
"""Of six layers the last four attend to the keys and values of the first two, one of either type."""
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def configs(shape: dict[str, Any], head_dim: int, expert_size: int) -> dict[str, PretrainedConfig]:
    """A configuration of every family, for models of this shape."""
    # Heads of sliding layers and of those of full attention, of Gemma-4.
    heads = {
        "num_key_value_heads": shape["num_attention_heads"], "head_dim": 8, "global_head_dim": head_dim,
        "num_global_key_value_heads": shape["num_key_value_heads"], "attention_k_eq_v": True, "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "final_logit_softcapping": 4.0,
    }  # fmt: skip
    found = {
        "llama": _config("LlamaConfig", **shape, attention_bias=True),
        "mistral": _config("MistralConfig", **shape, sliding_window=None),
        "mistral, sliding": _config("MistralConfig", **shape, sliding_window=24),
        "qwen2": _config("Qwen2Config", **shape),
        "qwen3": _config("Qwen3Config", **shape, head_dim=head_dim),
        "phi3": _config("Phi3Config", **shape, sliding_window=None),
        "gemma3": _config(
            "Gemma3TextConfig",
            **shape, head_dim=head_dim, sliding_window=24, query_pre_attn_scalar=head_dim,
            layer_types=ALTERNATING,
        ),
        "llama4": _config(
            "Llama4TextConfig",
            **shape, head_dim=head_dim, no_rope_layers=[1, 0, 1], attention_chunk_size=400, num_local_experts=4,
            interleave_moe_layer_step=2, intermediate_size_mlp=expert_size,
        ),
        "mixtral": _config("MixtralConfig", **shape, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        "qwen3-moe": _config(
            "Qwen3MoeConfig",
            **shape, head_dim=head_dim, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=expert_size
        ),
        "granite": _config(
            "GraniteConfig",
            **shape, embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=2.0
        ),
        "gemma2": _config(
            "Gemma2Config",
            **shape, head_dim=head_dim, sliding_window=24, query_pre_attn_scalar=head_dim, layer_types=ALTERNATING,
            attn_logit_softcapping=0.8,
        ),
        "gemma4": _config(
            "Gemma4TextConfig",
            **shape | heads, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
            moe_intermediate_size=expert_size,
        ),
        "gemma4-shared": _config(
            "Gemma4TextConfig",
            **shape | heads | SHARED | {"num_key_value_heads": shape["num_key_value_heads"], "attention_k_eq_v": False},
            vocab_size_per_layer_input=shape["vocab_size"],
        ),
        "gemma4-unified": _config("Gemma4UnifiedTextConfig", **shape | heads),
        "gpt-oss": _config(
            "GptOssConfig",
            **shape, head_dim=head_dim, sliding_window=24, layer_types=ALTERNATING, num_local_experts=4,
            num_experts_per_tok=2, rope_parameters=YARN,
        ),
        "olmo2": _config("Olmo2Config", **shape),
        "olmo3": _config("Olmo3Config", **shape, sliding_window=24, layer_types=ALTERNATING),
        "qwen3-next": _config(
            "Qwen3NextConfig",
            **shape | HYBRID, head_dim=head_dim, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=expert_size, shared_expert_intermediate_size=expert_size,
        ),
        "qwen3.5": _config("Qwen3_5TextConfig", **shape | HYBRID, head_dim=head_dim),
        "qwen3.5-moe": _config(
            "Qwen3_5MoeTextConfig",
            **shape | HYBRID, head_dim=head_dim, num_experts=4, num_experts_per_tok=4,
            moe_intermediate_size=expert_size, shared_expert_intermediate_size=expert_size,
        ),
        "smollm3": _config("SmolLM3Config", **shape, no_rope_layers=[1, 0, 1]),
    }  # fmt: skip
    return {family: config for family, config in found.items() if config is not None}


def _config(name: str, **options: Any) -> PretrainedConfig | None:
    """None where transformers lacks the family, as the older one does that kvpress pins."""
    cls = getattr(transformers, name, None)
    return None if cls is None else cls(**options)


CONFIGS = configs(SHAPE, 16, 32) | {
    "multi-head": LlamaConfig(**{**SHAPE, "num_key_value_heads": 6}),
    "multi-query": LlamaConfig(**{**SHAPE, "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56}),
}


WITHOUT_H2O = ("gemma2", "gpt_oss")
"""Families whose attention heads of policy `h2o` cannot follow."""


def tiny_model(config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, those among them that are usually made alike: biases and norms of attention."""
    torch.manual_seed(0)
    # transformers 5.17 would take `sdpa` for Gemma-2, which leaves out the caps.
    own = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=own).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ".self_attn." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_artifact(
    model: PreTrainedModel,
    capacity: int | Sequence[Sequence[int]] | None = None,
    *,
    policy: str = "recent",
    sink: int = 2,
    recent: int | None = None,
    context: int = 128,
    batch: int = 1,
    dtype: str = "float32",
    shuffle: bool = True,
    bits: Sequence[tuple[int, int]] = (),
) -> Artifact:
    """An artifact for `model`: `capacity` tokens a head (one number, rows of [L][H], or None for the full cache) under
    `policy`, of which the last `recent` are a ring; sliding layers keep their window; heads shuffled in storage. The
    widths of keys and values are `bits` in turn over the heads, by default the cache's own; the scorer and the
    transforms are random."""
    identity = identify(model, "tiny")
    shape = (identity.num_layers, identity.num_kv_heads)
    limit = np.array(token_limits(identity.windows, context), np.int32)[:, None]
    tokens = np.minimum(np.broadcast_to(limit if capacity is None else np.asarray(capacity, np.int32), shape), limit)
    sliding = np.broadcast_to((limit < context), shape)
    tokens = np.where(sliding, limit, tokens).astype(np.int32)
    codes = np.where(tokens == limit, POLICIES.index("full"), POLICIES.index(policy))
    codes = np.where(sliding, POLICIES.index("recent"), codes).astype(np.uint8)
    sinks = np.where(sliding, 0, np.minimum(sink, tokens - 1)).astype(np.int32)
    ring = tokens - sinks
    if recent is not None:
        ring = np.where(codes == POLICIES.index(policy), np.minimum(recent, ring), ring)
    rng = np.random.default_rng(0)
    orders = []
    for row in range(shape[0]):
        heads = rng.permutation(shape[1]) if shuffle else np.arange(shape[1])
        orders.append(sorted(heads.tolist(), key=lambda h, row=row: (codes[row, h], -tokens[row, h])))
    widths = np.array([bits[i % len(bits)] if bits else [DTYPE_BITS[dtype]] * 2 for i in range(tokens.size)])
    k_bits, v_bits = widths.astype(np.uint8).reshape(*shape, 2).transpose(2, 0, 1)
    budgets = Budgets(
        policy=codes, capacity=tokens, sink=sinks, recent=ring.astype(np.int32), k_bits=k_bits.copy(),
        v_bits=v_bits.copy(), head_order=np.array(orders, np.int32),
    )  # fmt: skip
    scorer = None
    if policy == "scored":
        weight = rng.standard_normal((*shape, identity.hidden_size)).astype(np.float16)
        scorer = Scorer(weight, rng.standard_normal(shape).astype(np.float32))
    quantiser = None
    if bits:
        turn = np.linalg.qr(rng.standard_normal((2, *shape, identity.head_dim, identity.head_dim)))[0]
        turn = (turn * rng.uniform(0.5, 2, turn.shape[-1])).astype(np.float16)
        mean = rng.standard_normal((2, *shape, identity.head_dim)).astype(np.float16)
        quantiser = Quantiser(turn[0], mean[0], turn[1], mean[1])
    held = resident_bytes(budgets, identity.head_dim, DTYPE_BITS[dtype])
    resident = batch * (held + state_bytes(identity, dtype))
    transient = 2 * context * identity.num_kv_heads * identity.head_dim * DTYPE_BITS[dtype] // 8 * batch
    return Artifact(
        model=identity,
        target=Target(bytes=resident, context=context, batch=batch, dtype=dtype),
        bytes=ByteAccount(
            resident, loaded_bytes(scorer, quantiser), transient, batch * full_bytes(identity, context, dtype)
        ),
        budgets=budgets,
        predicted_loss=0.0,
        solver={},
        calibration={},
        versions={},
        profile={},
        scorer=scorer,
        quantiser=quantiser,
    )
