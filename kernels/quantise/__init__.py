"""Rounding vectors to 4 or 8 bits, and back."""
