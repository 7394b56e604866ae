"""Load a `.kvb` artifact, reorder a model's heads to match, and generate inside the budget."""

from __future__ import annotations

from kvcompile.runtime.attach import Attachment, attach
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.decode import Decoder, generate
from kvcompile.runtime.full_cache import generate_full
from kvcompile.runtime.prefill import prefill_bytes
from kvcompile.runtime.read_before import ReadPrompt, filled, looks_at_queries, read_prompt
from kvcompile.runtime.sampling import Sampling

__all__ = [
    "Attachment", "Decoder", "RaggedCache", "ReadPrompt", "Sampling", "attach", "filled", "generate", "generate_full",
    "looks_at_queries", "prefill_bytes", "read_prompt",
]  # fmt: skip
