"""What an allocator is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_SINK = 4
"""First tokens that are always kept (StreamingLLM, arXiv 2309.17453)."""


@dataclass(frozen=True)
class Profile:
    """What profiling measured of one model. L layers, H KV heads, C grid points.

    `tokens` i32 [C] ascending: budgets (sinks included) in tokens of the calibration `window`; `tokens[-1] == window`.
    `recent_loss` f32 [L, H, C]: predicted KL to the full cache (nats a token) when that head alone keeps its sinks and
    the most recent tokens up to that budget; 0 at `window`, not always monotone.
    `baklava` f32 [L, H]: head x layer importance. `squeeze` f32 [L]: cosine similarity across the attention block.
    `surfacelogic` f32 [L, H]: INFsc in [0, 1].
    """

    window: int
    tokens: NDArray[np.int32]
    recent_loss: NDArray[np.float32]
    baklava: NDArray[np.float32]
    squeeze: NDArray[np.float32]
    surfacelogic: NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """One sequence's share of the target, and everything an allocator may use to divide it.

    `limit` i32 [L]: tokens at which a head of the layer is full. `fixed` bool [L]: the layer keeps its own sliding
    window (`limit` tokens, policy recent, no sinks), whatever it costs; allocators leave those rows alone.
    `slot_bytes` maps a policy to the bytes of one slot. `target` is bytes for one sequence.
    `policy` is the token policy the allocator should use and `sink` its protected first tokens.
    `perplexity`, where a model is at hand, measures a table of `recent` budgets (i32 [L, H] tokens) on real text.
    """

    profile: Profile
    limit: NDArray[np.int32]
    fixed: NDArray[np.bool_]
    num_kv_heads: int
    slot_bytes: Mapping[str, int]
    target: int
    context: int
    policy: str = "recent"
    sink: int = DEFAULT_SINK
    perplexity: Callable[[NDArray[np.int32]], float] | None = None


@dataclass(frozen=True)
class Plan:
    """An allocator's answer: policy, tokens, sinks and protected recent tokens of every head, all [L, H].

    `loss` is the predicted loss where the allocator knows one (sum over heads), else NaN; `report` is what it wants to
    say of itself (objective, bound, gap, parameters chosen); `seconds` is its wall time, for display only.
    """

    policy: NDArray[np.uint8]
    capacity: NDArray[np.int32]
    sink: NDArray[np.int32]
    recent: NDArray[np.int32]
    loss: float
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
