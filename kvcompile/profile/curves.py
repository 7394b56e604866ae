"""The third stage: other episodes, with quotes, give losses under the fitted scorer and quantiser."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kvcompile.kernels.codecs import profiled
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, after, follow, over_context, pack, read_context
from kvcompile.profile.eviction import SHARES, keep_table
from kvcompile.profile.fisher import BACKWARD_TICKS, backward, head_gradient
from kvcompile.profile.fit import Fit, Fitted
from kvcompile.profile.losses import ReadBack, losses
from kvcompile.profile.quantised import matrices, quantised
from kvcompile.profile.resume import Sums
from kvcompile.profile.setting import Setting, asked_tokens, tokens_of
from kvcompile.profile.structure import Tick, attention_layers, heads
from kvcompile.profile.utility import scores


class Curves:
    """Sums over the episodes to measure on: losses by family, and in `weight` [F] how many episodes each sums over."""

    def __init__(self, setting: Setting, fit: Fit) -> None:
        self.setting, self.fit = setting, fit
        self.work = [setting.work(tokens_of(e) + BACKWARD_TICKS * asked_tokens(e)) for e in setting.material.measure]

    def fresh(self) -> Sums:
        _, num_kv_heads = heads(self.setting.model)
        each = (len(self.setting.families), len(attention_layers(self.setting.model)), num_kv_heads)
        return {
            "weight": np.zeros(each[0]),
            "loss": np.zeros((*each, len(SHARES), len(self.setting.budgets))),
            "key_loss": np.zeros((*each, len(profiled("k")))),
            "value_loss": np.zeros((*each, len(profiled("v")))),
        }

    def add(self, sums: Sums, number: int, tick: Tick) -> None:
        model, sink, episode = self.setting.model, self.setting.sink, self.setting.material.measure[number]
        fitted = self.fit.result(sums)
        context = read_context(model, episode.context, tick)
        packed = pack(len(context), episode.follow_ups)
        attend = over_context(context, packed)
        trace = follow(model, context, packed, attend, tick)
        gradient = head_gradient(model, trace.final, (self.setting.seed, number))
        for block in packed.blocks:
            # What the model says inside a question is not judged; how its rows serve the answer's still is.
            gradient[block.start : block.judged] = 0
        text, questions = self.setting.rows(episode)
        # Budgets are shares of the window: a shorter context is cut in proportion.
        budgets = self.setting.budgets * (len(context) / self.setting.window)
        budgets = np.maximum(budgets, sink + 1).round().astype(np.int32)

        def visit(call: Attention, upstream: Tensor) -> None:
            if call.window is not None and call.window < len(context):
                return  # a sliding layer keeps its own window, so there is nothing to choose
            kept = keep_table(scores(fitted.scorer, call.layer, context.hidden[call.layer]), budgets, sink)
            found = losses(call, upstream, context, packed, kept, _read_back(context, fitted, call.layer))
            for name, tables in (("loss", found.evicted), ("key_loss", found.keys), ("value_loss", found.values)):
                sums[name][text, call.layer] += (tables["continuation"] + tables["quote"]) / 2
                sums[name][questions, call.layer] += tables["question"]

        with after(model, context, packed):
            backward(model, trace, gradient, visit, tick, attend)
        sums["weight"][[text, questions]] += 1


def _read_back(context: Context, fitted: Fitted, layer: int) -> ReadBack:
    def each(kind: str, stored: Tensor) -> tuple[Tensor, ...]:
        transform, mean = matrices(fitted.quantiser, layer, kind, stored.device)
        return tuple(quantised(stored, transform, mean, bits) for bits in profiled(kind[0]))

    return ReadBack(each("key", context.keys[layer]), each("value", context.values[layer]))
