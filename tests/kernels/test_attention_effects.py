"""Effects of fewer tokens and of other keys and values, in C and in torch, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompile.kernels import Asked, Changes, Softmax, attention_effects
from kvcompile.kernels.attention_effects import dense, reference
from kvcompile.kernels.attention_effects.values import Effects
from kvcompile.kernels.native import effects

HEADS, BUDGETS, SHARES = 2, 3, 2
SHAPES = [  # tokens of the context, own tokens and rows of each follow-up, group, head size, of how many rows one
    (1, ((1, 1),), 1, 8, 1),
    (13, ((5, 4), (3, 3)), 5, 16, 2),
    (130, ((9, 9), (1, 1)), 7, 64, 2),
    (257, ((20, 11),), 3, 80, 3),
]


def setting(
    shape: tuple[int, tuple[tuple[int, int], ...], int, int, int], dtype: torch.dtype, sets: int = 2
) -> tuple[list[Asked], Tensor, Tensor, Changes, float]:
    length, follow_ups, group, dim, step = shape
    generator = torch.Generator().manual_seed(length + dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    asked = []
    for own, rows in follow_ups:
        query, gradient = draw(2, HEADS * group, rows, dim).to(dtype)
        own_keys, own_values = draw(2, HEADS, own, dim).to(dtype)
        asked.append(Asked(query * 2, gradient, own_keys, own_values, torch.arange(own - rows, own), step))
    keys, values = draw(2, HEADS, length, dim).to(dtype)
    # With the last budget, one head keeps all.
    entry = torch.randint(0, BUDGETS + 1, (HEADS, length, SHARES), generator=generator, dtype=torch.int32)
    entry[0].clamp_(max=BUDGETS - 1)
    changes = draw(2, sets, HEADS, length, dim) * 0.1
    return asked, keys, values, Changes(entry, BUDGETS, tuple(changes[0]), tuple(changes[1])), dim**-0.5


def in_double(args: tuple[list[Asked], Tensor, Tensor, Changes, float]) -> list[Effects]:
    asked, keys, values, changes, scaling = args
    return reference.attention_effects(asked, keys.double(), values.double(), changes, scaling, 0, Softmax())


def compare(found: list[Effects], wanted: list[Effects], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        for name in ("evicted", "keys", "values", "total"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=tolerance, atol=tolerance)
        assert (one.evicted[0, ..., -1] == 0).all(), "nothing is lost where all is kept"


@pytest.mark.parametrize("shape", SHAPES, ids=["one", "few", "blocks", "odd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 5e-3)], ids=["f32", "bf16"])
def test_in_c(
    shape: tuple[int, tuple[tuple[int, int], ...], int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    args = setting(shape, dtype)
    if not effects.usable(args[0], args[1], 0, Softmax()):
        pytest.skip("no compiler")
    compare(effects.attention_effects(*args), in_double(args), tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=["one", "few", "blocks", "odd"])
def test_in_torch(shape: tuple[int, tuple[tuple[int, int], ...], int, int, int]) -> None:
    args = setting(shape, torch.float32)
    compare(dense.attention_effects(*args, 0, Softmax()), in_double(args), 5e-5)


@pytest.mark.parametrize(
    ("window", "softmax"),
    [(7, Softmax()), (0, Softmax(cap=2.0)), (0, Softmax(sinks=torch.linspace(-1, 2, 10)))],
    ids=["window", "cap", "sinks"],
)
def test_other_attention(window: int, softmax: Softmax) -> None:
    args = setting(SHAPES[1], torch.float32)
    assert not effects.usable(args[0], args[1], window, softmax)
    wanted = reference.attention_effects(*args, window, softmax)
    compare(attention_effects(*args, window, softmax), wanted, 5e-5)


def test_large_logits_in_c() -> None:
    """Far apart, so that what is left of a row's weight is next to nothing."""
    asked, keys, values, changes, scaling = setting(SHAPES[2], torch.float32)
    if not effects.usable(asked, keys, 0, Softmax()):
        pytest.skip("no compiler")
    args = [replace(one, query=one.query * 6) for one in asked], keys, values, changes, scaling
    found, wanted = effects.attention_effects(*args), in_double(args)
    compare(found, wanted, 1e-3)


def test_without_changes_of_keys_and_values() -> None:
    args = setting(SHAPES[1], torch.float32, sets=0)
    for found in (attention_effects(*args), dense.attention_effects(*args, 0, Softmax())):
        assert [tuple(one.keys.shape) for one in found] == [(HEADS, 2, 0), (HEADS, 2, 0)]
        assert [tuple(one.values.shape) for one in found] == [(HEADS, 4, 0), (HEADS, 3, 0)]
        compare(found, in_double(args), 5e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    asked, keys, values, changes, scaling = setting(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="as many heads and tokens"):
        attention_effects(asked, keys[:, 1:], values[:, 1:], changes, scaling)
    with pytest.raises(ValueError, match="changes of keys"):
        attention_effects(asked, keys, values, replace(changes, keys=(keys[:, 1:],)), scaling)
    with pytest.raises(ValueError, match="gradient"):
        attention_effects([replace(asked[0], gradient=asked[0].gradient[:, 1:])], keys, values, changes, scaling)
