"""Adapters for other programs: evaluation harnesses and cache libraries."""
