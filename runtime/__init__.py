"""Load a `.kvb` artifact, reorder a model's heads to match, and generate inside the budget."""

from __future__ import annotations

from kvcompile.runtime.attach import Attachment, attach
from kvcompile.runtime.cache import RaggedCache
from kvcompile.runtime.decode import Decoder, generate
from kvcompile.runtime.full_cache import generate_full
from kvcompile.runtime.prefill import prefill_bytes
from kvcompile.runtime.sampling import Sampling

__all__ = ["Attachment", "Decoder", "RaggedCache", "Sampling", "attach", "generate", "generate_full", "prefill_bytes"]
