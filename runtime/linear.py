"""Layers of linear attention: they have a state of fixed size in place of keys and values, which is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

try:
    from transformers.cache_utils import LinearAttentionLayer
except ImportError:  # kvpress's transformers, with which no cache of ours is made
    LinearAttentionLayer = object


class _States(dict[int, Any]):
    """Tensors that are written in place and never become part of a graph."""

    def __getitem__(self, key: int) -> Any:
        found = super().__getitem__(key)
        return None if found is None else found.detach()


class LinearLayer(LinearAttentionLayer):
    """The state of one such layer as a transformers cache has it, all of its memory allocated: of the convolution in
    `dtype`, [batch, channels, width], and of the gated delta rule in float32, [batch, value heads, key size, value
    size]."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device, batch: int) -> None:
        super().__init__()
        own: Any = module
        self._shapes = (
            ((own.conv_dim, own.conv_kernel_size), dtype),
            ((own.num_v_heads, own.head_k_dim, own.head_v_dim), torch.float32),
        )
        self.conv_states, self.recurrent_states = _States(self.conv_states), _States(self.recurrent_states)
        self.dtype, self.device = dtype, device
        self._allocate(batch)

    def _allocate(self, batch: int) -> None:
        with torch.inference_mode(False):  # so that it can be written in any mode
            conv, recurrent = (torch.zeros(batch, *shape, dtype=t, device=self.device) for shape, t in self._shapes)
        self.conv_states[0], self.recurrent_states[0] = conv, recurrent
        self.conv_kernel_size[0] = conv.shape[-1]
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = False

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer holds."""
        return [self.conv_states[0], self.recurrent_states[0]]

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(conv_states) != len(self.conv_states[0]) and not self.has_previous_state[0]:
            self._allocate(len(conv_states))  # an empty cache follows its first prompt, as its other layers do
        found: torch.Tensor = super().update_conv_state(conv_states, *args, **kwargs)
        return found.to(conv_states.dtype)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(lambda state: state[indices.to(state.device)])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        self._allocate(len(self.conv_states[0]))

    @contextmanager
    def only(self, row: slice) -> Iterator[None]:
        """Within, the states are those of some sequences alone."""
        whole = self.conv_states[0], self.recurrent_states[0]
        self.conv_states[0], self.recurrent_states[0] = (state[row] for state in whole)
        try:
            yield
            for state, own in zip(whole, (self.conv_states[0], self.recurrent_states[0]), strict=True):
                state[row] = own  # where it was not written in place
        finally:
            self.conv_states[0], self.recurrent_states[0] = whole

    def _take(self, change: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():  # so that they can be written in any mode
            changed = change(self.conv_states[0]), change(self.recurrent_states[0])
        self.conv_states[0], self.recurrent_states[0] = changed
