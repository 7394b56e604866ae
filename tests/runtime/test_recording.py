"""What lets a decode step be recorded, and what becomes of the recording; on a CPU, with stand-ins for CUDA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from kvcompile.artifacts import CacheError
from kvcompile.runtime import Decoder, Sampling, attach, decode, generate, recording
from kvcompile.runtime.recording import Graph
from kvcompile.runtime.store import LayerStore

ROWS = [[10, 30, 7], [12, 3, 64], [128, 20, 9]]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which a host has to wait for a GPU."""

    WAITS = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_consecutive",
        "equal",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            i is not None and i.dtype == torch.bool for part in args if isinstance(part, list | tuple) for i in part
        )
        if name in self.WAITS or by_mask:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers finds it in a step that is being recorded."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert masking_utils.is_tracing(None)


@torch.inference_mode()
@pytest.mark.usefixtures("capturing")
def test_a_step_that_is_recorded_asks_the_host_for_nothing(any_model, make_artifact, monkeypatch) -> None:
    """From the model's call to the store's step, whose kernels are tested on a GPU."""
    kv = attach(any_model, make_artifact(any_model, 12, recent=4, policy="scored"))
    cache = kv.new_cache(2)
    any_model(prompt(30, batch=2), past_key_values=cache, position_ids=torch.arange(30)[None])
    stepped = []
    step = LayerStore.step

    def allowed(*args: Any) -> torch.Tensor:
        stepped.append(True)
        with torch.utils._python_dispatch._disable_current_modes():
            return step(*args)

    monkeypatch.setattr(LayerStore, "step", allowed)
    if "moe" in any_model.config.model_type or any_model.config.model_type == "mixtral":
        pytest.skip("on a CPU, experts are chosen by the host")
    with NoWaiting():
        any_model(prompt(1, 1, 2), position_ids=torch.full((2, 1), 30), past_key_values=cache)
    assert len(stepped) == len(cache.layers)


@torch.inference_mode()
def test_what_waits_is_refused() -> None:
    ones = torch.ones(3)
    for wait in (lambda: bool(ones.all()), lambda: ones.sum().item(), lambda: ones[ones > 0], lambda: ones.nonzero()):
        with NoWaiting(), pytest.raises(RuntimeError, match="waits"):
            wait()


@pytest.mark.parametrize("policy", ["recent", "snapkv", "scored", "h2o"])
def test_a_padded_follow_up_of_one_column(llama, make_artifact, policy: str) -> None:
    """One sequence goes on with one token, the other with none; then with three and two. A follow-up sees what it
    evicts itself, and a step does not, so alone it is padded too."""
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=2))
    both, alone = Decoder(llama, kv.new_cache(2)), Decoder(llama, kv.new_cache())
    both.prefill(prompt(30, batch=2))
    alone.prefill(prompt(30, batch=2)[:1])
    said = both.prefill(prompt(1, 5, 2), torch.tensor([[1], [0]]))
    assert said[0] == alone.prefill(prompt(1, 5, 2)[:1].repeat(1, 2), torch.tensor([[0, 1]]))[0]
    assert all(layer.store.seen == [31, 30] for layer in both.cache.layers)
    for _ in range(12):
        assert both.step()[0] == alone.step()[0]
    assert (
        both.prefill(prompt(3, 6, 2), torch.tensor([[1, 1, 1], [0, 1, 1]]))[0] == alone.prefill(prompt(3, 6, 2)[:1])[0]
    )
    assert all(layer.store.seen == [46, 44] for layer in both.cache.layers)


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
