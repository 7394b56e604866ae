"""Cutting a prompt's keys and values down to the budget, quantised on the way."""
