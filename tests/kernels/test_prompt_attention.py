"""Attention of prompts in C and in torch against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvcompile.kernels import prompt_attention
from kvcompile.kernels.native import prompt
from kvcompile.kernels.prompt_attention import dense, reference
from kvcompile.kernels.softmax import Softmax

CASES = [  # columns before the queries' own, window, padding, share of them that is kept
    (0, 0, False, None),
    (200, 0, False, None),
    (200, 70, False, None),
    (77, 0, True, None),
    (77, 20, True, None),
    (400, 0, False, 0.3),
    (400, 100, False, 0.3),
    (150, 0, False, 0.0),
]
IDS = ["whole", "chunk", "window", "padding", "padding and window", "kept", "kept and window", "nothing kept"]


def inputs(
    case: tuple[int, int, bool, float | None], length: int, group: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int, float, torch.Tensor | None]:
    before, window, padded, share = case
    generator = torch.Generator().manual_seed(head_dim + length + group)
    batch, heads = 1 + padded, 2
    # Tokens before heads, as projections leave them; and keys as a part of a buffer for more.
    query = torch.randn(batch, length, heads * group, head_dim, generator=generator).transpose(1, 2) * 2
    keys, values = torch.randn(2, batch, heads, before + length + 9, head_dim, generator=generator).to(dtype)
    pad = torch.tensor([0, 50]) if padded else None
    kept = None
    if share is not None:
        kept = torch.rand(heads, before, generator=generator) < share
        kept[0, 100:390] = False  # whole blocks
    count = before + length
    return query.to(dtype), keys[:, :, :count], values[:, :, :count], pad, window, head_dim**-0.5, kept


def sees(case: tuple[int, int, bool, float | None], length: int, args: tuple[object, ...]) -> torch.Tensor:
    """bool [B or 1, heads or 1, T, n]."""
    before, window, _, _ = case
    *_, pad, _, _, kept = args
    row, column = torch.arange(before, before + length)[:, None], torch.arange(before + length)
    mask = ((column <= row) & (column > row - (window or before + length)))[None, None]
    if isinstance(kept, torch.Tensor):
        mask = mask & F.pad(kept, (0, length), value=True)[None, :, None]
    if isinstance(pad, torch.Tensor):
        mask = mask & ((column >= pad.view(-1, 1, 1, 1)) | (column == row))
    return mask


def expected(args: tuple[torch.Tensor, ...], mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """The reference's numbers in float64, in a few products."""
    query, keys, values = (t.double() for t in args[:3])
    grouped = query.unflatten(1, (keys.shape[1], -1))
    logits = grouped @ keys[:, :, None].mT * scaling
    return (logits.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1) @ values[:, :, None]).flatten(1, 2)


def real(found: torch.Tensor, pad: torch.Tensor | None, before: int) -> torch.Tensor:
    """Without what padding sees, which is left open."""
    if pad is None:
        return found
    return found * (torch.arange(before, before + found.shape[2]) >= pad[:, None])[:, None, :, None]


@pytest.fixture(params=["native", "dense", "dense in blocks"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVCOMPILE_KERNELS", "" if request.param == "native" else "torch")
    if request.param == "dense in blocks":
        monkeypatch.setattr(dense, "MASK_ELEMENTS", 2000)
    return str(request.param)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float32), (24, torch.bfloat16)])
def test_the_reference_is_met(
    implementation: str, case: tuple[int, int, bool, float | None], length: int, head_dim: int, dtype: torch.dtype
) -> None:
    args = inputs(case, length, 3, head_dim, dtype)
    found, wanted = prompt_attention(*args), reference.prompt_attention(*args)
    assert found.isfinite().all()
    pad = args[3]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pair = real(found, pad, case[0]).double(), real(wanted, pad, case[0])
    torch.testing.assert_close(*pair, atol=tolerance, rtol=tolerance)


SOFTMAXES = {
    "capped": Softmax(cap=0.7),
    "sinks": Softmax(sinks=torch.tensor([2.0, -40.0, 0.0, 50.0, -1.0, 0.3])),
    "capped, with sinks": Softmax(0.7, torch.tensor([2.0, -3.0, 0.0, 1.0, -1.0, 0.3])),
}


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_weights_than_a_softmax_of_logits(
    implementation: str, case: tuple[int, int, bool, float | None], softmax: Softmax, dtype: torch.dtype
) -> None:
    args = inputs(case, 13, 3, 16, dtype)
    found, wanted = (attend(*args, softmax=softmax) for attend in (prompt_attention, reference.prompt_attention))
    plain = reference.prompt_attention(*args)
    assert (real(wanted, args[3], case[0]) - real(plain, args[3], case[0])).abs().max() > 0.1
    pair = real(found, args[3], case[0]).double(), real(wanted, args[3], case[0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*pair, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_it_loses_no_more_than_torch(monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: torch.dtype) -> None:
    monkeypatch.delenv("KVCOMPILE_KERNELS", raising=False)
    if not prompt.usable(*inputs(CASES[0], 1, 1, head_dim, dtype)[:3], 1.0):
        pytest.skip("torch does it")
    shapes = [(1, 1), (1, 7), (3, 5), (63, 1), (64, 5), (65, 7), (300, 1)]
    for case, name in zip(CASES, IDS, strict=True):
        ours, torchs, bound = 0.0, 0.0, 1e-5 if dtype == torch.float32 else 5e-2
        for length, group in shapes:
            args = inputs(case, length, group, head_dim, dtype)
            mask = sees(case, length, args)
            wanted = expected(args, mask, args[5])
            whole = not case[0]
            by_torch = F.scaled_dot_product_attention(
                *args[:3], attn_mask=None if whole else mask.repeat_interleave(group if mask.shape[1] > 1 else 1, 1),
                is_causal=whole, scale=args[5], enable_gqa=True,
            )  # fmt: skip
            found = prompt_attention(*args)
            assert found.isfinite().all()
            off, torchs_off = (real(out.double() - wanted, args[3], case[0]) for out in (found, by_torch))
            assert off.abs().max() < bound, (name, length, group)
            # Few rows say little: what counts is the sum over all shapes.
            ours, torchs = ours + off.square().sum().item(), torchs + torchs_off.square().sum().item()
        assert ours**0.5 <= 1.5 * torchs**0.5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.delenv("KVCOMPILE_KERNELS", raising=False)
    query, keys, values, *rest = inputs(CASES[0], 700, 3, 64, dtype)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(prompt_attention(query, keys, values, *rest))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    first = prompt_attention(query[:, :, :333], keys[:, :, :333], values[:, :, :333], *rest)
    last = prompt_attention(query[:, :, 333:], keys, values, *rest)
    torch.testing.assert_close(torch.cat([first, last], 2), found[0])


def test_what_is_no_number_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCOMPILE_KERNELS", raising=False)
    for dtype in (torch.float32, torch.bfloat16):
        query, keys, values, *rest = inputs(CASES[0], 40, 1, 16, dtype)
        keys[0, 0, 20] = torch.nan
        found = prompt_attention(query, keys, values, *rest)
        assert found[0, 0, 20:].isnan().all()
        assert found[0, 0, :20].isfinite().all()
        assert found[0, 1].isfinite().all()


def test_it_leaves_to_torch_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCOMPILE_KERNELS", raising=False)
    query, keys, values = inputs(CASES[0], 5, 1, 16, torch.float32)[:3]
    assert not prompt.usable(query.half(), keys.half(), values.half(), 1.0)
    assert not prompt.usable(query[..., :12], keys[..., :12], values[..., :12], 1.0)
    assert not prompt.usable(query, keys, values.mT.contiguous().mT, 1.0)
    assert not prompt.usable(query, keys, values, -1.0)
    assert not prompt.usable(query.requires_grad_(), keys, values, 1.0)
    prompt_attention(query, keys, values, None, 0, 1.0).sum().backward()
    assert query.grad is not None
    monkeypatch.setenv("KVCOMPILE_KERNELS", "torch")
    assert not prompt.usable(query.detach(), keys, values, 1.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, keys, values = inputs(CASES[0], 5, 2, 16, torch.float32)[:3]
    with pytest.raises(ValueError, match="keys and values"):
        prompt_attention(query, keys, values[:, :, 1:], None, 0, 1.0)
    with pytest.raises(ValueError, match="multiple of the heads"):
        prompt_attention(query[:, :3], keys, values, None, 0, 1.0)
    with pytest.raises(ValueError, match="expected bool"):
        prompt_attention(query, keys, values, None, 0, 1.0, torch.ones(2, 5, dtype=torch.bool))
