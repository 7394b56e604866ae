"""How much memory it takes to read prompts, beside weights and cache: arithmetic alone, as `inspect` wants it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kvcompile.artifacts.schema import DTYPE_BITS, POLICIES, Artifact, ModelIdentity
from kvcompile.kernels.codecs import is_quantised

PREFILL_CHUNK = 2048
"""Tokens of each prompt that go through a layer at once, where nothing else is asked for."""
MASK_ELEMENTS = 1 << 22
"""Most elements of an attention mask within a prompt; of longer chunks, blocks of queries go through in turn."""
LOGITS_AT_ONCE = 1 << 24
"""Most attention weights (f32) that are formed at once for policies that look at them."""
INNER = 28
"""Elements of the feed-forward block a token, over the hidden size, where the model is not known: 4 x 7, the widest of
the supported families."""
ROPE_BYTES = 12
"""Of a rotary table, an element, while it is made in float32."""
WORKSPACE = 1 << 18
"""Bytes of what matrix products and attention kernels allocate for themselves, beside an eighth of all else."""


def feed_forward_elements(config: Any) -> int:
    """Elements a token that the feed-forward block of a model of this configuration (transformers') holds at once."""
    width, hidden = int(config.intermediate_size), int(config.hidden_size)
    experts = int(getattr(config, "num_experts_per_tok", None) or 0)
    if experts:  # every expert that a token goes to has its own input, gate, product and output
        width = int(getattr(config, "moe_intermediate_size", None) or width)
        return experts * (4 * width + 2 * hidden)
    return (4 if config.model_type == "phi3" else 3) * width  # gate and up as one matrix, or as two


def prefill_bytes(
    plan: Artifact,
    batch: int,
    tokens: int,
    chunk: int = PREFILL_CHUNK,
    *,
    dtype: str | None = None,
    inner: int | None = None,
    padded: bool = False,
) -> int:
    """Most bytes that `batch` prompts of `tokens` tokens take beside weights and cache while they are read in chunks of
    `chunk` tokens each: hidden states, keys and values of one layer, and what one chunk needs.

    `dtype` is that of the computation (None: the model's), `inner` what `feed_forward_elements` says of the model,
    `padded` whether the prompts are of unequal length. For prompts of one chunk, which go through the model at once,
    it holds too.
    """
    model = plan.model
    size = DTYPE_BITS[dtype or model.dtype] // 8
    columns, rows = batch * tokens, batch * min(chunk, tokens)
    tables = (columns if padded else tokens) * model.head_dim  # elements of a cosine or a sine
    kinds = 2 if 0 < sum(map(bool, model.windows)) < model.num_layers else 1  # of rotary embedding, at most
    cached = 2 * columns * model.num_kv_heads * model.head_dim * size
    kept = columns * model.hidden_size * size + kinds * 2 * tables * size + (8 + padded) * columns
    inner = INNER * model.hidden_size if inner is None else inner
    projected = (model.hidden_size + (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim) * size
    rotated = 3 * model.num_attention_heads * model.head_dim * size
    policies = {POLICIES[code] for code in plan.budgets.policy.ravel()}
    chunk_bytes = max(
        rows * (projected + rotated) + _masks(model, batch, tokens, chunk, size, padded),
        rows * (2 * model.hidden_size + inner) * size,
        rows * model.hidden_size * (2 * size + 12),  # a norm computes in float32
        rows * projected + _attention(model, batch, tokens, chunk) if "h2o" in policies else 0,
        _cut(plan, batch, tokens, policies),
    )
    most = max(kept + cached + chunk_bytes, kept + ROPE_BYTES * tables)
    return int(most + most // 8 + WORKSPACE)


def _masks(model: ModelIdentity, batch: int, tokens: int, chunk: int, size: int, padded: bool) -> int:
    """A mask as booleans, once a query and once a query head of the group, and as numbers."""
    if chunk >= tokens:
        windowed = any(0 < window < tokens for window in model.windows)
        kinds = padded + windowed
        repeated = 2 * batch * tokens * model.num_attention_heads * model.head_dim * size
        return batch * tokens * tokens * (kinds + size) + repeated if kinds else 0
    group, own = model.num_attention_heads // model.num_kv_heads, batch if padded else 1
    elements = min(max(MASK_ELEMENTS, own * group * tokens), own * group * min(chunk, tokens) * tokens)
    return elements * (1 + size) + 2 * elements // group


def _attention(model: ModelIdentity, batch: int, tokens: int, queries: int) -> int:
    """Keys of one head, logits and weights in float32, and which of them are hidden."""
    group = model.num_attention_heads // model.num_kv_heads
    weights = min(max(LOGITS_AT_ONCE, batch * group * tokens), batch * group * min(queries, tokens) * tokens)
    return 4 * batch * tokens * model.head_dim + 8 * weights + weights // group


def _cut(plan: Artifact, batch: int, tokens: int, policies: Collection[str]) -> int:
    """Scores of every token by head, sorted; kept keys or values on their way to codes."""
    model, budgets = plan.model, plan.budgets
    scores = 0 if policies <= {"full", "recent"} else 32 * batch * tokens * model.num_kv_heads
    if "snapkv" in policies:
        scores += _attention(model, batch, tokens, 32)
    codes = [is_quantised(int(bits)) for bits in (*budgets.k_bits.ravel(), *budgets.v_bits.ravel())]
    most = int(budgets.capacity.clip(max=tokens).sum(axis=1).max())
    return scores + (16 if any(codes) else 4) * batch * most * model.head_dim
