"""The transform in which quantising keys and values costs least, made for the positions that a plan's context has.

numpy only, so that `build --from` makes it anew without the model.
"""

from kvcompile.quantiser.balance import balanced, quantisation_error, spread
from kvcompile.quantiser.moments import KeyMoments, Moment, key_moments, stored_moments
from kvcompile.quantiser.positions import Positions, fit_keys, for_context, key_growth, layer_positions
from kvcompile.quantiser.rotary import Rotary

__all__ = [
    "KeyMoments",
    "Moment",
    "Positions",
    "Rotary",
    "balanced",
    "fit_keys",
    "for_context",
    "key_growth",
    "key_moments",
    "layer_positions",
    "quantisation_error",
    "spread",
    "stored_moments",
]
