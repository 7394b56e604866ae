"""The first stage: episodes with a replay give what the scorer and the quantiser are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvcompile.artifacts import Quantiser, Scorer
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import follow, over_context, pack, read_and_compare
from kvcompile.profile.moments import MOMENTS, Moments, fit_quantiser, keys_of, moment_shapes, moments
from kvcompile.profile.resume import Sums
from kvcompile.profile.setting import Setting, tokens_of
from kvcompile.profile.structure import Tick, attention_layers, head_dim, heads
from kvcompile.profile.utility import fit_scorer, normal_sums, utilities
from kvcompile.quantiser import Positions
from kvcompile.stages import KeyMoments


@dataclass(frozen=True, eq=False)
class Fitted:
    """The scorer; the quantiser, for keys at the positions of the window; and the moments of keys that it is made
    from."""

    scorer: Scorer
    quantiser: Quantiser
    keys: KeyMoments


class Fit:
    """Sums over the episodes to fit on: the scorer's normal equations, moments of keys and values, and the cosines of
    BaKlaVa and SqueezeAttention."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.work = [setting.work(tokens_of(episode)) for episode in setting.material.fit]
        self._fitted: Fitted | None = None

    def fresh(self) -> Sums:
        model = self.setting.model
        num_layers = len(attention_layers(model))
        num_heads, num_kv_heads = heads(model)
        inputs = model.config.get_text_config().hidden_size + 1  # the last one is the constant 1 of the bias
        shapes = moment_shapes(num_kv_heads, head_dim(model))
        return {
            # [L, d + 1, d + 1] is most of what is kept between items: float32, to halve it.
            "squares": np.zeros((num_layers, inputs, inputs), np.float32),
            "products": np.zeros((num_layers, inputs, num_kv_heads), np.float32),
            **{name: np.zeros((num_layers, *shape)) for name, shape in shapes.items()},
            "value_cosine": np.zeros((num_layers, num_heads)),
            "residual_cosine": np.zeros(num_layers),
        }

    def add(self, sums: Sums, number: int, tick: Tick) -> None:
        model, episode = self.setting.model, self.setting.material.fit[number]
        context, cosines = read_and_compare(model, episode.context, tick)
        sums["value_cosine"] += cosines.value
        sums["residual_cosine"] += cosines.residual
        packed = pack(len(context), episode.follow_ups)
        attend = over_context(context, packed)

        def watch(call: Attention) -> Tensor:
            layer = call.layer
            utility = utilities(call, context, packed)
            square, product = normal_sums(context.hidden[layer], utility, episode.replayed, self.setting.sink)
            sums["squares"][layer] += square
            sums["products"][layer] += product
            projection = attention_layers(model)[layer].get_parameter("self_attn.o_proj.weight")
            for name, value in vars(moments(call, context, packed, projection, self.setting.rotary)).items():
                sums[name][layer] += value
            return attend(call)

        follow(model, context, packed, watch, tick)

    def result(self, sums: Sums) -> Fitted:
        """What the sums give once all episodes are in them. Made once: the stages after this one ask for every item."""
        if self._fitted is None:
            by_layer = [Moments(*(sums[name][layer] for name in MOMENTS)) for layer in range(len(sums["squares"]))]
            keys = keys_of(by_layer, self.setting.rotary)
            # Losses are measured on contexts of the window, so the keys' transform is first made for its positions.
            window = (Positions(0, self.setting.window),) * len(by_layer)
            scorer = fit_scorer(sums["squares"], sums["products"])
            self._fitted = Fitted(scorer, fit_quantiser(by_layer, keys, window), keys)
        return self._fitted
