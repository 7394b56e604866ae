"""How much memory it takes to read prompts, beside weights and cache: arithmetic alone, as `inspect` wants it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from kvcompile.artifacts.schema import DTYPE_BITS, POLICIES, Artifact, ModelIdentity
from kvcompile.kernels.codecs import is_quantised

PREFILL_CHUNK = 2048
"""Tokens of each prompt that go through a layer at once, where nothing else is asked for."""
MASK_ELEMENTS = 1 << 22
"""Most elements of an attention mask within a prompt; of longer chunks, blocks of queries go through in turn."""
REFERENCES = 512
"""Queries of a prompt, over all query heads of a KV head, that stand for what will be asked of it
(`runtime/references.py`)."""
LOGITS_AT_ONCE = 1 << 24
"""Most attention weights (f32) that are formed at once for policies that look at them."""
INNER = {
    "gemma4_text": 36,
    "gpt_oss": 48,
    "llama4_text": 1220,
    "qwen3_5_moe_text": 72,
    "qwen3_5_text": 72,
    "qwen3_next": 72,
}
"""Elements of the feed-forward block a token, over the hidden size, where the model's configuration is not known: of a
family, or else 28, 4 x 7. Llama-4 sends every token through all of its experts, of which it has up to 128."""
FORMED = {"gemma2": (3, 3), "gpt_oss": (4, 2)}
"""Families whose attention weights torch has to form, as they are more than a softmax of logits: how many tensors of
f32 there are of them at once, in prompts and in follow-ups."""
INPUTS = 5
"""Elements for each of a token's inputs of all layers while these are made, with norms in float32."""
LEFT_ALONE = {"gemma4_text": 2, "gemma4_unified_text": 4}
"""Families with sliding layers that a plan leaves alone: how many times the bytes of a token's keys and values in the
layers that it is for they have (Gemma-4 31B: 16 heads of 256 elements against 4 of 512; 12B: 8 against one)."""
ROPE_BYTES = 12
"""Of a rotary table, an element, while it is made in float32."""
NUMBERS = 32
"""Bytes of a token's numbers: its id, its position, and whether it is padding."""
WORKSPACE = 1 << 18
"""Bytes of what matrix products and attention kernels allocate for themselves, beside an eighth of all else."""


def feed_forward_elements(config: Any) -> int:
    """Elements a token that the feed-forward block of a model of this configuration (transformers') holds at once, or a
    layer of linear attention where that is more."""
    inputs = int(getattr(config, "hidden_size_per_layer_input", None) or 0) * int(config.num_hidden_layers)
    # Of prompts of one chunk, inputs by token of all layers are made at once, and stay.
    return max(_feed_forward(config) + inputs, _linear_attention(config), INPUTS * inputs)


def _linear_attention(config: Any) -> int:
    """Of the gated delta rule in torch, in chunks of 64 tokens; in float32, which is two elements of 16 bits."""
    if "linear_attention" not in (getattr(config, "layer_types", None) or ()):
        return 0
    heads, size = config.linear_num_value_heads, config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    return int(2 * (6 * heads * size + 7 * values + 4 * 64 * heads + 3 * config.linear_num_key_heads * size))


def _feed_forward(config: Any) -> int:
    width, hidden = int(config.intermediate_size), int(config.hidden_size)
    width *= 1 + bool(getattr(config, "use_double_wide_mlp", False))  # of layers without keys and values of their own
    experts = int(getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 0)
    experts *= getattr(config, "enable_moe_block", True)
    if config.model_type == "llama4_text":  # every token goes to every expert, scaled by what the router says
        routed = int(config.num_local_experts) * (4 * width + 3 * hidden)
        return max(3 * int(config.intermediate_size_mlp), routed)
    if experts:  # every expert that a token goes to has its own input, gate, product and output
        width = int(getattr(config, "moe_intermediate_size", None) or width)
        gates = 10 if config.model_type == "gpt_oss" else 4  # clamped on the way, in tensors of their own
        # Gemma-4 has experts beside a dense block, whose output waits, and norms of either in float32.
        beside = 6 * hidden if config.model_type == "gemma4_text" else 0
        return experts * (gates * width + 2 * hidden) + beside
    beside = hidden if config.model_type.startswith("gemma4_") else 0  # as measured with transformers 5.17
    return (4 if config.model_type == "phi3" else 3) * width + beside  # gate and up as one matrix, or as two


def prefill_bytes(
    plan: Artifact,
    batch: int,
    tokens: int,
    chunk: int = PREFILL_CHUNK,
    *,
    cut_every: int | None = None,
    follow_up: bool = False,
    dtype: str | None = None,
    inner: int | None = None,
    padded: bool = False,
) -> int:
    """Most bytes that `batch` prompts of `tokens` tokens take beside weights and cache while they are read in chunks of
    `chunk` tokens each: the hidden states of all tokens, the keys and values that one layer has of them, and what one
    chunk needs. The first two grow with the prompts; where they are cut to the budget every `cut_every` tokens, they
    are those of so many tokens at the most.

    `follow_up`: they come when a cache is full. `dtype` is that of the computation (None: the model's), `inner` what
    `feed_forward_elements` says of the model, `padded` whether the prompts are of unequal length. For prompts of one
    chunk, which go through the model at once, it holds too.
    """
    if cut_every is not None and cut_every < tokens:
        pieces = [
            prefill_bytes(
                plan, batch, cut_every, chunk, follow_up=later or follow_up, dtype=dtype, inner=inner, padded=padded
            )
            for later in (False, True)
        ]
        return max(pieces) + NUMBERS * batch * tokens
    model = plan.model
    size = DTYPE_BITS[dtype or model.dtype] // 8
    policies = {POLICIES[code] for code in plan.budgets.policy.ravel()}
    if follow_up and "h2o" in policies:
        chunk = tokens
    columns, rows = batch * tokens, batch * min(chunk, tokens)
    tables = (columns if padded or follow_up else tokens) * model.head_dim  # elements of a cosine or a sine
    kinds = 2 if 0 < sum(map(bool, model.windows)) < model.num_layers else 1  # of rotary embedding, at most
    cached = 2 * columns * model.num_kv_heads * model.head_dim * size * LEFT_ALONE.get(model.architecture, 1)
    kept = columns * model.hidden_size * size + kinds * 2 * tables * size + NUMBERS * columns
    inner = INNER.get(model.architecture, 28) * model.hidden_size if inner is None else inner
    projected = (model.hidden_size + (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim) * size
    rotated = 3 * model.num_attention_heads * model.head_dim * size
    if follow_up:
        meeting = _stored(plan, batch, tokens, chunk, size, padded, policies)
    else:
        meeting = _masks(model, batch, tokens, chunk, size, padded)
    if model.architecture in FORMED:
        meeting = _formed(plan, batch, tokens, chunk, follow_up)
    chunk_bytes = max(
        rows * (projected + rotated) + meeting,
        rows * (2 * model.hidden_size + inner) * size,
        rows * model.hidden_size * (2 * size + 12),  # a norm computes in float32
        rows * projected + _attention(model, batch, tokens, chunk) if "h2o" in policies and not follow_up else 0,
        _cut(plan, batch, tokens, policies - {"snapkv"} if follow_up else policies)
        + (0 if follow_up else _fitted(plan, batch, tokens, size)),
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


def _formed(plan: Artifact, batch: int, tokens: int, chunk: int, follow_up: bool) -> int:
    """Attention weights of a block of queries on their way, and keys, values and outputs in f32."""
    model = plan.model
    columns = tokens + (int(plan.budgets.capacity.max()) if follow_up else 0)
    row = batch * model.num_attention_heads * columns
    weights = max(row, min(MASK_ELEMENTS, row * min(chunk, tokens)))
    vectors = 2 * batch * model.num_kv_heads * columns + 3 * batch * model.num_attention_heads * min(chunk, tokens)
    return 4 * FORMED[model.architecture][follow_up] * weights + 4 * vectors * model.head_dim


def _stored(
    plan: Artifact, batch: int, tokens: int, chunk: int, size: int, padded: bool, policies: Collection[str]
) -> int:
    """What a chunk of a follow-up meets of one class of heads: its stored keys and values, decoded and side by side
    with those of the follow-up, and masks."""
    model, budgets = plan.model, plan.budgets
    group = model.num_attention_heads // model.num_kv_heads
    heads, most = max(
        ((count, count * (capacity + tokens)) for (capacity, *_), count in _classes(plan)), key=lambda pair: pair[1]
    )
    columns, own = most // heads, batch if padded else 1
    decoded = 2 * batch * (2 * most - heads * tokens) * model.head_dim * size
    codes = [is_quantised(int(bits)) for bits in (*budgets.k_bits.ravel(), *budgets.v_bits.ravel())]
    transformed = 12 * batch * min(chunk, tokens) * model.num_attention_heads * model.head_dim if any(codes) else 0
    elements = min(max(MASK_ELEMENTS, own * group * columns), own * group * min(chunk, tokens) * columns)
    met = decoded + elements * (1 + size) + 3 * elements // group
    if "h2o" in policies:  # then keys of one sequence, and the weights that its new tokens give them, in float32
        met = max(met, 12 * heads * columns * (group * tokens + model.head_dim))
    return transformed + met


def _classes(plan: Artifact) -> Iterable[tuple[tuple[int, ...], int]]:
    """The kinds of heads in every layer, capacity first, and how many there are of each."""
    tables = [getattr(plan.budgets, name) for name in ("capacity", "policy", "sink", "recent", "k_bits", "v_bits")]
    for layer in range(plan.model.num_layers):
        yield from Counter(zip(*(table[layer].tolist() for table in tables), strict=True)).items()


def _attention(model: ModelIdentity, batch: int, tokens: int, queries: int) -> int:
    """Keys of one head, logits and weights in float32, and which of them are hidden."""
    group = model.num_attention_heads // model.num_kv_heads
    weights = min(max(LOGITS_AT_ONCE, batch * group * tokens), batch * group * min(queries, tokens) * tokens)
    return 4 * batch * tokens * model.head_dim + 8 * weights + weights // group


def _fitted(plan: Artifact, batch: int, tokens: int, size: int) -> int:
    """Values fitted to reference queries (`runtime/fitted.py`): the layer's values once more, the queries, and of one
    head at a time its keys and values in f32, the weights that it gives, and the system that is solved."""
    model, budgets = plan.model, plan.budgets
    fitted = (budgets.policy == POLICIES.index("scored")) & (budgets.capacity < tokens)
    if "rotary_frequency" not in plan.profile or not fitted.any():
        return 0
    kept, group = int(budgets.capacity[fitted].max()), model.num_attention_heads // model.num_kv_heads
    asked = -(-REFERENCES // group) * group
    at_once = min(max(MASK_ELEMENTS, group * tokens), asked * tokens)
    queries = batch * model.num_kv_heads * asked * model.head_dim * (size + 12)
    at_once *= 3 if model.architecture in FORMED else 2  # logits, and the weights that they become
    of_one = 2 * tokens * model.head_dim + at_once + 2 * asked * kept + 3 * min(asked, kept) ** 2
    return batch * tokens * model.num_kv_heads * model.head_dim * size + queries + 4 * of_one


def _cut(plan: Artifact, batch: int, tokens: int, policies: Collection[str]) -> int:
    """Scores of every token by head, sorted; kept keys or values on their way to codes."""
    model, budgets = plan.model, plan.budgets
    scores = 0 if policies <= {"full", "recent"} else 32 * batch * tokens * model.num_kv_heads
    if "snapkv" in policies:
        scores += _attention(model, batch, tokens, 32)
    codes = [is_quantised(int(bits)) for bits in (*budgets.k_bits.ravel(), *budgets.v_bits.ravel())]
    most = int(budgets.capacity.clip(max=tokens).sum(axis=1).max())
    return scores + (16 if any(codes) else 4) * batch * most * model.head_dim
