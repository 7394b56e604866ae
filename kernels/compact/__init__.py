"""Cutting a prompt's keys and values down to the budget, rounding on the way."""
