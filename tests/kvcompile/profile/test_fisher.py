from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from layer_walk import walked
from torch import Tensor

from kvcompile.profile.attention import Attention, attended, attending, causal
from kvcompile.profile.fisher import draw, gradients, head_gradient
from kvcompile.profile.structure import attends, forward, frozen, logits, source_layer

Tiny = Callable[..., Any]


def ids_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 61, length)


def trace_of(model: Any, ids: np.ndarray) -> Any:
    with attending(model, causal):
        return forward(model, ids)


@torch.no_grad()
def log_probabilities(model: Any, ids: np.ndarray, handler: Any) -> Tensor:
    with attending(model, handler):
        return logits(model, forward(model, ids).final).double().log_softmax(-1)


def test_our_attention_is_the_models_own(tiny: Tiny, family: str) -> None:
    model, ids = tiny(family), ids_of(300)
    with torch.no_grad():
        own = model(torch.as_tensor(ids)[None]).logits[0].double().log_softmax(-1)
    torch.testing.assert_close(log_probabilities(model, ids, causal), own, rtol=0, atol=1e-4)


def test_gradient_matches_finite_difference(tiny: Tiny, family: str) -> None:
    """The change of the difference of sampled labels' logits when one head's output moves at one position."""
    model, ids = tiny(family), ids_of(24)
    # A step far above float32's rounding, to which norms and rotary embeddings would come down in float64 as well.
    layer, head, place, step = 1, 2, 13, 0.01
    seen: dict[int, Tensor] = {}
    with frozen(model):
        trace = trace_of(model, ids)
        slope, lent = head_gradient(model, trace.final, (7,))[None], dict[int, list[Tensor]]()
        places = [sum(map(attends, model.model.layers[:number])) for number in range(len(model.model.layers))]
        below, arguments = walked(model, ids)
        for number, part in reversed(list(enumerate(model.model.layers))):
            visit = partial(lambda place, _, upstream: seen.update({place: upstream}), places[number])
            source = source_layer(model, number)
            with attended(model):
                at_own = lent.get(number, ())
                slope, others = gradients(part, below[number], arguments[number], slope, visit, lent=at_own)
            if others:  # keys and values of an earlier layer, which several may attend to
                sums = zip(lent[source], others, strict=True) if source in lent else []
                lent[source] = [a + b for a, b in sums] or others
    predicted = seen[layer][head, place].norm()
    direction = seen[layer][head, place] / predicted
    uniform = torch.from_numpy(np.random.default_rng((7,)).random((24, 2), dtype=np.float32))
    with torch.no_grad():
        labels = draw(logits(model, trace.final).float().softmax(-1), uniform)

    def difference(size: float) -> float:
        def nudge(call: Attention) -> Tensor:
            output = causal(call).clone()
            if call.layer == layer:
                output[head, place] += size * direction
            return output

        first, second = log_probabilities(model, ids, nudge).gather(-1, labels).sum(0)
        return float(first - second) / 2**0.5

    measured = (difference(step) - difference(-step)) / (2 * step)
    assert measured == pytest.approx(predicted.item(), rel=0.01)


def test_mean_square_is_the_curvature_of_the_divergence(tiny: Tiny, family: str) -> None:
    """(g . d)^2 on average is d' F d: the variance, under the model, of the slope of a label's logit along d."""
    model, rows = tiny(family), 8_000
    generator = torch.Generator().manual_seed(3)
    final, along = torch.randn(2, 1, model.config.get_text_config().hidden_size, generator=generator)
    with frozen(model):
        gradient = head_gradient(model, final.expand(rows, -1).contiguous(), (7,))
        _, slope = torch.func.jvp(lambda hidden: logits(model, hidden), (final,), (along,))
        probability = logits(model, final).double().softmax(-1)
    variance = (probability * slope.double() ** 2).sum() - (probability * slope.double()).sum() ** 2
    squares = (gradient.double() @ along[0].double()) ** 2
    error = squares.std() / rows**0.5
    assert error < 0.1 * variance
    assert abs(squares.mean() - variance) < 4 * error


def test_labels_follow_the_models_distribution() -> None:
    probability = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(4000, 4)
    uniform = (torch.arange(4000)[:, None] + 0.5) / 4000
    counts = draw(probability, uniform).ravel().bincount()
    assert counts.tolist() == pytest.approx([400, 0, 2400, 1200], abs=1)
    assert draw(probability[:1], torch.tensor([[1.0]])).item() == 3


def test_labels_depend_on_the_seed_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    final = trace_of(model, ids_of(40)).final
    once = head_gradient(model, final, (5, 0))
    torch.manual_seed(99)
    assert torch.equal(head_gradient(model, final, (5, 0)), once)
    assert not torch.allclose(head_gradient(model, final, (5, 1)), once)
    monkeypatch.setattr("kvcompile.profile.structure.LOGITS_AT_ONCE", 7 * 61)
    torch.testing.assert_close(head_gradient(model, final, (5, 0)), once)
