"""What layers are called with beside the residual stream, for lanes whose states are held: arguments by position,
inputs by token, and keys and values of an earlier layer (`kvcompile.runtime.parts.sources`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvcompile.profile.held import Held
from kvcompile.profile.lanes import Lane
from kvcompile.profile.setting import Setting
from kvcompile.profile.structure import layers, lends, source_layer
from kvcompile.runtime.token_inputs import has_token_inputs

Names = Callable[[int], str]
"""Under which name a layer's keys and values [1, H, n, D] are held for later layers."""


def given(setting: Setting, lane: Lane, layer: int, held: Held, names: Names | None = None) -> dict[str, Any]:
    """The arguments of a layer; `names` are the lane's own where nothing else is said."""
    embedded = held.one(lane.embedded) if has_token_inputs(setting.model) else None
    source, lent = source_layer(setting.model, layer), None
    if source != layer:
        kept = held.get((names or lane.lent)(source))
        lent = kept["key"], kept["value"]
    return setting.calls.of(layer, lane.positions, lane.ids, embedded, lent)


def lent_names(setting: Setting, names: Names) -> list[str]:
    """Those of all layers that later ones attend to."""
    return [names(layer) for layer in range(len(layers(setting.model))) if lends(setting.model, layer)]


def lend(
    setting: Setting, lane: Lane, layer: int, arguments: dict[str, Any], held: Held, names: Names | None = None
) -> None:
    """Hold the keys and values that a layer has left among its arguments, where later layers attend to them."""
    if lends(setting.model, layer):
        key, value = setting.calls.lent(layer, arguments)
        held.put((names or lane.lent)(layer), key=key, value=value)
