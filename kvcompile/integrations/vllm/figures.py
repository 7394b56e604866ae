"""What an artifact takes in vLLM, in numbers, without torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvcompile.artifacts import DTYPE_BITS, POLICIES, STATE_BYTES, Artifact
from kvcompile.kernels.codecs import codec_of, is_quantised
from kvcompile.kernels.codecs.base import SCALE_BYTES
from kvcompile.problem.pages import ALIGN, PAGE_ALIGN


@dataclass(frozen=True)
class Figures:
    """`bytes_per_sequence` are the artifact's, of all ranks together; `page_bytes` is what a sequence takes of each
    rank's memory; `full_cache_share` is the artifact's part of the full cache's bytes at its context."""

    context: int
    bytes_per_sequence: int
    page_bytes: int
    full_cache_share: float

    @classmethod
    def of(cls, artifact: Artifact, ranks: int = 1) -> Figures:
        """Of an artifact on so many tensor-parallel ranks."""
        account, target = artifact.bytes, artifact.target
        share = account.resident / max(account.full, 1)
        return cls(target.context, account.resident // target.batch, page_bytes(artifact, ranks), share)


def page_bytes(artifact: Artifact, ranks: int = 1) -> int:
    """Bytes of a page, the same on all ranks: `kvcompile.runtime.pages.PageLayout`, counted without its tensors."""
    pages = [_page(artifact, heads) for heads in _heads(artifact, ranks)]
    largest = max(_up(used, step) for used, step in pages)
    return max(_up(largest, step) for _, step in pages)


def _heads(artifact: Artifact, ranks: int) -> list[list[Sequence[int]]]:
    """The KV heads of every rank, layer by layer, as vLLM deals them out; of fewer heads than ranks it gives each to
    several."""
    count, layers = artifact.model.num_kv_heads, range(artifact.model.num_layers)
    orders = None
    if ranks > 1:
        from kvcompile.integrations.vllm.placement import head_orders  # with torch

        orders = head_orders(artifact, ranks)
    orders = orders or [list(range(count)) for _ in layers]
    each, starts = max(1, count // ranks), [rank * count // ranks for rank in range(ranks)]
    return [[orders[layer][start : start + each] for layer in layers] for start in starts]


def _page(artifact: Artifact, heads: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The bytes that one rank's buffers of a sequence take, and the number of which its page is a multiple."""
    head_dim, budgets, used = artifact.model.head_dim, artifact.budgets, 0
    exact = head_dim * DTYPE_BITS[artifact.target.dtype] // 8
    for layer, here in enumerate(heads):
        buffers: Counter[str] = Counter()
        for h in here:
            at = (layer, h)
            capacity, policy = int(budgets.capacity[at]), POLICIES[budgets.policy[at]]
            buffers["scores"] += capacity * STATE_BYTES[policy]
            for side, table in (("key", budgets.k_bits), ("value", budgets.v_bits)):
                bits = int(table[at])
                if not is_quantised(bits):
                    buffers[side] += capacity * exact
                    continue
                codec = codec_of(bits)
                buffers[f"{side} codes"] += capacity * codec.code_bytes(head_dim)
                buffers[f"{side} scales"] += capacity * SCALE_BYTES * codec.groups(head_dim)
                if codec.needs_anchor and budgets.sink[at] > 0:
                    buffers[f"{side} anchors"] += exact
        used += sum(_up(size, ALIGN) for size in buffers.values())
    return used, math.lcm(PAGE_ALIGN, exact)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
