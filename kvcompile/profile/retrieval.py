"""The second stage: SurfaceLogicKV's inference score (arXiv 2508.15806) of every head, from retrieval probes with known
answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.profile.attention import BLOCK, Attention, attending, causal, visible
from kvcompile.profile.resume import Sums
from kvcompile.profile.setting import Probe, Setting
from kvcompile.profile.structure import Tick, attention_layers, forward, heads, logits

TOP = 10
"""Positions of highest attention that count as what a head retrieves."""


@dataclass(frozen=True)
class ProbeScore:
    """`infsc` float64 [L, H] in [0, 1], mean over the answer's tokens and a group's query heads; `answered`: whether
    the model, fed the right answer token by token, predicts every one of them."""

    infsc: NDArray[np.float64]
    answered: bool


class Probes:
    """Sums of the score, `infsc` [L, H] over all probes and `infsc_answered` over those that the model answers
    rightly, which `answered` counts."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.work = [setting.work(len(p.prompt_ids) + len(p.answer_ids) - 1) for p in setting.material.probes]

    def fresh(self) -> Sums:
        _, num_kv_heads = heads(self.setting.model)
        table = (len(attention_layers(self.setting.model)), num_kv_heads)
        return {"answered": np.zeros((), np.int64), "infsc": np.zeros(table), "infsc_answered": np.zeros(table)}

    def add(self, sums: Sums, number: int, tick: Tick) -> None:
        result = score(self.setting.model, self.setting.material.probes[number], tick)
        sums["infsc"] += result.infsc
        if result.answered:
            sums["infsc_answered"] += result.infsc
            sums["answered"] += 1


def score(model: Any, probe: Probe, tick: Tick = lambda _: None) -> ProbeScore:
    """One forward pass over prompt and answer; the rows looked at are those that predict a token of the answer."""
    prompt, answer = probe.prompt_ids, probe.answer_ids
    _, num_kv_heads = heads(model)
    infsc = np.zeros((len(attention_layers(model)), num_kv_heads))
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1, device=model.device)
    needle = torch.zeros(len(prompt) + len(answer) - 1, dtype=torch.bool, device=model.device)
    for first, stop in probe.needles:
        needle[first:stop] = True

    def attend(call: Attention) -> Tensor:
        steps = torch.cat([retrieval(attention_rows(call, block), needle) for block in torch.split(rows, BLOCK)], dim=1)
        infsc[call.layer] = steps.double().mean(1).view(num_kv_heads, -1).mean(1).cpu().numpy()
        return causal(call)

    with attending(model, attend):
        trace = forward(model, np.concatenate([prompt, answer[:-1]]), tick)
    with torch.no_grad():
        predicted = logits(model, trace.final[rows]).argmax(-1)
    return ProbeScore(infsc, np.array_equal(predicted.cpu().numpy(), answer))


def attention_rows(call: Attention, rows: Tensor) -> Tensor:
    """Attention probabilities of the queries at positions `rows` alone, float32 [Hq, len(rows), n]."""
    key = call.key.float()
    query = call.query[:, rows].float().view(len(key), -1, key.shape[-1])
    hidden = ~visible(rows, torch.arange(key.shape[1], device=rows.device), call.window)
    weights = (query @ key.mT * call.scaling).view(len(key), -1, len(rows), key.shape[1])
    if call.softmax.plain:
        return weights.masked_fill_(hidden, -torch.inf).softmax(-1).flatten(0, 1)
    return call.softmax.weights(weights, ~hidden).flatten(0, 1)


def retrieval(attention: Tensor, needle: Tensor) -> Tensor:
    """INFsc of attention rows [..., n] with respect to the needle's positions, bool [n]; [...] in [0, 1].

    Our reading, from the authors' earlier published code: with T the row's ten highest positions and N the needle's,
    WTP = sum a[T and N], WFP = sum a[T not N], WFN = sum a[N] - WTP, and the score is the harmonic mean of the
    precision WTP / (WTP + WFP) and the recall WTP / (WTP + WFN), that is 2 WTP / (2 WTP + WFP + WFN).
    """
    top = attention.topk(min(TOP, attention.shape[-1]), dim=-1)
    hit = (top.values * needle[top.indices]).sum(-1)
    # WFP + WTP is the mass of the top; WFN + WTP the needle's, or WTP where rounding makes that smaller.
    return 2 * hit / (top.values.sum(-1) + (attention * needle).sum(-1).clamp_min(hit))


def scaled(infsc: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of all heads stretched to [0, 1]; all 0 where they are equal."""
    spread = infsc.max() - infsc.min()
    stretched: NDArray[np.float64] = (infsc - infsc.min()) / (spread if spread > 0 else 1.0)
    return stretched
