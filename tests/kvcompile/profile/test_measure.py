from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from profiles import TABLES, Question, assert_same, material
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.artifacts.errors import CalibrationError, ModelError
from kvcompile.models.room import Room
from kvcompile.profile import Material, fit, layer_losses, measure
from kvcompile.profile.attention import BLOCK
from kvcompile.profile.held import UNLIMITED

Tiny = Callable[..., Any]


def test_every_family_is_measured(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    # A plan leaves its sliding layers alone, and those without keys and values of their own.
    count = 3 if not family.startswith("gemma4") else 1 if "shared" in family else 2
    result = measure(model, material(), seed=0)
    profile, points = result.profile, len(result.profile.tokens)
    assert (profile.window, profile.tokens[0], profile.tokens[-1]) == (48, 5, 48)
    assert profile.families == ("code", "essay", "retrieval")
    assert profile.loss.shape == (3, count, 2, len(profile.shares), points)
    assert (profile.key_loss.shape, profile.value_loss.shape) == ((3, count, 2, 5), (3, count, 2, 4))
    assert (profile.kept.key.shape, profile.kept.value.shape) == ((3, count, 2, 2, 5), (3, count, 2, 2, 4))
    assert profile.kept.tokens.tolist() == [5, 6]
    assert (profile.baklava.shape, profile.squeeze.shape) == ((count, 2), (count,))
    assert profile.surfacelogic.shape == (count, 2)
    assert all(getattr(profile, name).dtype == np.float32 for name in TABLES)
    assert (profile.surfacelogic.min(), profile.surfacelogic.max()) == (0, 1)
    sliding = family in ("gemma2", "gemma3_text", "gpt_oss", "olmo3")
    chosen = [2] if sliding else list(range(count))
    assert (profile.loss[:, chosen, ..., :-1] > 0).all()
    assert (profile.loss[..., -1] == 0).all()
    assert (profile.key_loss[:, chosen, :, 0] < profile.key_loss[:, chosen, :, 1]).mean() > 0.9, "4 bits cost more"
    if sliding:
        assert (profile.loss[:, :2] == 0).all(), "layers that keep their own sliding window have no curve"
    hidden_size = model.config.get_text_config().hidden_size
    assert (result.scorer.weight.shape, result.scorer.bias.shape) == (
        (count, 2, hidden_size),
        (count, 2),
    )
    assert len(result.checks) == 6
    assert profile.factor > 0


def test_bfloat16_agrees_with_float32(tiny: Tiny) -> None:
    exact = measure(tiny(), material(), seed=0).profile
    half = measure(tiny().to(torch.bfloat16), material(), seed=0).profile
    np.testing.assert_allclose(half.squeeze, exact.squeeze, atol=0.03)
    # Rounded probabilities draw a few labels anew, so curves agree in shape, not in every digit.
    losses = [np.log(profile.loss[:, -1, ..., :-1].mean(0)).ravel() for profile in (half, exact)]
    assert np.corrcoef(losses)[0, 1] > 0.9


def test_deterministic_under_a_seed(tiny: Tiny) -> None:
    assert_same(measure(tiny(), material(), seed=3), measure(tiny(), material(), seed=3))
    other = measure(tiny(), material(), seed=4).profile
    assert not np.array_equal(other.loss, measure(tiny(), material(), seed=3).profile.loss)


def test_probes_answered_rightly_decide(tiny: Tiny) -> None:
    model = tiny()
    prompt = np.random.default_rng(1).integers(3, 61, 30)
    with torch.no_grad():
        told = model(torch.as_tensor(prompt)[None]).logits[0, -1].argmax().item()
    wrong = material().probes
    right = Question(prompt, np.array([told]), ((3, 6),))
    mixed, alone = (measure(model, material(asked), seed=0) for asked in ([*wrong, right], [right]))
    assert (mixed.probes, mixed.answered) == (3, 1)
    np.testing.assert_array_equal(mixed.profile.surfacelogic, alone.profile.surfacelogic)


def test_answered_means_every_token(tiny: Tiny) -> None:
    model = tiny()
    prompt = np.random.default_rng(0).integers(3, 61, 30)
    with torch.no_grad():
        told = model.generate(
            torch.as_tensor(prompt)[None], attention_mask=torch.ones(1, 30), max_new_tokens=4, do_sample=False
        )
    answer = told[0, 30:].numpy()
    wrong = answer.copy()
    wrong[-1] = 3 if answer[-1] != 3 else 4
    asked = [Question(prompt, one, ((3, 6),)) for one in (answer, wrong)]
    assert [measure(model, material([one]), seed=0).answered for one in asked] == [1, 0]


def test_progress_rises_to_the_whole(tiny: Tiny) -> None:
    seen: list[tuple[int, int]] = []
    measure(tiny(), material(), seed=0, progress=lambda done, total: seen.append((done, total)))
    assert len({total for _, total in seen}) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


class StopError(Exception):
    pass


def stopping_after(calls: int) -> Callable[[int, int], None]:
    left = calls

    def progress(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StopError

    return progress


@pytest.mark.parametrize("calls", [0, 1, 4, 11, 24, 25, 31, 37, 44, 56])
@pytest.mark.parametrize("room", [Room(0, 0), Room(0, 40_000), UNLIMITED])
def test_resumed_profile_is_bit_identical(tiny: Tiny, tmp_path: Path, calls: int, room: Room) -> None:
    """Stopped in any of the passes, with all, some or nothing of what is held in memory."""
    whole = measure(tiny(), material(), seed=0)
    with pytest.raises(StopError):
        measure(tiny(), material(), seed=0, store=tmp_path, progress=stopping_after(calls), room=room)
    starts: list[int] = []
    resumed = measure(
        tiny(), material(), seed=0, store=tmp_path, progress=lambda done, _: starts.append(done), room=room
    )
    assert_same(resumed, whole)
    everything: list[int] = []
    measure(tiny(), material(), seed=0, progress=lambda done, _: everything.append(done))
    assert starts == everything[calls + 1 :], "finished items were measured again"
    assert [path.name for path in tmp_path.iterdir()] == ["sums.npz"]


def test_finished_profile_is_not_measured_again(tiny: Tiny, tmp_path: Path) -> None:
    whole = measure(tiny(), material(), seed=0, store=tmp_path)
    assert_same(measure(tiny(), material(), seed=0, store=tmp_path, progress=stopping_after(0)), whole)


def test_every_layer_that_attends_to_a_head_counts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its losses, which add up, and in the utility of its tokens, which is the largest of all."""
    seen, fitted, own = list[Tensor](), list[Tensor](), (layer_losses.losses_of, fit.utilities, fit.normal_sums)

    def ones(*args: Any) -> Any:
        found = own[0](*args)
        return replace(found, evicted={kind: np.ones_like(table) for kind, table in found.evicted.items()})

    monkeypatch.setattr(layer_losses, "losses_of", ones)
    monkeypatch.setattr(fit, "utilities", lambda *args: seen.append(own[1](*args)) or seen[-1])
    monkeypatch.setattr(fit, "normal_sums", lambda *args: fitted.append(args[1]) or own[2](*args))
    profile = measure(tiny("gemma4_text, shared"), material(), seed=0).profile
    np.testing.assert_array_equal(profile.loss[..., 0, :], 3)  # without what fitted values make of it
    assert len(fitted) == 2  # episodes
    for number, utility in enumerate(fitted):
        assert torch.equal(utility, torch.stack(seen[number::2]).amax(0))
        assert not torch.equal(utility, seen[number])


@pytest.mark.parametrize("calls", [None, 1, 4, 20])
def test_model_is_left_as_it_was(tiny: Tiny, family: str, calls: int | None) -> None:
    """After a whole profile, or one stopped in a forward pass, a backward pass or a probe."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def visible() -> object:
        return (
            model.config._attn_implementation,
            [(name, module.training) for name, module in model.named_modules()],
            [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        )

    before = visible()
    if calls is None:
        measure(model, material(), seed=0)
    else:
        with pytest.raises(StopError):
            measure(model, material(), seed=0, progress=stopping_after(calls))
    assert visible() == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            # Views of broadcast tensors count many elements and hold few.
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("family_", ["llama", "gemma3_text"])
def test_memory_is_one_block_of_one_layers_attention(tiny: Tiny, family_: str) -> None:
    model, length = tiny(family_), 1500
    with LargestTensor() as seen:
        measure(model, material([], length), seed=0)
    block = model.config.num_attention_heads * BLOCK * length
    assert seen.elements <= 1.5 * block


def test_too_little_text_is_refused(tiny: Tiny) -> None:
    for found in (Material([], [], []), Material([], material().measure, []), material(length=9)):
        with pytest.raises(CalibrationError, match="needs at least 10"):
            measure(tiny(), found, seed=0)


def test_numbers_that_are_not_finite_are_refused(tiny: Tiny) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        measure(model, material(), seed=0)
