"""The values that pass from stage to stage of the compiler: plain, immutable, numpy only.

calibration -> `Profile` (in `Parts`) -> `Problem` -> `Plan` -> artifact. No stage changes one or reaches back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import Quantiser, Scorer, anchor_bytes, slot_bytes

DEFAULT_SINK = 4
"""First tokens that are always kept (StreamingLLM, arXiv 2309.17453)."""

RETRIEVAL = "retrieval"
"""The family of all episodes' questions; the other families are those of the texts."""

WORST = 0.5
"""Weight of the worst family beside the mean over families, in the loss that is minimised."""

Report = Callable[[str, int, int], None]
"""Called with a stage's name, the work done and the work in all (0: not known)."""


@dataclass(frozen=True)
class Rotary:
    """`frequency` f32 [L, D], radians a token; `partner` i32 [D], its own inverse. `context`: the frequencies are those
    of sequences of this many tokens, 0 where they are the same for every length."""

    frequency: NDArray[np.float32]
    partner: NDArray[np.int32]
    context: int = 0

    def serves(self, context: int) -> bool:
        """Whether the frequencies hold for sequences of `context` tokens."""
        return self.context in (0, context)


@dataclass(frozen=True)
class Moment:
    """Mean f32 [L, H, D], and covariance about it as the packed rows of a lower triangle A, C = A A':
    `factor` f16 [L, H, D (D + 1) / 2]. Half precision of a square root keeps the small eigenvalues that half precision
    of C itself would drown, and whatever is stored, C has no negative one."""

    mean: NDArray[np.float32]
    factor: NDArray[np.float16]

    def second(self, layer: int) -> NDArray[np.float64]:
        """Second moments about 0, [H, D, D], of one layer."""
        lower = unpacked(self.factor[layer], self.mean.shape[-1])
        mean = self.mean[layer].astype(np.float64)
        second: NDArray[np.float64] = lower @ lower.swapaxes(-1, -2) + mean[..., :, None] * mean[..., None, :]
        return second


@dataclass(frozen=True, eq=False)
class KeyMoments:
    """What a transform of keys is made from for any positions: `plain`, over all tokens; `attended`, over tokens
    weighted by the attention they get; `query`, over queries, mean 0. All before `rotary`, though with its scaling."""

    plain: Moment
    attended: Moment
    query: Moment
    rotary: Rotary


@dataclass(frozen=True)
class KeptLosses:
    """What codecs cost among the tokens that are left where a head keeps `tokens` i32 [R] of the window, ascending:
    `key` f32 [F, L, H, R, Qk] and `value` f32 [F, L, H, R, Qv], as in `Profile`. What is evicted brings no error, and
    what stays has more of the attention."""

    tokens: NDArray[np.int32]
    key: NDArray[np.float32]
    value: NDArray[np.float32]


@dataclass(frozen=True)
class Profile:
    """What profiling measured of one model. L layers, H KV heads, F families of text, P policies, C budgets, Q codecs.

    Losses are a family's predicted KL to the full cache, nats a token, when a head alone is changed; they add up.

    `families` F names. `window` tokens of the calibration contexts, `tokens` i32 [C] ascending budgets (sinks included)
    in tokens of such a context; `tokens[-1] == window`. `shares` f32 [P]: the part of a budget, sinks not counted, that
    is a ring of recent tokens: 1 is the policy `recent`, less is `scored` with this part protected.
    `loss` f32 [F, L, H, P, C]: what eviction costs; 0 at `window`, not always monotone.
    `key_bits`, `value_bits` i32 [Q]: ids of codecs, as many as were measured on each side; `key_loss`, `value_loss` f32
    [F, L, H, Q]: what it costs to store all of the head's keys, or values, in that codec at the window's positions; it
    adds to the loss of eviction. `kept`: the same for heads that evict, None in artifacts from before it was measured.
    `keys`: what the transform of keys is made from for other positions, None in artifacts from before they had it.
    `checks` f32 [N, 2]: of whole plans that were run: heads' losses in sum, half texts and half questions; and KL.
    `factor`: measured over summed, where losses add up, by which they are to be multiplied; `correlation`: their rank
    correlation (Spearman) over these plans; 1 and NaN where nothing was measured.
    `baklava` f32 [L, H]: head x layer importance. `squeeze` f32 [L]: cosine similarity across the attention block.
    `surfacelogic` f32 [L, H]: INFsc in [0, 1].
    """

    families: tuple[str, ...]
    window: int
    tokens: NDArray[np.int32]
    shares: NDArray[np.float32]
    loss: NDArray[np.float32]
    key_bits: NDArray[np.int32]
    value_bits: NDArray[np.int32]
    key_loss: NDArray[np.float32]
    value_loss: NDArray[np.float32]
    factor: float
    correlation: float
    baklava: NDArray[np.float32]
    squeeze: NDArray[np.float32]
    surfacelogic: NDArray[np.float32]
    keys: KeyMoments | None = None
    checks: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    kept: KeptLosses | None = None

    def codec_loss(self, kind: str, tokens: NDArray[Any]) -> NDArray[np.float64]:
        """What it costs to store keys or values (`kind`) in each codec where a head keeps `tokens` [T] of the window:
        float64 [F, L, H, T, Q]. Between the budgets where it was measured, a power of the budget."""
        whole = getattr(self, f"{kind}_loss").astype(np.float64)[..., None, :]
        if self.kept is None:
            return np.repeat(whole, len(tokens), axis=-2)
        table = np.concatenate([getattr(self.kept, kind).astype(np.float64), whole], axis=-2)
        axis = np.log([*self.kept.tokens.tolist(), self.window])
        place = np.interp(np.log(np.maximum(tokens, 1)), axis, np.arange(len(axis)))
        low = np.minimum(place.astype(int), len(axis) - 2)
        along, logs = (place - low)[:, None], np.log(np.maximum(table, 1e-30))
        found: NDArray[np.float64] = np.exp(logs[..., low, :] * (1 - along) + logs[..., low + 1, :] * along)
        return found


@dataclass(frozen=True)
class Problem:
    """One sequence's share of the target, and everything an allocator may use to divide it.

    `limit` i32 [L]: tokens at which a head of the layer is full. `fixed` bool [L]: the layer keeps its own sliding
    window (`limit` tokens, policy recent, no sinks, elements of `dtype_bits`), whatever it costs; allocators leave
    those rows alone. `target` is bytes for one sequence. `dtype_bits` are those of the cache dtype, and
    `key_bits` and `value_bits` (these, or ids of codecs) what an allocator may choose from; one that does not choose
    takes the first of each. `policy` is the token policy the allocator should use and `sink` its protected first
    tokens.
    `key_growth` [L, H] multiplies the profile's `key_loss`: what the context's positions make of it.
    `classes` is the most distinct choices (policy, capacity, sink, recent, bits) in a layer, None for any number.
    `perplexity`, where a model is at hand, measures a table of `recent` budgets (i32 [L, H] tokens) on real text.
    """

    profile: Profile
    limit: NDArray[np.int32]
    fixed: NDArray[np.bool_]
    num_kv_heads: int
    head_dim: int
    dtype_bits: int
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    target: int
    context: int
    key_growth: NDArray[np.float64] | float = 1.0
    policy: str = "recent"
    sink: int = DEFAULT_SINK
    classes: int | None = None
    perplexity: Callable[[NDArray[np.int32]], float] | None = None

    def anchor_bytes(self, k_bits: int | None = None, v_bits: int | None = None) -> int:
        """Bytes of a head's exact copies of token 0; bits default to the first that there are."""
        k, v = k_bits or self.key_bits[0], v_bits or self.value_bits[0]
        return anchor_bytes(self.sink, self.head_dim, k, v, self.dtype_bits)

    def slot_bytes(self, policy: str, k_bits: int | None = None, v_bits: int | None = None) -> int:
        """Bytes of one slot; bits default to the first that there are."""
        return slot_bytes(policy, self.head_dim, k_bits or self.key_bits[0], v_bits or self.value_bits[0])


@dataclass(frozen=True)
class Plan:
    """An allocator's answer: policy, tokens, sinks, protected recent tokens and bits of every head, all [L, H].

    `loss` is the predicted loss where the allocator knows one (`kvcompile.allocators.predicted`), else NaN; `report` is
    what it wants to say of itself (objective, bound, gap, parameters chosen); `seconds` is its wall time, for display
    only.
    """

    policy: NDArray[np.uint8]
    capacity: NDArray[np.int32]
    sink: NDArray[np.int32]
    recent: NDArray[np.int32]
    k_bits: NDArray[np.uint8]
    v_bits: NDArray[np.uint8]
    loss: float
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Parts:
    """What goes into an artifact beside the plan: the profile, and the scorer and quantiser that it is for."""

    profile: Profile
    scorer: Scorer | None
    quantiser: Quantiser | None


@dataclass(frozen=True)
class Tools:
    """What solving can use where a model is at hand: `perplexity` of a table of `recent` budgets for a problem, and
    `kl`, the measured divergence of a plan for it, in nats a token."""

    perplexity: Callable[[Problem], Callable[[NDArray[np.int32]], float]]
    kl: Callable[[Problem, Plan], float]


def unpacked(factor: NDArray[np.float16], size: int) -> NDArray[np.float64]:
    """The lower triangles [..., D, D] of their packed rows."""
    lower = np.zeros((*factor.shape[:-1], size, size))
    rows, columns = np.tril_indices(size)
    lower[..., rows, columns] = factor
    return lower
