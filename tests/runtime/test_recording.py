"""What lets a decode step be recorded, and what becomes of the recording; on a CPU, with stand-ins for CUDA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvcompile.artifacts import CacheError
from kvcompile.runtime import Decoder, Sampling, attach, decode, generate, recording
from kvcompile.runtime.fused import FusedStep
from kvcompile.runtime.recording import Graph

ROWS = [[10, 30, 7], [12, 3, 64], [128, 20, 9]]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


class Repeated:
    """Stands for a graph: recording counts on the host and computes nothing, a replay runs the step."""

    made: list[Repeated]

    def __init__(self, run: Any, device: torch.device) -> None:
        self.run = run
        self.cache = run.__self__.cache
        self.cache.advance(1)
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.cache.advance(-1)
        self.run()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Repeated]:
    """The graphs that are made, on a machine without any."""
    monkeypatch.setattr(Repeated, "made", [], raising=False)
    monkeypatch.setattr(recording, "Graph", Repeated)
    monkeypatch.setattr(decode, "recordable", lambda model, cache: True)
    return Repeated.made


def test_the_graph_of_an_answer_serves_the_next(llama, make_artifact, graphs) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=2))
    cache, eager = kv.new_cache(2), kv.new_cache(2)
    decoder = Decoder(llama, cache)
    turns = [prompt(30, batch=2), prompt(7, 3, 2), prompt(1, 4, 2)]
    for number, ids in enumerate(turns):
        mask = torch.ones_like(ids)
        mask[1, : ids.shape[1] // 3] = 0
        found = generate(llama, cache, ids, attention_mask=mask, max_new_tokens=10)
        # Without a graph, for comparison.
        slow = Decoder(llama, eager)
        slow._records = False
        expected = [slow.prefill(ids, mask), *(slow.step().clone() for _ in range(9))]
        assert torch.equal(found, torch.stack(expected, 1))
        assert len(graphs) == 1
        assert graphs[0].replays == 8 + 9 * number
    assert not decoder.recorded
    decoder.start(torch.ones(2, 1, dtype=torch.int64), 70)
    assert decoder.recorded
    buffers = decoder.token.data_ptr(), decoder.position.data_ptr()
    decoder.start(torch.ones(2, 1, dtype=torch.int64), torch.tensor([[71], [72]]))
    assert (decoder.token.data_ptr(), decoder.position.data_ptr()) == buffers
    assert decoder.position.tolist() == [[71], [72]]


def test_recorded_with_the_second_step(llama, make_artifact, graphs) -> None:
    decoder = Decoder(llama, attach(llama, make_artifact(llama, ROWS)).new_cache())
    with pytest.raises(CacheError, match="prefill"):
        decoder.step()
    decoder.prefill(prompt(20))
    found = []
    for _ in range(3):
        decoder.step()
        found.append(decoder.recorded)
    assert found == [False, True, True]


@pytest.mark.parametrize(
    "change", ["reset", "reorder", "select", "repeat", "fork", "sampling", "weights", "attachment", "layers"]
)
def test_what_changes_is_recorded_anew(llama, make_artifact, graphs, change: str) -> None:
    artifact = make_artifact(llama, ROWS)
    kv = attach(llama, artifact)
    cache, sampling = kv.new_cache(2), Sampling()
    generate(llama, cache, prompt(20, batch=2), max_new_tokens=5)
    assert cache.recording.graph is graphs[0]
    batch = 2
    match change:
        case "reset":
            cache.reset()
        case "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        case "select":
            cache.batch_select_indices(torch.tensor([1]))
            batch = 1
        case "repeat":
            cache.batch_repeat_interleave(2)
            batch = 4
        case "fork":
            cache = copy.deepcopy(cache)
            assert cache.recording is None
        case "sampling":
            sampling = Sampling(0.5)
        case "weights":
            llama.half()
        case "attachment":
            kv.detach()
            cache = attach(llama, artifact).new_cache(2)
        case "layers":  # one layer's store alone, which the cache does not hear of
            cache.layers[1].store.take(torch.tensor([1, 0]))
    generate(llama, cache, prompt(6, batch=batch), max_new_tokens=5, sampling=sampling)
    assert len(graphs) == 2
    assert graphs[0].replays == 3
    generate(llama, cache, prompt(6, batch=batch), max_new_tokens=5, sampling=sampling)
    assert len(graphs) == 2


def test_a_detached_model_is_not_replayed(llama, make_artifact, graphs) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    decoder = Decoder(llama, kv.new_cache())
    decoder.prefill(prompt(20))
    for _ in range(3):
        decoder.step()
    decoder.cache.recording.fused = FusedStep(llama)  # as on a GPU
    kv.detach()
    with pytest.raises(CacheError, match="attached"):
        decoder.step()
    assert graphs[0].replays == 2


def test_a_model_that_cannot_be_recorded_decodes_without(llama, make_artifact, monkeypatch, graphs) -> None:
    def fails(run: Any, device: torch.device) -> None:
        run.__self__.cache.advance(1)
        raise RuntimeError("a model that asks\nthe host")

    kv = attach(llama, make_artifact(llama, ROWS))
    expected = generate(llama, kv.new_cache(), prompt(20), max_new_tokens=8)
    monkeypatch.setattr(recording, "Graph", fails)
    cache = kv.new_cache()
    with pytest.warns(UserWarning, match="without CUDA graphs: a model that asks$"):
        assert torch.equal(generate(llama, cache, prompt(20), max_new_tokens=8), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and not tried again
        generate(llama, cache, prompt(5), max_new_tokens=8)
    assert cache.layers[0].columns == cache.layers[0].store.seen[0] == 20 + 7 + 5 + 7


@pytest.mark.parametrize("ends", [True, False], ids=["the capture ends", "the capture fails to end"])
def test_a_failed_recording_leaves_the_stream_from_before(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    current, devices = ["before"], [0]

    @contextmanager
    def capture(graph: Any, stream: Any) -> Iterator[None]:
        current[0] = stream
        try:
            yield
        finally:
            if not ends:
                raise RuntimeError("the capture was invalidated")
            current[0] = "before"

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        devices.append(which.index)
        try:
            yield
        finally:
            devices.pop()

    class Drawing:
        state = "before"

        def clone_state(self) -> str:
            return self.state

        def graphsafe_set_state(self, state: str) -> None:
            self.state = state

    drawing = Drawing()

    def waits() -> None:
        drawing.state = "captured"
        assert current[0] == "side of cuda:1"
        assert devices[-1] == 1
        raise RuntimeError("waits for the host")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "default_generators", [None, drawing])
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"side of {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    with pytest.raises(RuntimeError):
        Graph(waits, torch.device("cuda", 1))
    assert current == ["before"]
    assert drawing.state == "before"
    assert devices == [0]
