"""Our attention in vLLM: the metadata of a batch, and what a layer does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from kvcompile.integrations.vllm import BACKEND
from kvcompile.integrations.vllm.batch import Piece, only_steps, split
from kvcompile.integrations.vllm.layer import CompiledAttention, layers_of
from kvcompile.integrations.vllm.spec import CompiledSpec
from kvcompile.kernels import prompt_attention
from kvcompile.kernels.ragged_decode.api import takes_steps


@dataclass(frozen=True)
class Steps:
    """Sequences that take a step. `places` and `seen` int32 on the device: their pages, and how many tokens they hold
    before it; `rows` int64: their rows of the batch (None: the first ones, in order)."""

    places: torch.Tensor
    seen: torch.Tensor
    rows: torch.Tensor | None = None


@dataclass
class Metadata:
    """What a batch is; found out by the first layer that asks, when kept states have been put into their pages."""

    find: Callable[[], tuple[Steps, list[Piece]]]

    @cached_property
    def found(self) -> tuple[Steps, list[Piece]]:
        return self.find()


class Builder(AttentionMetadataBuilder[Metadata]):
    """A batch of steps alone needs nothing from the host; where prompts are read, their pieces are told there."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: CompiledSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._layers = layers_of(vllm_config.compilation_config.static_forward_context)
        self._waiting = self._layers[0].served.waiting
        most = max(vllm_config.scheduler_config.max_num_seqs, vllm_config.scheduler_config.max_num_batched_tokens)
        # Recorded graphs read these, so they stay where they are.
        self._places, self._seen = (torch.zeros(most, dtype=torch.int32, device=device) for _ in range(2))
        self._graphs = device.type != "cpu" and vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """None of steps that torch takes on a GPU, which waits for it: of a codec without kernels, of large heads."""
        for one in layers_of(vllm_config.compilation_config.static_forward_context):
            layout = one.served.page.layers[one.index]
            if one._k_scale.is_cuda and not takes_steps(one._k_scale, one.head_size, layout):
                return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        m, count = common_attn_metadata, common_attn_metadata.num_reqs
        self._waiting.ahead = {}
        torch.sub(m.seq_lens[:count], 1, out=self._seen[:count]).clamp_(min=0)
        self._places[:count].copy_(m.block_table_tensor[:count, 0])
        places, seen = self._places[:count], self._seen[:count]
        # `is_prefilling` is on the host.
        if m.max_query_len == 1 and not (m.is_prefilling is not None and bool(m.is_prefilling[:count].any())):
            return Metadata(lambda: (Steps(places, seen), []))
        lengths = (m.seq_lens if m.seq_lens_cpu_upper_bound is None else m.seq_lens_cpu_upper_bound)[:count].tolist()
        prompts = [0] * count if m.rswa_prefix_lens is None else m.rswa_prefix_lens[:count].tolist()
        prompts += [0] * (count - len(prompts))  # a batch that is padded for a graph
        starts = m.query_start_loc_cpu[: count + 1].tolist()
        blocks = m.block_table_tensor[:count, 0].tolist()
        if m.max_query_len == 1 and self._graphs:
            for held in only_steps(lengths, prompts, blocks, self._waiting):
                for layer in self._layers:
                    layer.flush(held.slot, held.block, held.origin)
            return Metadata(lambda: (Steps(places, seen), []))

        def find() -> tuple[Steps, list[Piece]]:
            steps, pieces = split(starts, lengths, prompts, blocks, self._waiting)
            chosen = torch.tensor(steps, dtype=torch.int64, device=places.device)
            rows = torch.tensor([starts[i] for i in steps], dtype=torch.int64, device=places.device)
            return Steps(places[chosen], seen[chosen], rows), pieces

        return Metadata(find)


class Impl(AttentionImpl[Metadata]):
    """What vLLM calls; the work is the layer's."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: CompiledAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`query` [T, num_heads, D], `key` and `value` [T, num_kv_heads, D]; fills `output` [T, num_heads, D]."""
        m, score = attn_metadata, None if layer.scores is None else layer.scores.out
        if m is None or layer.store is None:  # vLLM measures what the longest prompts take
            q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
            output.copy_(prompt_attention(q, k, v, None, 0, self.scale)[0].transpose(0, 1))
            return output
        steps, pieces = m.found
        if len(steps.places):
            rows = slice(len(steps.places)) if steps.rows is None else steps.rows
            scored = None if score is None else score[rows]
            output[rows] = layer.steps(query[rows], key[rows], value[rows], scored, steps.places, steps.seen)
        for piece in pieces:
            now = slice(piece.start, piece.stop)
            scored = None if score is None else score[now]
            output[now] = layer.read(piece, query[now], key[now], value[now], scored)
        return output


class Backend(AttentionBackend):
    """Any head size, in the model's own dtype; the artifact says how keys and values are stored."""

    supported_dtypes = (torch.float16, torch.bfloat16, torch.float32)

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True
