"""The ragged KV store of one layer: prefill, one-token steps, and several tokens on a filled store. Plain torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from kvcompile.kernels import Buffers, LayerLayout, Transform, append, compact
from kvcompile.kernels.buffers import Make
from kvcompile.kernels.dispatch import without_autocast
from kvcompile.kernels.softmax import PLAIN
from kvcompile.runtime import in_one, new_tokens
from kvcompile.runtime.counting import Lengths, count_step
from kvcompile.runtime.cut import kept_of
from kvcompile.runtime.cut import kept_tokens as kept_tokens
from kvcompile.runtime.fitted import fit_values
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.references import referred_heads, uses_references
from kvcompile.runtime.rotation import Rotation
from kvcompile.runtime.weighed import weighed


class LayerStore:
    """K and V of one layer for a batch, heads end to end in storage order, every head with its fixed capacity
    and codec. All memory is allocated here, once; nothing grows afterwards.

    `seen` counts the tokens that each sequence has brought so far, without padding. `transform` is for the quantised
    heads. Where the layer has heads of policy `scored`, every call is given `score` f32 [B, T, H], the compiled
    scorer's word on each token. `make` allocates where it is given (see `Buffers`). `rotation` is the layer's rotary
    embedding, which reference queries take (`runtime.references`); None: there are none.
    """

    def __init__(
        self,
        layout: LayerLayout,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        transform: Transform | None = None,
        make: Make | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self.layout = layout
        self.batch = batch
        self.transform = transform
        self.rotation = rotation
        self.keys = Buffers(layout, [c.k_bits for c in layout.classes], head_dim, dtype, device, batch, make)
        self.values = Buffers(layout, [c.v_bits for c in layout.classes], head_dim, dtype, device, batch, make)
        if make is None:
            self.scores = torch.zeros(batch, layout.scored_slots, dtype=torch.float16, device=device)
        else:
            self.scores = make(batch, layout.scored_slots, 1, torch.float16).flatten(1)
        self._own = [POLICIES[cls.policy].new_state(batch, cls, device) for cls in layout.classes]
        self.softmax = PLAIN
        """How the layer's logits become weights; whoever attends says so before."""
        self.seen = [0] * batch
        self.counts: torch.Tensor | None = None
        """`seen` on a GPU, int32 [batch], where it stays: steps that were recorded read and write it there."""
        self._stale = True

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that the store holds."""
        yield from self.keys.tensors()
        yield from self.values.tensors()
        if self.scores.numel():
            yield self.scores
        for tensors in self._own:
            yield from tensors

    @property
    def state(self) -> list[list[torch.Tensor]]:
        """What the policy of every class remembers, [B, count, capacity] each; scores are views."""
        found = []
        for cls, own in zip(self.layout.classes, self._own, strict=True):
            first = self.layout.rows[cls.start].score
            if first >= 0:
                own = [self.scores.narrow(1, first, cls.slots).unflatten(1, (cls.count, cls.capacity))]
            found.append(own)
        return found

    @torch.no_grad()
    def prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        real: torch.Tensor | None,
        scaling: float,
        score: torch.Tensor | None = None,
    ) -> None:
        """Cut a prompt to the budget: `query` [B, num_heads, n, D], `keys` and `values` [B, num_kv_heads, n, D], all
        with RoPE applied; `real` bool [B, n] is False for padding (None: no padding)."""
        uses = self.uses_references(keys.shape[2])
        self.cut(LayerPrompt.whole(self.layout, query, keys, values, real, scaling, score, self.softmax, uses))

    def uses_references(self, columns: int) -> bool:
        """Whether prompts of so many columns have to bring reference queries."""
        return self.rotation is not None and any(uses_references(cls, columns) for cls in self.layout.classes)

    @torch.no_grad()
    def cut(self, prompt: LayerPrompt) -> None:
        """Keep of prompts that have been read what the policies choose."""
        with without_autocast(prompt.keys.device):  # systems of equations are solved in float32
            referred = list(referred_heads(prompt, self.rotation))
            kept, lengths = kept_of(prompt, self.layout, self.state, referred), prompt.lengths
            values = fit_values(prompt, kept, referred)
            compact(self.keys, self.values, self.layout, prompt.keys, values, kept, lengths, self.transform)
        # Without padding the host need not wait for the device.
        self.seen = [prompt.columns] * self.batch if prompt.pad is None else lengths.tolist()
        self._stale = True

    @torch.no_grad()
    def step(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        score: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write one new token a sequence in place, then attend to the store; [B, num_heads, 1, D]."""
        flat = None if score is None else score[:, 0]
        if in_one.usable(self, query, keys, values):
            out = in_one.step(self, query[:, :, 0], keys[:, :, 0], values[:, :, 0], scaling, flat, self.seen)
            count_step([self])
            return out.unsqueeze(2)
        query, keys, values = self.transformed(query, keys, values)
        append(self.keys, self.values, self.scores, self.layout, keys[:, :, 0], values[:, :, 0], flat, self.lengths())
        new_tokens.place(self, keys, values)
        count_step([self])
        out = weighed(self, query, self.lengths(), scaling)
        new_tokens.observe(self, query, scaling)
        return out

    @torch.no_grad()
    def again(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention [B, num_heads, 1, D] of another layer's query to what a step has left, its own token included."""
        own = query if self.transform is None else self.transform.queries(query)
        return weighed(self, own, self.lengths(), scaling)

    @torch.no_grad()
    def put(self, keys: torch.Tensor, values: torch.Tensor, score: torch.Tensor | None) -> None:
        """Store what the policies keep of several new tokens, where none of them observes."""
        _, keys, values = self.transformed(keys, keys, values)
        new_tokens.keep(self, keys, keys, values, None, 1.0, score)

    @torch.no_grad()
    def look(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention [B, num_heads, T, D] of several new tokens to the store and causally to each other, without storing
        anything; `query` may be that of the last of them alone."""
        return self.several(*self.transformed(query, keys, values), scaling)

    @torch.no_grad()
    def several(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None = None,
        pad: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same of transformed tokens; see `ragged_decode` for `mask` and `pad`."""
        new = {"new_keys": keys, "new_values": values, "new_mask": mask, "new_pad": pad}
        return weighed(self, query, self.seen, scaling, **new)

    def restart(self) -> None:
        """Forget what has been stored."""
        for tensor in self.tensors():
            tensor.zero_()
        self.seen, self._stale = [0] * self.batch, True

    def count(self, tokens: Sequence[int]) -> None:
        """Count new tokens, one number a sequence."""
        self.seen = [n + more for n, more in zip(self.seen, tokens, strict=True)]
        self._stale = True

    def advance(self, tokens: int) -> None:
        """Count tokens that every sequence has got on the host; a step counts on the device itself."""
        self.seen = [n + tokens for n in self.seen]

    @torch.no_grad()
    def ready(self) -> None:
        """Bring what a GPU counts up to date."""
        if not self.keys.exact.is_cuda or not self._stale:
            return
        if self.counts is None or len(self.counts) != self.batch:
            with torch.inference_mode(False):  # so that it can be written in any mode
                self.counts = torch.zeros(self.batch, dtype=torch.int32, device=self.keys.exact.device)
        self.counts.copy_(torch.tensor(self.seen, dtype=torch.int32, device="cpu"))
        self._stale = False

    def lengths(self) -> Lengths:
        """`seen` where the kernels want it: on a GPU a tensor that steps keep up, so that none waits for the host."""
        self.ready()
        return self.seen if self.counts is None else self.counts

    def transformed(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of new tokens as they meet what quantised heads store, in their own dtypes."""
        if self.transform is None:
            return query, keys, values
        k, v = self.transform.keys(keys), self.transform.values(values)
        return self.transform.queries(query), k.to(keys.dtype), v.to(values.dtype)

    def one(self, sequence: int, seen: int) -> LayerStore:
        """One sequence that has brought `seen` tokens, as a store of its own on the same memory."""
        found = copy.copy(self)
        found.keys, found.values = self.keys.one(sequence), self.values.one(sequence)
        found.scores = self.scores.narrow(0, sequence, 1)
        found._own = [[t.narrow(0, sequence, 1) for t in tensors] for tensors in self._own]
        found.batch, found.seen, found.counts, found._stale = 1, [seen], None, True
        return found

    @torch.no_grad()
    def steps(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        score: torch.Tensor | None,
        places: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """`step` for those of the store's sequences at `places` int32 [B], which have brought `seen` int32 [B] tokens,
        both on the device: nothing is read by the host or counted here. For policies that do not observe. Without the
        dimension of tokens: `query` [B, num_heads, D], `keys` and `values` [B, num_kv_heads, D], `score` f32 [B,
        num_kv_heads]; as `query`."""
        if in_one.usable(self, query, keys, values):
            return in_one.step(self, query, keys, values, scaling, score, seen, places)
        query, keys, values = self.transformed(query.unsqueeze(2), keys.unsqueeze(2), values.unsqueeze(2))
        append(self.keys, self.values, self.scores, self.layout, keys[:, :, 0], values[:, :, 0], score, seen, places)
        return weighed(self, query, seen + 1, scaling, places=places).squeeze(2)

    def take(self, index: torch.Tensor) -> None:
        """Make the batch the sequences at `index` int64 [new batch]: for beam search, repeats and selections."""
        index = index.to(self.keys.exact.device)
        with torch.inference_mode(False):  # so that they can be written in any mode
            self.keys.take(index)
            self.values.take(index)
            self.scores = self.scores.index_select(0, index)
            self._own = [[t.index_select(0, index) for t in tensors] for tensors in self._own]
        self.seen = [self.seen[i] for i in index.tolist()]
        self.batch, self._stale = len(self.seen), True
