"""The decode loop: one static step a token, on a GPU recorded once and replayed as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from kvcompile.artifacts import CacheError
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.sampling import Sampling

OnToken = Callable[[torch.Tensor], None]
"""Is given the next token of every sequence, int64 [B] on the host, as soon as it is there."""


class Decoder:
    """A model with a cache and the buffers of a step. A step reads the last token of every sequence, stores its keys
    and values in the cache and leaves the next one; all its memory is allocated before.

    The model is called as transformers calls it, so weights are whatever was loaded. The first step runs as it is,
    which also compiles the kernels; on a GPU the second is recorded, and from then on a step is one launch. Caches with
    heads of a policy that learns from attention (`h2o`) are never recorded.
    """

    def __init__(self, model: Any, cache: RaggedCache, sampling: Sampling | None = None) -> None:
        self.model = model
        self.cache = cache
        self.sampling = sampling or Sampling()
        self.device = model.device
        self.token = torch.empty(0, 1, dtype=torch.int64, device=self.device)
        """The last token of every sequence, [B, 1]."""
        self.position = torch.empty(0, 1, dtype=torch.int64, device=self.device)
        """Its number in its sequence, padding not counted, [B, 1]."""
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        policies = {cls.policy for layer in cache.layers for cls in layer.store.layout.classes}
        self.runs_ahead = self.device.type == "cuda"
        """Whether a step returns before it is done, so that the next can be started before its token is looked at."""
        self._records = self.runs_ahead and not any(POLICIES[name].observes for name in policies)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read prompts int64 [B, n], left-padded where `attention_mask` [B, n] is 0; the first new tokens, [B].

        On a cache that holds something already, `ids` is a follow-up.
        """
        batch = len(ids)
        before = self.cache.layers[0].store.seen if self.cache.get_seq_length() else [0] * batch
        if len(before) != batch:
            raise CacheError(f"{batch} prompts for a cache of {len(before)} sequences")
        real = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids)
        start = torch.tensor(before, device=ids.device)[:, None]
        positions = (real.cumsum(1) - 1).clamp(min=0) + start
        options: dict[str, Any] = {}
        if not bool(real.all()):
            options["attention_mask"] = real
        options |= {"position_ids": positions, "past_key_values": self.cache, "logits_to_keep": 1}
        logits = self.model(ids, **options).logits
        self.start(self.sampling.choose(logits[:, -1])[:, None], start + real.sum(1, keepdim=True))
        return self.token[:, 0].clone()

    def start(self, token: torch.Tensor, position: torch.Tensor | int) -> None:
        """Go on after `token` int64 [B, 1], which has the number `position` in its sequence and is not stored yet."""
        self.token = token.clone()
        self.position = torch.zeros_like(token) + position
        self._graph, self._steps = None, 0

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """One more token a sequence: the buffer [B] that the next step overwrites."""
        if self._graph is not None:
            self.cache.advance(1)
            self._graph.replay()
        elif self._records and self._steps == 1:
            self._record()
        else:
            self._step()
        self._steps += 1
        return self.token[:, 0]

    def _step(self) -> None:
        logits = self.model(self.token, position_ids=self.position, past_key_values=self.cache).logits
        self.token.copy_(self.sampling.choose(logits[:, -1])[:, None])
        self.position.add_(1)

    def _record(self) -> None:
        graph, before = torch.cuda.CUDAGraph(), self.cache.counts()
        try:
            with torch.cuda.graph(graph):
                self._step()  # counts on the host, and runs when it is replayed
        except RuntimeError as error:  # A model that asks the host in every step, as those with dynamic RoPE do.
            warnings.warn(f"decoding without CUDA graphs: {str(error).splitlines()[0]}", stacklevel=2)
            self._records = False
            self.cache.set_counts(before)
            self._step()
            return
        self._graph = graph
        graph.replay()


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
) -> torch.Tensor:
    """New tokens int64 [B, up to max_new_tokens] after prompts `ids` int64 [B, n], inside the cache's budget.

    A sequence ends with a token of `eos` and is filled up with `pad`; when all have ended, generation stops. Tokens are
    handed on and looked at while the next step is under way, so that no step waits for the host; one step more than
    needed may have been stored. Raises CacheError for prompts that do not fit the cache.
    """
    decoder = Decoder(model, cache, sampling)
    ended = torch.zeros(len(ids), dtype=torch.bool)
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
            ended |= torch.isin(now, torch.tensor(list(eos)))
        if last or bool(ended.all()):
            return torch.stack(found, dim=1)
        if not decoder.runs_ahead:
            tokens = decoder.step()


class _Fetched:
    """A copy of a few numbers on the host, which is waited for only when it is asked for."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        self._host.copy_(tokens, non_blocking=True)
        self._done = torch.cuda.Event() if tokens.is_cuda else None
        if self._done is not None:
            self._done.record()

    def get(self) -> torch.Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host
