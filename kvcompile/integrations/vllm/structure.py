"""The structure of the model that an engine serves: transformers' own, laid out without numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvcompile.artifacts import ModelError


def empty_model(config: Any) -> Any:
    """The transformers causal LM of a configuration (its text part) on the meta device; the configuration stays as it
    is. One for a quantised checkpoint gives the model before quantisation, whose names and shapes an artifact knows.

    Raises:
        ModelError: a configuration that transformers has no such model for.
    """
    plain = copy.deepcopy(config.get_text_config())
    vars(plain).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(plain, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # Configurations of other programs surface as errors of many kinds.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"transformers cannot lay out the {plain.model_type} model of the engine's configuration ({reason}): "
            "expected a text-only decoder that it knows"
        ) from None
