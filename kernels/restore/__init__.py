"""Attention over transformed values, transformed back."""
