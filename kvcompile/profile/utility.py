"""The utility of a token of the context to a KV head, and the linear scorer that predicts it.

The utility of a token is the largest attention that any judged row of any follow-up, and any query head of the group,
pays to it (KVzip, arXiv 2505.23416, takes the replay alone). Its logarithm is fitted by ridge regression from the
attention block's input, as KVzap (arXiv 2601.07891) does from stored activations; here only sums are kept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Scorer
from kvcompile.kernels import attention_peaks
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, Packed
from kvcompile.runtime.references import LEAST

LARGEST = float(np.finfo(np.float16).max)
"""What an artifact can hold of a scorer's weight."""
RIDGE = 1e-3
"""Added to the diagonal of the normal equations, as a share of it."""


def utilities(call: Attention, context: Context, packed: Packed) -> Tensor:
    """Largest attention on each token of the context, float32 [H, n]."""
    keys = context.keys[call.layer]
    found = []
    for block in packed.blocks:
        rows, own = slice(block.judged, block.stop), call.key[:, block.start : block.stop]
        places = torch.arange(block.judged - block.start, block.stop - block.start, device=keys.device)
        window = call.window or 0
        found.append(attention_peaks(call.query[:, rows], keys, own, places, call.scaling, window, call.softmax))
    return torch.stack(found).amax(0)


def normal_sums(
    hidden: Tensor, utility: Tensor, replayed: tuple[int, int], sink: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """X'X [d + 1, d + 1] and X'y [d + 1, H] of the `replayed` tokens of one context in one layer: X is `hidden` [n, d]
    with a column of ones, y the log of `utility` [H, n]. Sinks are left out: they are kept anyway, and nothing else is
    like them."""
    # Only tokens that the replay needs again: of the others, little attention here does not say that they are useless.
    part = slice(max(replayed[0], sink), replayed[1])
    inputs = torch.nn.functional.pad(hidden[part].float(), (0, 1), value=1.0)
    target = utility[:, part].clamp_min(LEAST).log().mT
    return (inputs.mT @ inputs).cpu().numpy(), (inputs.mT @ target).cpu().numpy()


def fit_scorer(squares: NDArray[np.float32], products: NDArray[np.float32]) -> Scorer:
    """The scorer that solves the summed normal equations, `squares` X'X [L, d + 1, d + 1] and `products` X'y
    [L, d + 1, H]: of every head, w = (X'X + RIDGE diag(X'X))^-1 X'y."""
    weights = []
    for square, product in zip(squares, products, strict=True):
        # In float64: X'X has the square of X's condition number.
        system = square.astype(np.float64)
        diagonal = np.diag(system).copy()
        diagonal[-1] = 0.0  # the bias is free
        # A share of each diagonal entry: rescaling a channel then rescales its weight and changes no score. The second
        # term is for channels that are always 0.
        system[np.diag_indices_from(system)] += RIDGE * diagonal + 1e-12 * diagonal.max()
        weights.append(np.linalg.solve(system, product.astype(np.float64)).T)
    table = np.stack(weights)
    weight = table[..., :-1].clip(-LARGEST, LARGEST)  # of a channel that is nearly always 0
    return Scorer(weight=weight.astype(np.float16), bias=table[..., -1].astype(np.float32))


def scores(scorer: Scorer, layer: int, hidden: Tensor) -> Tensor:
    """Scores of a context's tokens in one layer, float32 [H, n], as the runtime computes and stores them."""
    weight = torch.from_numpy(scorer.weight[layer].astype(np.float32)).to(hidden.device)
    bias = torch.from_numpy(np.array(scorer.bias[layer])).to(hidden.device)
    # Half precision as in the cache: tokens that tie there tie here.
    return torch.nn.functional.linear(hidden.float(), weight, bias).half().float().mT
