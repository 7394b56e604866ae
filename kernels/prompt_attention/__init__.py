"""Exact attention of prompts."""
