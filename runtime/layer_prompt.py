"""What one layer knows of prompts that are being read."""

from __future__ import annotations

import copy

import torch

from kvcompile.kernels import HeadClass, LayerLayout, Softmax, prompt_attention
from kvcompile.kernels.softmax import PLAIN
from kvcompile.runtime.drawn import attention_drawn
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.policies.base import Prompt
from kvcompile.runtime.references import References


class LayerPrompt:
    """Keys and values of one layer for prompts side by side in `columns` columns, filled chunk by chunk, and what the
    policies of its heads look at beside. Sequence b is the columns from `pad[b]` int64 [B] on (None: no padding).
    `room` are tensors [B, num_kv_heads, columns or more, D] for keys and values; None: they are allocated. With
    `keep_references`, reference queries are kept beside (`runtime.references`). `window`: tokens that a query sees,
    0 for all of them (None: as the layout says)."""

    def __init__(
        self,
        layout: LayerLayout,
        columns: int,
        pad: torch.Tensor | None,
        room: tuple[torch.Tensor, torch.Tensor] | None = None,
        softmax: Softmax = PLAIN,
        keep_references: bool = False,
        window: int | None = None,
    ) -> None:
        self.layout = layout
        self._window = layout.window if window is None else window
        self.softmax = softmax
        self._room = None if room is None else tuple(tensor[:, :, :columns] for tensor in room)
        self.columns = columns
        self.pad = pad
        self.filled = 0
        self.early = False  # whether it ended before all columns were read
        self.scaling = 1.0
        self.references: References | None = None
        self._keep_references = keep_references
        self._tail = max(POLICIES[cls.policy].queries for cls in layout.classes)
        self._drawn: dict[int, torch.Tensor] = {}
        self._scores: list[torch.Tensor] = []

    @classmethod
    def whole(
        cls,
        layout: LayerLayout,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        real: torch.Tensor | None,
        scaling: float,
        score: torch.Tensor | None,
        softmax: Softmax = PLAIN,
        keep_references: bool = False,
    ) -> LayerPrompt:
        """Prompts read at once, given as for `add`; `real` bool [B, n] is False for padding, wherever it is."""
        pad = None
        if real is not None:
            pad, moved = left_padded(real, (query, 2), (keys, 2), (values, 2), (score, 1))
            query, keys, values = (tensor for tensor in moved[:3] if tensor is not None)
            score = moved[3]
        prompt = cls(layout, keys.shape[2], pad, softmax=softmax, keep_references=keep_references)
        prompt.add(query, keys, values, scaling, score)
        return prompt

    def add(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        score: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the next T columns: `query` [B, num_heads, T, D], `keys` and `values` [B, num_kv_heads, T, D], `score`
        f32 [B, T, num_kv_heads] by the compiled scorer; keys and values [B, num_kv_heads, filled, D] so far."""
        whole = keys.shape[2] == self.columns
        if not self.filled:
            shape = (*keys.shape[:2], self.columns, keys.shape[3])
            if whole:
                self.keys, self.values = keys, values
            else:
                self.keys, self.values = self._room or (keys.new_empty(shape), values.new_empty(shape))
            self._queries = query.new_empty(*query.shape[:2], 0, query.shape[3])
        first, self.filled, self.scaling = self.filled, self.filled + keys.shape[2], scaling
        if not whole:
            self.keys[:, :, first : self.filled], self.values[:, :, first : self.filled] = keys, values
        seen = self.read
        if self._keep_references and query.shape[2]:
            if self.references is None:
                self.references = References.none_yet(query, self.layout.num_kv_heads, self.lengths.long())
            begin = torch.full_like(self.lengths, first).long()
            self.references = self.references.seen(query, begin if self.pad is None else begin - self.pad)
        if self._tail:
            self._queries = torch.cat([self._queries, query[:, :, -self._tail :]], 2)[:, :, -self._tail :]
        if score is not None:
            self._scores.append(score)
        for cls in self.layout.classes:
            if POLICIES[cls.policy].sums:
                drawn = attention_drawn(self._grouped(query, cls), seen[0][:, cls.heads], self.pad, scaling)
                if cls.start not in self._drawn:
                    self._drawn[cls.start] = drawn.new_zeros(*drawn.shape[:2], self.columns)
                self._drawn[cls.start][:, :, : self.filled] += drawn
        return seen

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        score: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take the next T columns as `add` does; their exact attention over all so far, [B, num_heads, T, D]."""
        seen = self.add(query, keys, values, scaling, score)
        return prompt_attention(query, *seen, self.pad, self._window, scaling, softmax=self.softmax)

    def again(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """The same, over all that has been read, of another layer's queries of the last of it."""
        return prompt_attention(query, *self.read, self.pad, self._window, scaling)

    @property
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values so far, [B, num_kv_heads, filled, D]."""
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def ended(self) -> LayerPrompt:
        """The prompt as if it ended with what has been read of it."""
        found = copy.copy(self)
        found.early = self.filled < self.columns
        found.columns, (found.keys, found.values) = self.filled, self.read
        found._drawn = {start: drawn[:, :, : self.filled] for start, drawn in self._drawn.items()}
        return found

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of every sequence, int32 [B] where its keys are."""
        whole = torch.full((len(self.keys),), self.columns, dtype=torch.int32, device=self.keys.device)
        return whole if self.pad is None else whole - self.pad.int()

    @property
    def score(self) -> torch.Tensor | None:
        """What the compiled scorer has said so far, f32 [B, filled, num_kv_heads]."""
        return torch.cat(self._scores, 1) if self._scores else None

    def of(self, cls: HeadClass) -> Prompt:
        """What the heads of a class see of it."""
        score = None if self.score is None else self.score.mT[:, cls.heads]
        wanted = POLICIES[cls.policy].queries
        query = self._grouped(self._queries[:, :, max(self._queries.shape[2] - wanted, 0) :], cls)
        drawn, softmax = self._drawn.get(cls.start), self.softmax.of(cls.heads, query.shape[2])
        return Prompt(self.keys[:, cls.heads], query, self.pad, self.scaling, drawn, score, softmax)

    def _grouped(self, query: torch.Tensor, cls: HeadClass) -> torch.Tensor:
        return query.unflatten(1, (self.layout.num_kv_heads, -1))[:, cls.heads]


def left_padded(
    real: torch.Tensor, *tensors: tuple[torch.Tensor | None, int]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """How many columns of padding each sequence begins with, int64 [B], after each of `tensors`, given with its
    dimension of columns, has had the padding of `real` bool [B, n] moved there."""
    count = real.sum(1)
    pad = real.shape[1] - count
    if bool((real[:, 1:] >= real[:, :-1]).all()):
        return pad, [tensor for tensor, _ in tensors]
    order = real.int().argsort(dim=1, stable=True)
    moved: list[torch.Tensor | None] = []
    for tensor, dim in tensors:
        if tensor is None:
            moved.append(None)
            continue
        shape = [len(order) if d == 0 else order.shape[1] if d == dim else 1 for d in range(tensor.ndim)]
        moved.append(tensor.gather(dim, order.view(shape).expand_as(tensor)))
    return pad, moved
