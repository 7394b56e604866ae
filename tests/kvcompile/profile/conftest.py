"""Tiny random models of every family, float32, seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Ten times the usual: at 0.02 a tiny model hardly attends.
    "initializer_range": 0.2,
}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

HYBRID = {
    "num_hidden_layers": 5,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}

GEMMA4 = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "sliding_window": 16,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "llama4_text": {
        "head_dim": 16,
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 2048,
        "floor_scale": 20,
        "attn_scale": 0.5,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 4,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "attn_logit_softcapping": 0.8,
        "final_logit_softcapping": 2.0,
    },
    "gemma4_text": {
        **GEMMA4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 2.0,
    },
    "gemma4_text, shared": {
        **GEMMA4,
        "num_key_value_heads": 2,
        "attention_k_eq_v": False,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 61,
        "use_double_wide_mlp": True,
    },
    "gemma4_unified_text": {**GEMMA4, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": {},
    "olmo3": {"sliding_window": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "qwen3_next": {
        "head_dim": 16,
        **HYBRID,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_5_text": {"head_dim": 16, **HYBRID},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    def make(family: str = "llama", **changes: Any) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family.partition(",")[0], **{**SHAPE, **FAMILIES.get(family, {}), **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".sinks"):  # so that they take a part of the weight that shows
                parameter.data += 3 + torch.randn_like(parameter)
        return model

    return make
