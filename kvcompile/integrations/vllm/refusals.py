"""What cannot be served, each in one sentence."""

from __future__ import annotations

from typing import Any

from kvcompile.artifacts import POLICIES, Artifact, CacheError
from kvcompile.runtime.policies import POLICIES as TOKEN_POLICIES

UNTRIED = frozenset(
    {
        "gemma2",
        "gemma4_text",
        "gemma4_unified_text",
        "gpt_oss",
        "granite",
        "llama4_text",
        "olmo2",
        "olmo3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "smollm3",
    }
)
"""Families of ours that the plugin has not been run with."""


def refuse_settings(vllm_config: Any, staged: int) -> None:
    """Raises CacheError: settings of vLLM that a compiled cache cannot work with, where `staged` prompts may be read in
    chunks at once."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if vllm_config.speculative_config is not None:
        raise CacheError(
            "speculative decoding cannot work with a compiled cache, where the slot of a rejected token has been "
            "overwritten: leave --speculative-config out"
        )
    if parallel.pipeline_parallel_size > 1:
        raise CacheError(
            "pipeline parallelism would need pages of another size on every stage: use --tensor-parallel-size"
        )
    if parallel.data_parallel_size > 1:
        raise CacheError(
            "data parallelism inside vLLM has not been tried with compiled caches: start a server for each replica"
        )
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise CacheError("context parallelism cuts sequences into parts, and a compiled cache has one page for each")
    if vllm_config.lora_config is not None:
        raise CacheError(
            "LoRA changes keys and values that the artifact was compiled for: merge the adapter into the model, and "
            "build an artifact for that"
        )
    own, stored = str(vllm_config.model_config.dtype).removeprefix("torch."), vllm_config.cache_config.cache_dtype
    if stored not in ("auto", own):
        raise CacheError(
            f"the artifact says how keys and values are stored: give --kv-cache-dtype {own} in place of {stored}, or "
            "build an artifact with --kv-dtype"
        )
    most, budget = vllm_config.model_config.max_model_len, scheduler.max_num_batched_tokens
    if (part := scheduler.long_prefill_token_threshold) > 0 and scheduler.enable_chunked_prefill:
        at_once = min(-(-budget // part), scheduler.max_num_seqs)
        if at_once > staged:
            raise CacheError(
                f"with --long-prefill-token-threshold {part} up to {at_once} prompts are read in chunks at once: leave "
                f'it out, or give "staged": {at_once} in --model-loader-extra-config, a full cache of room each'
            )
    if not scheduler.enable_chunked_prefill and budget < most:
        raise CacheError(
            f"without chunked prefill a prompt is read in one step, and a step has {budget} tokens: give "
            f"--max-num-batched-tokens {most} or more"
        )


def refuse_artifact(artifact: Artifact, most_tokens: int) -> None:
    """Raises CacheError: an artifact that cannot serve sequences of `most_tokens` tokens, or not in vLLM, or for a
    model of a family that has not been tried there."""
    if artifact.model.architecture in UNTRIED:
        raise CacheError(
            f"{artifact.model.architecture} models have not been tried in vLLM with a compiled cache: use kvcompile "
            "run, or kvcompile.runtime.attach"
        )
    for code in sorted({int(code) for code in artifact.budgets.policy.flat}):
        policy = TOKEN_POLICIES.get(POLICIES[code]) if code < len(POLICIES) else None
        if policy is None or policy.observes:
            name = POLICIES[code] if code < len(POLICIES) else f"number {code}"
            raise CacheError(
                f"the token policy {name} cannot be served: expected an artifact whose heads are full, recent, snapkv "
                "or scored"
            )
    if most_tokens > artifact.target.context:
        raise CacheError(
            f"the artifact is for sequences of {artifact.target.context} tokens: give --max-model-len "
            f"{artifact.target.context} or less, not {most_tokens}"
        )


def refuse_trial(sequences: int, page: int, free: int) -> None:
    """Raises CacheError: pages of `page` bytes for so many sequences, with which vLLM tries CUDA graphs out before it
    has settled how much memory its cache may take, are more than the `free` bytes."""
    if sequences * page > free:
        raise CacheError(
            f"to find out what CUDA graphs take, vLLM sets up {sequences} sequences, whose pages are "
            f"{sequences * page} bytes where {free} are free: give --kv-cache-memory-bytes, or --max-num-seqs "
            f"{max(free // page, 1)} or less"
        )
