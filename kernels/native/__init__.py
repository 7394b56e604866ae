"""Decode steps, and what is kept of prompts, in C, for CPUs: made with the machine's own compiler when first needed.

Where there is no C compiler, everything goes through torch; `KVCOMPILE_KERNELS=torch` leaves it alone.
"""

from kvcompile.kernels.native import back, cut
from kvcompile.kernels.native.decode import append, one_token, step, takes_steps
from kvcompile.kernels.native.library import MOST_DIM, usable

__all__ = ["MOST_DIM", "append", "back", "cut", "one_token", "step", "takes_steps", "usable"]
