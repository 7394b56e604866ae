"""Answers to a prompt: inside an artifact's budget, and with the full cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcompile.artifacts import Artifact
from kvcompile.cli.streamer import TimedStreamer
from kvcompile.models import ending_tokens
from kvcompile.runtime import Sampling, attach, generate, generate_full

WARM_TOKENS = 8
"""Of the prompt, read to have the kernels compiled."""


@dataclass(frozen=True)
class Answer:
    """`tokens` are the new ones, with the one that ended the answer; `cache_bytes` is what the cache holds at the end,
    of all ranks together, and `rank_bytes` what each of several does; `tokens_per_second` counts from the first new
    token on."""

    tokens: tuple[int, ...]
    text: str
    prefill_seconds: float
    tokens_per_second: float
    cache_bytes: int
    rank_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A prompt's token ids, int64 [1, n] on the host, and how to answer: at most `longest` new tokens; sampled answers
    to one `seed` are the same, with either cache. Inside a budget the prompt is read `prefill_chunk` tokens at a time,
    and cut every `prefill_cut_every` tokens (None: after the last one).
    """

    ids: torch.Tensor
    longest: int
    sampling: Sampling
    seed: int
    prefill_chunk: int
    prefill_cut_every: int | None = None


def prompt_ids(tokenizer: Any, text: str, raw: bool) -> torch.Tensor:
    """Token ids int64 [1, n] of a text: a user's message if the model has a chat template, unless `raw`."""
    if raw or not tokenizer.chat_template:
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
        return ids
    message = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def with_budget(loaded: Any, plan: Artifact, asked: Asked, silent: bool, timed: bool = False) -> Answer:
    """Generate inside the artifact's budget, streaming to stdout unless `silent`; afterwards the model is as before.

    `timed` is for speeds that are compared: kernels compiled when they are first called are called once before.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    with attach(model, plan) as kv:
        if timed:
            generate(model, kv.new_cache(), asked.ids[:, :WARM_TOKENS].to(model.device), max_new_tokens=2)
        torch.manual_seed(asked.seed)
        cache = kv.new_cache()
        streamer = TimedStreamer(tokenizer, silent)
        streamer.put(asked.ids)
        new = generate(
            model, cache, asked.ids.to(model.device), max_new_tokens=asked.longest, sampling=asked.sampling,
            eos=ending_tokens(model, tokenizer), on_token=streamer.put, prefill_chunk=asked.prefill_chunk,
            prefill_cut_every=asked.prefill_cut_every,
        )  # fmt: skip
        streamer.end()
        held = kv.ranks.gather(cache.nbytes)
        answer = _answer(tokenizer, new[0].tolist(), streamer, sum(held))
        return replace(answer, rank_bytes=tuple(held)) if kv.ranks.size > 1 else answer


def with_full_cache(loaded: Any, asked: Asked, cache_dtype: torch.dtype) -> Answer:
    """Generate with transformers' `DynamicCache`, which keeps all it is given.

    `cache_bytes` counts its elements in `cache_dtype`, the artifact's: where the processor has no fast 16-bit
    arithmetic the model computes in float32, and its cache then takes twice that.
    """
    from transformers import DynamicCache

    model, tokenizer = loaded.model, loaded.tokenizer
    torch.manual_seed(asked.seed)
    cache = DynamicCache(config=model.config)
    streamer = TimedStreamer(tokenizer, silent=True)
    streamer.put(asked.ids)
    new = generate_full(
        model, cache, asked.ids, max_new_tokens=asked.longest, sampling=asked.sampling,
        eos=ending_tokens(model, tokenizer), on_token=streamer.put,
    )  # fmt: skip
    streamer.end()
    return _answer(tokenizer, new[0].tolist(), streamer, _cache_bytes(cache, cache_dtype))


def _cache_bytes(cache: Any, dtype: torch.dtype) -> int:
    """Bytes of transformers' cache with elements of `dtype`; states of linear attention as an artifact counts them."""
    total = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            total += (layer.keys.numel() + layer.values.numel()) * dtype.itemsize
        elif hasattr(layer, "conv_states"):
            total += layer.conv_states[0].numel() * dtype.itemsize + layer.recurrent_states[0].numel() * 4
    return total


def _answer(tokenizer: Any, new: list[int], streamer: TimedStreamer, cache_bytes: int) -> Answer:
    decoding = max(streamer.stop - streamer.first_token, 1e-9)
    return Answer(
        tokens=tuple(new),
        text=tokenizer.decode(new, skip_special_tokens=True),
        prefill_seconds=streamer.first_token - streamer.start,
        tokens_per_second=(len(new) - 1) / decoding,
        cache_bytes=cache_bytes,
    )
