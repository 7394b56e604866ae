"""The transform in which quantising keys and values costs least, made for the positions that a plan's context has.

numpy only, so that `build --from` makes it anew without the model.
"""

from kvcompile.quantiser.balance import TINY, about, balanced, quantisation_error, spread, unit_trace
from kvcompile.quantiser.key_moments import key_moments, stored_moments
from kvcompile.quantiser.positions import Positions, fit_keys, for_context, key_growth, layer_positions
from kvcompile.quantiser.sections import balanced_again, laid_out, sectioned

__all__ = [
    "TINY",
    "Positions",
    "about",
    "balanced",
    "balanced_again",
    "fit_keys",
    "for_context",
    "key_growth",
    "key_moments",
    "laid_out",
    "layer_positions",
    "quantisation_error",
    "sectioned",
    "spread",
    "stored_moments",
    "unit_trace",
]
