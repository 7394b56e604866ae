"""One layer's ragged store as a layer of a transformers cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from kvcompile.artifacts import CacheError
from kvcompile.kernels import LayerLayout, Softmax, Transform
from kvcompile.kernels.softmax import PLAIN
from kvcompile.runtime.exact import refuse_followers
from kvcompile.runtime.follow_up import FollowUp, FollowUpAtOnce
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.masks import real_tokens
from kvcompile.runtime.reuse import Reuse
from kvcompile.runtime.rotation import Rotation
from kvcompile.runtime.store import LayerStore


class RaggedLayer(CacheLayerMixin):
    """One layer's store. `update` hands the new keys and values on unchanged; `attend`, called by the model's attention
    function right after, is where they meet the stored ones. `window`: tokens that the model's own attention
    sees (0: all), also where the layout has none because the artifact's context is not longer."""

    supports_early_init = False

    def __init__(
        self,
        layout: LayerLayout,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        transform: Transform | None = None,
        rotation: Rotation | None = None,
        window: int = 0,
    ):
        super().__init__()
        self.is_sliding = layout.window > 0
        self._window = layout.window or window
        self.is_initialized = True
        self._make = partial(LayerStore, layout, head_dim, dtype, device, transform=transform, rotation=rotation)
        self.store = self.make_store(batch)
        self.score: torch.Tensor | None = None  # of the tokens of the forward pass under way, by the compiled scorer
        self.columns = 0  # of the attention mask: tokens so far, padding included
        self.prompt: LayerPrompt | FollowUp | None = None  # while one is read in chunks
        self.expected = False  # set by the attached model for the length of one forward pass
        self.reused = False  # whether later layers attend to these keys and values
        self._reuse = Reuse()

    def make_store(self, batch: int) -> LayerStore:
        """An empty one for so many sequences."""
        with torch.inference_mode(False):  # so that it can be written in any mode
            return self._make(batch=batch)

    @property
    def batch_size(self) -> int:
        return self.store.batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the store was allocated with the layer."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.expected:
            raise CacheError(
                "this cache works only with the model it was made for while that is attached: call attach() and "
                "take the cache from new_cache()"
            )
        return key_states, value_states

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        exact: Callable[[], torch.Tensor],
        softmax: Softmax = PLAIN,
    ) -> torch.Tensor:
        """Attention output [B, T, num_heads, D] for new tokens; `mask` bool [B, 1, T, T] covers them alone, `exact` is
        the model's own attention over them, for the prompt, and `softmax` how its logits become weights. One token on a
        filled cache is a step: it is never padding, and its mask is not read."""
        if query.device != (own := self.store.keys.exact.device):
            found = f"this cache is on {own} and the model now on {query.device}"
            raise CacheError(f"{found}: take another one from new_cache()")
        if not softmax.plain:
            refuse_followers(self.store.layout)
        self.store.softmax = softmax
        if self.prompt is not None:
            self.prompt.softmax = softmax
            return self.prompt.attend(query, keys, values, scaling, self.score).transpose(1, 2)
        self.end_reuse()
        first = self.columns == 0
        if not first and len(query) != self.store.batch:
            raise CacheError(f"the cache holds {self.store.batch} sequences and was called with {len(query)}")
        if not first and query.shape[2] == 1:
            # Without a look at the mask, which the host would have to wait for: a step's token is never padding.
            self.columns += 1
            self._reuse = Reuse(self.store.again if self.reused else None)
            return self.store.step(query, keys, values, scaling, self.score).transpose(1, 2)
        real = real_tokens(mask, len(query))
        self.columns += query.shape[2]
        if first:
            self._fit_batch(len(query))
            out = exact()
            self.store.prefill(query, keys, values, real, scaling, self.score)
            return out
        new = FollowUpAtOnce(self.store, query, keys, values, mask, real, scaling, self.score)
        out = new.attend()
        self._end(new)
        return out.transpose(1, 2)

    def _end(self, new: FollowUp | FollowUpAtOnce) -> None:
        """New tokens are stored, where later layers attend to them too when these have."""
        self._reuse = Reuse(new.again, new.end)
        if not self.reused:
            self.end_reuse()

    def attend_again(
        self, query: torch.Tensor, scaling: float, softmax: Softmax, exact: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Attention output [B, t, num_heads, D] of a later layer that attends to these keys and values, for the last t
        of the tokens that this layer has just seen; `exact` is the model's own over all of them, for the prompt."""
        if not softmax.plain:
            raise CacheError("keys and values of an earlier layer are attended to by a plain softmax alone")
        if self._reuse.again is None:
            return exact()
        own = query.to(self.store.keys.exact.device)  # layers may lie on several devices
        return self._reuse.again(own, scaling).transpose(1, 2).to(query.device)

    def end_reuse(self) -> None:
        """All later layers have attended to what is new."""
        reuse, self._reuse = self._reuse, Reuse()
        reuse.after()

    @contextmanager
    def reading(self, batch: int, columns: int, pad: torch.Tensor | None) -> Iterator[None]:
        """Within, `attend` is called with `columns` columns of prompts (on a filled cache: of follow-ups) chunk by
        chunk, and attends exactly to what has come so far; afterwards the policies choose what is kept. Sequence b is
        the columns from `pad[b]` int64 [B] on."""
        self.end_reuse()
        own = None if pad is None else pad.to(self.store.keys.exact.device)  # layers may lie on several devices
        if not self.columns:
            self._fit_batch(batch)
            uses = self.store.uses_references(columns)
            self.prompt = LayerPrompt(self.store.layout, columns, own, keep_references=uses, window=self._window)
        else:
            self.prompt = FollowUp(self.store, columns, own)
        try:
            yield
            if isinstance(self.prompt, LayerPrompt):
                self.store.cut(self.prompt)
                self._reuse = Reuse(self.prompt.again if self.reused else None)
            else:
                self._end(self.prompt)
            self.columns += columns
        finally:
            self.prompt = None

    def _fit_batch(self, batch: int) -> None:
        if batch != self.store.batch:  # an empty cache follows its first prompt: beam search multiplies the batch
            self.store = self.make_store(batch)

    def advance(self, tokens: int) -> None:
        """Count tokens that a recorded step has stored."""
        self.columns += tokens
        self.store.advance(tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover the new tokens alone: of the stored ones, the runtime knows itself which can be seen."""
        return int(query_length), self.columns

    def get_seq_length(self) -> int:
        return self.columns + (0 if self.prompt is None else self.prompt.filled)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.18

    def reset(self) -> None:
        self._reuse = Reuse()
        self.store.restart()
        self.columns = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.store.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.take(torch.arange(self.store.batch, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.store.take(torch.arange(self.store.batch, device="cpu")[indices.cpu()])

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CacheError("a ragged cache cannot be cropped, as evicted tokens are gone: fork it with copy.deepcopy")

    def offload(self) -> NoReturn:
        raise CacheError("a ragged cache cannot be offloaded: build for a smaller memory target instead")

    prefetch = offload
