"""The second stage: SurfaceLogicKV's inference score (arXiv 2508.15806) of every head, from retrieval probes with known
answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.profile.attention import BLOCK, Attention, causal, visible
from kvcompile.profile.given import given, lend, lent_names
from kvcompile.profile.held import Held
from kvcompile.profile.job import Additions, Item
from kvcompile.profile.lanes import Lane
from kvcompile.profile.layerwise import through
from kvcompile.profile.resume import Sums
from kvcompile.profile.setting import Probe, Setting
from kvcompile.profile.structure import head, heads, layers, logits, place_of, planned_layers
from kvcompile.runtime.parts import planned

TOP = 10
"""Positions of highest attention that count as what a head retrieves."""


class Probes:
    """The score of every probe, `infsc` [N, L, H], and which of them the model answers rightly, `answered` [N]: those
    whose every token it predicts when it is fed the right answer token by token."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.probes = setting, setting.material.probes
        self.lanes = [_lane(number, probe) for number, probe in enumerate(self.probes)]

    def fresh(self) -> Sums:
        _, num_kv_heads = heads(self.setting.model)
        table = (len(self.probes), len(planned_layers(self.setting.model)), num_kv_heads)
        return {"answered": np.zeros(len(self.probes), np.bool_), "infsc": np.zeros(table)}

    def at(self, layer: int) -> Iterator[Item]:
        """The items of one layer, a probe each."""
        part = layers(self.setting.model)[layer]
        return (Item(partial(self._read, layer, i), part, len(lane.ids), i) for i, lane in enumerate(self.lanes))

    def answers(self) -> Iterator[Item]:
        """Items that see whether the probes are answered, once they are through all layers."""
        return (Item(partial(self._answer, i), head(self.setting.model), owner=i) for i in range(len(self.lanes)))

    @torch.no_grad()
    def _read(self, layer: int, number: int, sums: Sums, held: Held) -> Additions:
        model, lane, probe = self.setting.model, self.lanes[number], self.probes[number]
        before = held.one(lane.at(layer))
        part, found = layers(model)[layer], list[NDArray[np.float64]]()

        def attend(call: Attention) -> Tensor:
            if planned(part):
                found.append(layer_score(call, probe))
            return causal(call)

        arguments = given(self.setting, lane, layer, held)
        after = through(part, before, arguments, attend)
        lend(self.setting, lane, layer, arguments, held)
        held.put(lane.at(layer + 1), hidden=after)
        held.drop(lane.at(layer))
        return [("infsc", (number, place_of(model, layer)), one) for one in found]

    @torch.no_grad()
    def _answer(self, number: int, sums: Sums, held: Held) -> Additions:
        lane, probe = self.lanes[number], self.probes[number]
        final = held.one(lane.at(len(layers(self.setting.model))))[0]
        predicted = logits(self.setting.model, final[len(probe.prompt_ids) - 1 :]).argmax(-1)
        right = np.array_equal(predicted.cpu().numpy(), probe.answer_ids)
        held.drop(lane.at(len(layers(self.setting.model))), *lent_names(self.setting, lane.lent))
        return [("answered", number, right)]


def _lane(number: int, probe: Probe) -> Lane:
    """Prompt and answer but for its last token: the rows looked at are those that predict a token of the answer."""
    ids = np.concatenate([probe.prompt_ids, probe.answer_ids[:-1]])
    return Lane(f"probe{number}", ids, np.arange(len(ids)), number)


def layer_score(call: Attention, probe: Probe) -> NDArray[np.float64]:
    """The score of a layer's KV heads, float64 [H] in [0, 1]: mean over the answer's tokens and a group's heads."""
    prompt, length = len(probe.prompt_ids), call.key.shape[1]
    needle = torch.zeros(length, dtype=torch.bool, device=call.key.device)
    for first, stop in probe.needles:
        needle[first:stop] = True
    rows = torch.arange(prompt - 1, length, device=call.key.device)
    steps = torch.cat([retrieval(attention_rows(call, block), needle) for block in torch.split(rows, BLOCK)], dim=1)
    table: NDArray[np.float64] = steps.double().mean(1).view(len(call.key), -1).mean(1).cpu().numpy()
    return table


def infsc(sums: Sums) -> NDArray[np.float64]:
    """Sums of the scores, float64 [L, H], over the probes that the model answers; where it answers none, over all, as
    what its heads attend to while they read the answer is then the best there is."""
    chosen = sums["answered"] if sums["answered"].any() else np.ones_like(sums["answered"])
    total: NDArray[np.float64] = sums["infsc"][chosen].sum(0)
    return total


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
