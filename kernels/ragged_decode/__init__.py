"""Attention of new tokens over a ragged store."""
