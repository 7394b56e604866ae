"""The ragged stores of all layers as a transformers cache. All that depends on that library's cache interface is here
and in `layer.py`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from kvcompile.runtime.layer import RaggedLayer
from kvcompile.runtime.linear import LinearLayer
from kvcompile.runtime.policies import POLICIES

if TYPE_CHECKING:
    from kvcompile.runtime.recording import Recording


class RaggedCache(Cache):
    """A cache for `model(...)` and `model.generate(...)`; made by `Attachment.new_cache`. `copy.deepcopy` forks it.

    One column on a filled cache is a step, and no sequence's token in it is padding: what is to go on for some
    sequences only comes in two columns or more, left-padded, as `Decoder.prefill` does it."""

    layers: list[RaggedLayer | LinearLayer]

    def __init__(self, layers: list[RaggedLayer | LinearLayer], attachment: str) -> None:
        super().__init__(layers=layers)
        self.attachment = attachment
        """Identifies the attachment whose head order the stored keys and values follow."""
        self.recording: Recording | None = None
        """The buffers and the graph of a decode step, for the next decoder."""

    @property
    def ragged(self) -> list[RaggedLayer]:
        """The layers with keys and values."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        fork = type(self).__new__(type(self))
        memo[id(self)] = fork
        with torch.inference_mode(False), torch.no_grad():  # so that it can be written in any mode
            for name, value in vars(self).items():  # a graph writes where it was recorded, so a fork has none
                setattr(fork, name, None if name == "recording" else copy.deepcopy(value, memo))
        return fork

    def forget_recording(self) -> None:
        """Decode steps are recorded anew."""
        if self.recording is not None:
            self.recording.graph, self.recording = None, None

    def reset(self) -> None:
        self.forget_recording()
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.forget_recording()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.forget_recording()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.forget_recording()
        super().batch_select_indices(indices)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that the cache holds."""
        for layer in self.layers:
            yield from (layer if isinstance(layer, LinearLayer) else layer.store).tensors()

    @property
    def nbytes(self) -> int:
        """Bytes resident now: the sizes of all storages; on a rank of tensor parallelism, those of its heads alone."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    @property
    def observes(self) -> bool:
        """Whether it has heads of a policy that learns from the attention of every new token."""
        policies = {cls.policy for layer in self.ragged for cls in layer.store.layout.classes}
        return any(POLICIES[policy].observes for policy in policies)

    @property
    def plain(self) -> bool:
        """Whether all layers weigh their logits by a softmax and nothing else, as far as they have been used."""
        return all(layer.store.softmax.plain for layer in self.ragged)

    def advance(self, tokens: int) -> None:
        """Count tokens that a recorded step has stored."""
        for layer in self.ragged:
            layer.advance(tokens)

    def ready(self) -> None:
        """Bring what the device counts up to date: a recorded step does not look at the host."""
        for layer in self.ragged:
            layer.store.ready()

    def counts(self) -> list[tuple[int, list[int]]]:
        """How much every layer counts: columns of the mask, and tokens of every sequence."""
        return [(layer.columns, layer.store.seen) for layer in self.ragged]

    def set_counts(self, counts: list[tuple[int, list[int]]]) -> None:
        """Go back to what `counts` said, where nothing has been stored since."""
        for layer, (columns, seen) in zip(self.ragged, counts, strict=True):
            layer.columns, layer.store.seen = columns, seen
