"""The decode loop: one static step a token, on a GPU recorded once and replayed as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from kvcompile.artifacts import CacheError
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.compiled import compile_cuts
from kvcompile.runtime.prefill import chunk_length, cut_length, read
from kvcompile.runtime.recording import Recording, on, recordable
from kvcompile.runtime.sampling import Sampling
from kvcompile.runtime.tensor_parallel import TensorParallel

OnToken = Callable[[torch.Tensor], None]
"""Is given the next token of every sequence, int64 [B] on the host, as soon as it is there."""


class Decoder:
    """A model with a cache and the buffers of a step. A step reads the last token of every sequence, stores its keys
    and values in the cache and leaves the next one; all its memory is allocated before. The token of a step is never
    padding.

    The model is called as transformers calls it, so weights are whatever was loaded. The first step runs as it is,
    which also compiles the kernels; on a GPU the second is recorded, and from then on a step is one launch. Buffers and
    graph stay with the cache, and serve the next decoder of the same model, batch and sampling. Caches with heads of a
    policy that learns from attention (`h2o`) are never recorded, nor are models on several devices. With tensor
    parallelism every rank calls the same; the tokens are those of the first.
    """

    def __init__(
        self,
        model: Any,
        cache: RaggedCache,
        sampling: Sampling | None = None,
        prefill_chunk: int | None = None,
        prefill_cut_every: int | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampling = sampling or Sampling()
        self.prefill_chunk = chunk_length(prefill_chunk)
        """Longer prompts are read in chunks of so many tokens."""
        self.prefill_cut_every = cut_length(prefill_cut_every)
        """After so many tokens of a prompt it is cut to the budget; None: after the last one alone."""
        self.device = model.device
        self.runs_ahead = self.device.type == "cuda"
        """Whether a step returns before it is done, so that the next can be started before its token is looked at."""
        self._ranks = TensorParallel.of(model)
        self._records = recordable(model, cache)
        self._recording: Recording | None = None

    @property
    def token(self) -> torch.Tensor:
        """The last token of every sequence, int64 [B, 1]."""
        return self._started().token

    @property
    def position(self) -> torch.Tensor:
        """Its number in its sequence, padding not counted, int64 [B, 1]."""
        return self._started().position

    @property
    def recorded(self) -> bool:
        """Whether a step is one CUDA graph by now."""
        return self._recording is not None and self._recording.graph is not None

    @torch.inference_mode()
    def prefill(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prefill_chunk: int | None = None,
        prefill_cut_every: int | None = None,
    ) -> torch.Tensor:
        """Read prompts int64 [B, n], left-padded where `attention_mask` [B, n] is 0; the first new tokens, [B]. On a
        cache that holds something already, `ids` is a follow-up.

        Prompts and follow-ups of more columns than `prefill_chunk` (None: the decoder's) are read layer by layer in
        such chunks, which bounds the memory that this takes (`prefill_bytes`) and changes nothing else. With
        `prefill_cut_every` (None: the decoder's) a prompt is cut to the budget after every so many columns, and what
        comes next sees only what was kept: no keys, values and hidden states grow with it then, but less of it is seen.
        Follow-ups of caches with heads of a policy that learns from attention (`h2o`) go through the model at once.

        Raises:
            CacheError: another number of prompts than the cache has sequences, padding after the first token, or chunks
                or pieces of less than one token.
        """
        before = self.cache.ragged[0].store.seen if self.cache.get_seq_length() else [0] * len(ids)
        chunk = self.prefill_chunk if prefill_chunk is None else chunk_length(prefill_chunk)
        every = self.prefill_cut_every if prefill_cut_every is None else cut_length(prefill_cut_every)
        if len(before) != len(ids):
            raise CacheError(f"{len(ids)} prompts for a cache of {len(before)} sequences")
        if len({layer.columns for layer in self.cache.ragged}) > 1:
            raise CacheError("the cache's last prompt or step was interrupted between two layers: call its reset()")
        real = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids)
        if ids.shape[1] < 1:
            raise CacheError("prompts of no tokens were given, expected 1 or more")
        if real.shape != ids.shape:
            found = f"a mask of shape {tuple(real.shape)} was given for prompts of shape {tuple(ids.shape)}"
            raise CacheError(f"{found}: a follow-up's mask covers its own tokens alone")
        if bool((real[:, 1:] < real[:, :-1]).any()):
            raise CacheError("prompts of unequal length have to be padded on the left")
        start = torch.tensor(before, device=ids.device)[:, None]
        with on(self.device):
            compile_cuts(self.cache, self.model.dtype)
            logits = read(self.model, self.cache, ids, real, start, chunk, every)
            self.start(self._choose(logits), start + real.sum(1, keepdim=True))
            return self.token[:, 0].clone()

    @torch.inference_mode()
    def start(self, token: torch.Tensor, position: torch.Tensor | int) -> None:
        """Go on after `token` int64 [B, 1], which has the number `position` in its sequence and is not stored yet."""
        step, setting = self.cache.recording, (self.model, self.cache, self.sampling, len(token))
        if step is None or not step.fits(*setting):
            step = Recording(*setting)
        step.token.copy_(token)
        step.position.copy_(torch.as_tensor(position, device=step.position.device))
        self._recording = self.cache.recording = step

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """One more token a sequence: the buffer [B] that the next step overwrites."""
        step = self._started()
        if self.cache.recording is not step or not step.attached(self.model):
            step.graph, self.cache.recording = None, step
            if not step.attached(self.model):
                step.fused = None  # the model's own step says what is wrong
        with on(self.device):
            # Kernels on a GPU know the plain softmax alone.
            if step.graph is None and self._records and step.steps and not step.failed and self.cache.plain:
                self._record(step)
            if step.graph is None:
                self._run()
            else:
                self.cache.ready()
                self.cache.advance(1)
                step.graph.replay()
        step.steps += 1
        return step.token[:, 0]

    def _started(self) -> Recording:
        if self._recording is None:
            raise CacheError("there is no token to go on from: call prefill() or start() before")
        return self._recording

    def _run(self) -> None:
        step = self._started()
        if step.fused is not None:
            logits = step.fused(step.token, step.position, self.cache)
        else:
            logits = self.model(step.token, position_ids=step.position, past_key_values=self.cache).logits[:, -1]
        step.token.copy_(self._choose(logits))
        step.position.add_(1)

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        return self._ranks.agreed(self.sampling.choose(logits)[:, None])

    def _record(self, step: Recording) -> None:
        try:
            step.record(self._run, self.cache)
        except RuntimeError as error:  # A model that asks the host in every step, as those with dynamic RoPE do.
            warnings.warn(f"decoding without CUDA graphs: {str(error).splitlines()[0]}", stacklevel=3)


@torch.inference_mode()
def generate(
    model: Any,
    cache: RaggedCache,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    pad: int = 0,
    on_token: OnToken | None = None,
    prefill_chunk: int | None = None,
    prefill_cut_every: int | None = None,
) -> torch.Tensor:
    """New tokens int64 [B, up to max_new_tokens] after prompts `ids` int64 [B, n], inside the cache's budget.

    Prompts longer than `prefill_chunk` are read in chunks of so many tokens (None: `PREFILL_CHUNK`), and cut to the
    budget after every `prefill_cut_every` tokens (None: after the last one alone); see `Decoder.prefill`.

    A sequence ends with a token of `eos` and is filled up with `pad`; when all have ended, generation stops. Tokens are
    handed on and looked at while the next step is under way, so that no step waits for the host; one step more than
    needed may have been stored. Raises CacheError for prompts that do not fit the cache.
    """
    if max_new_tokens < 1:
        raise CacheError(f"{max_new_tokens} new tokens were asked for, expected 1 or more")
    decoder = Decoder(model, cache, sampling, prefill_chunk, prefill_cut_every)
    ended = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
    found: list[torch.Tensor] = []
    tokens = decoder.prefill(ids, attention_mask)
    while True:
        fetched = _Fetched(tokens)
        last = len(found) + 1 == max_new_tokens
        if decoder.runs_ahead and not last:
            tokens = decoder.step()
        now = fetched.get().masked_fill(ended, pad)
        found.append(now)
        if on_token is not None:
            on_token(now)
        if eos:
            ended |= torch.isin(now, torch.tensor(list(eos), device="cpu"))
        if last or bool(ended.all()):
            return torch.stack(found, dim=1)
        if not decoder.runs_ahead:
            tokens = decoder.step()


class _Fetched:
    """A copy of a few numbers on the host, which is waited for only when it is asked for."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=tokens.is_cuda)
        self._host.copy_(tokens, non_blocking=True)
        self._done = torch.cuda.Event() if tokens.is_cuda else None
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(tokens.device))

    def get(self) -> torch.Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host
