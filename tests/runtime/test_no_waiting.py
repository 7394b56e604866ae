"""A step asks the host for nothing, whatever transformers makes of masks while a stream is captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from kvcompile.runtime import Decoder, attach
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
    assert len(stepped) == len(cache.ragged)


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
