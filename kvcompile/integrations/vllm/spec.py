"""What vLLM's scheduler is told: one block a sequence, of a constant number of bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvcompile.artifacts import CacheError


@dataclass(frozen=True, kw_only=True)
class CompiledSpec(CircularBufferSpec):
    """A page of `state_content_bytes` for a sequence, for its whole life. vLLM finds the manager of a spec by its
    class, and that of a circular buffer does just this: one block a request, no slots, no prefix caching."""

    dcp_sharded: bool = False
    non_causal: bool = False
    """True makes vLLM schedule prompts whole (its word for attention that cannot be computed in chunks)."""

    @classmethod
    def of(cls, nbytes: int, block_size: int, whole_prompts: bool) -> CompiledSpec:
        return cls(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.int8, num_head_slots=1, tokens_per_state=-1,
            state_content_bytes=nbytes, non_causal=whole_prompts,
        )  # fmt: skip


def check_spec() -> None:
    """Raises CacheError where this vLLM treats the spec otherwise than the one it was written for."""
    KVCacheSpecRegistry._ensure_registered()  # its own first: they are skipped if the list is not empty
    spec = CompiledSpec.of(1024, 16, False)
    if KVCacheSpecRegistry.get_manager_class(spec) is not CircularBufferManager or spec.page_size_bytes != 1024:
        raise CacheError("this vLLM does not keep a state of constant size for a sequence: expected vLLM 0.32")
