"""As much haystack as fits."""

from __future__ import annotations

from collections.abc import Callable

LEAST_SLOPE = 0.5
"""Tokens of a unit; fewer would only be met where two sizes hardly differ."""
PROBE = 16
"""Units by which the first guess of the slope goes up."""


def largest(size: Callable[[int], int], room: int, least: int, most: int) -> int:
    """The number of units from `least` to `most` with a size of at most `room` tokens, next to one that has more (or
    `most`); `least` has to fit. Sizes, which grow about evenly, are looked at in few places."""
    fits, fitting = least, size(least)
    beyond, step = most + 1, PROBE
    while beyond - fits > 1:
        guess = fits + min(max(step, 1), beyond - fits - 1)
        found = size(guess)
        slope = max((found - fitting) / (guess - fits), LEAST_SLOPE)
        if found <= room:
            fits, fitting = guess, found
        else:
            beyond = guess
        step = int((room - fitting) / slope)
    return fits
