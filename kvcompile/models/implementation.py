"""Which of transformers' implementations of attention a model is loaded with."""

from __future__ import annotations

from typing import Any


def attention_of(config: Any) -> str:
    """The attention that computes what the model of this text configuration is: `sdpa` knows neither capped logits nor
    learned sinks, and older versions of transformers leave caps out in silence."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss" else "sdpa"
