"""A decode step's buffers and the CUDA graph recorded over them, which a cache keeps from one answer to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kvcompile.runtime.binding import BINDING
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.fused import FusedStep, fusable
from kvcompile.runtime.parts import attention_modules
from kvcompile.runtime.sampling import Sampling
from kvcompile.runtime.tensor_parallel import TensorParallel


class Graph:
    """What `run` does on a GPU, recorded by calling it once. The call counts on the host and computes nothing yet.

    Raises:
        RuntimeError: something in `run` waits for the device. Current stream and random numbers are then as before.
    """

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream, drawing = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index or 0]
            state = drawing.clone_state()
            try:
                # A stream of this device: the one that torch would take belongs to the device it was first used on.
                with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(device)):
                    run()
            except BaseException:
                # A capture that fails to end leaves its own stream current, and a generator that waits for its end.
                torch.cuda.set_stream(stream)
                drawing.graphsafe_set_state(state)
                raise

    def replay(self) -> None:
        self._graph.replay()


class Recording:
    """The buffers of a step of `batch` sequences: `token` and `position`, int64 [batch, 1], and, once it is recorded,
    its `graph`. Held by the cache; serves every loop of the same model, attachment, sampling and batch, as long as
    all that the graph reads and writes lies where it lay."""

    def __init__(self, model: Any, cache: RaggedCache, sampling: Sampling, batch: int) -> None:
        self._model = weakref.ref(model)
        self._binding = _binding(model)
        self._sampling = sampling
        self._places: list[Any] = []
        device = model.device
        with torch.inference_mode(False):  # so that they can be written in any mode
            self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.steps = 0
        self.graph: Graph | None = None
        self.failed = False
        """Whether recording was tried in vain."""
        self.fused = FusedStep(model) if device.type == "cuda" and fusable(model, cache) else None
        """The step in few launches, on a GPU and for the models that it knows."""
        if self.fused is not None:
            self.fused.compile(cache)

    def fits(self, model: Any, cache: RaggedCache, sampling: Sampling, batch: int) -> bool:
        """Whether it can go on for this loop."""
        same = self.attached(model) and self._sampling == sampling and len(self.token) == batch
        there = self.fused is None or self.fused.fits(model)
        return same and there and (self.graph is None or self._places == _places(model, cache))

    def attached(self, model: Any) -> bool:
        """Whether this is its model, with the attachment under which it was made."""
        return self._model() is model and _binding(model) is self._binding

    def record(self, run: Callable[[], None], cache: RaggedCache) -> None:
        """Record a step that has not been done afterwards, on the host neither.

        Raises:
            RuntimeError: a model that asks the host in every step.
        """
        before = cache.counts()
        cache.ready()
        self.failed = True
        try:
            self.graph = Graph(run, self.token.device)
        finally:
            cache.set_counts(before)
        self.failed, self._places = False, _places(self._model(), cache)


def recordable(model: Any, cache: RaggedCache) -> bool:
    """Whether a step can be one CUDA graph: all on one GPU, with weights that are whole, and no policy that learns from
    every step's attention."""
    devices = {model.device, *(tensor.device for tensor in cache.tensors())}
    # States of linear attention have not been tried, nor has what ranks of tensor parallelism tell each other.
    tried = len(cache.ragged) == len(cache.layers) and TensorParallel.of(model).group is None
    # Llama-4 asks the cache how far it is on the host, where a graph would never ask again.
    asks = any(getattr(module, "attn_temperature_tuning", False) for module in attention_modules(model))
    return model.device.type == "cuda" and len(devices) == 1 and tried and not asks and not cache.observes


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, on which kernels and graphs are launched; nothing where `device` is no GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _binding(model: Any) -> Any:
    return getattr(attention_modules(model)[0], BINDING, None)


def _places(model: Any, cache: RaggedCache) -> list[Any]:
    """Where everything lies that a step reads and writes beside its own buffers."""
    return [(tensor.data_ptr(), tensor.device, tensor.dtype) for tensor in _tensors(model, cache)]


def _tensors(model: Any, cache: RaggedCache) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from cache.tensors()
    yield from (layer.store.counts for layer in cache.ragged if layer.store.counts is not None)
    for module in attention_modules(model):
        binding = getattr(module, BINDING, None)
        if binding is not None and binding.scorer is not None:
            yield binding.scorer.weight
            yield binding.scorer.bias
