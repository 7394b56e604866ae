"""Putting compiled caches into a model that vLLM has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from kvcompile.artifacts import Artifact, CacheError, fetch
from kvcompile.integrations.vllm.backend import Backend
from kvcompile.integrations.vllm.batch import Waiting
from kvcompile.integrations.vllm.checkpoint import check_checkpoint
from kvcompile.integrations.vllm.folder import checkpoint_folder
from kvcompile.integrations.vllm.layer import CompiledAttention, Served, replace
from kvcompile.integrations.vllm.options import IGNORE, LoaderOptions
from kvcompile.integrations.vllm.placement import head_orders, placed
from kvcompile.integrations.vllm.refusals import refuse_artifact, refuse_settings, refuse_trial
from kvcompile.integrations.vllm.score import Scores
from kvcompile.integrations.vllm.spec import check_spec
from kvcompile.kernels import LayerLayout
from kvcompile.runtime.layouts import layer_layout
from kvcompile.runtime.pages import PageLayout
from kvcompile.runtime.rotation import layer_rotation
from kvcompile.runtime.transforms import layer_transform

log = init_logger("vllm.kvcompile")


@dataclass(frozen=True)
class Serving:
    """An artifact that has been found fit for a model and for vLLM's settings."""

    artifact: Artifact
    options: LoaderOptions
    vllm_config: VllmConfig
    orders: list[list[int]]
    """By layer, the model's KV heads in the order of the weights."""

    @classmethod
    def prepare(
        cls, options: LoaderOptions, vllm_config: VllmConfig, model_config: ModelConfig, loader: Any
    ) -> Serving:
        """Check everything before weights are read, and have `loader` bring heads to the ranks of the artifact's
        placement where it has one. Raises KvcompileError."""
        check_spec()
        refuse_settings(vllm_config, options.staged)
        artifact = fetch(options.artifact)
        refuse_artifact(artifact, model_config.max_model_len)
        if options.fingerprint == IGNORE:
            log.warning('kvcompile: "fingerprint" is "ignore", so the weights may be others than the artifact\'s')
        else:
            quantised = model_config.quantization is not None
            folder = checkpoint_folder(model_config.model, model_config.revision)
            compared = check_checkpoint(artifact, model_config.hf_config, folder, quantised)
            log.info("kvcompile: the checkpoint is the artifact's model (%s compared)", compared)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        found = head_orders(artifact, ranks) if ranks > 1 else None
        if found is not None:
            if not hasattr(loader, "get_all_weights"):
                raise CacheError(
                    f"heads cannot be placed while weights are loaded as {options.load_format}: give an artifact "
                    "that was built without --tp"
                )
            every = loader.get_all_weights
            loader.get_all_weights = lambda *args: placed(every(*args), found, model_config.hf_config)
        own = list(range(artifact.model.num_kv_heads))
        return cls(artifact, options, vllm_config, found or [own] * artifact.model.num_layers)

    def adopt(self, model: nn.Module) -> None:
        """Replace the attention layers of a loaded model."""
        config, artifact = self.vllm_config, self.artifact
        context = config.compilation_config.static_forward_context
        old = [(name, layer) for name, layer in context.items() if isinstance(layer, Attention)]
        if len(old) != artifact.model.num_layers:
            raise CacheError(
                f"vLLM has {len(old)} attention layers in this model, and the artifact {artifact.model.num_layers}: "
                "expected a model of text alone"
            )
        rank = get_tensor_model_parallel_rank()
        pages = self._pages(old[0][1].num_kv_heads)
        used = sum(page.used for page in pages)
        scheduler = config.scheduler_config
        served = Served(
            PageLayout.of(pages[rank].layers, artifact.model.head_dim, pages[rank].dtype, max(p.nbytes for p in pages)),
            Waiting(self.options.staged),
            not scheduler.enable_chunked_prefill,
            config.model_config.max_model_len,
            config.model_config.dtype,
        )
        self._check_trial(served.page.nbytes, old[0][1]._k_scale.device)
        first: CompiledAttention | None = None
        for name, layer in old:
            first = self._replace(model, name, layer, served, first)
        # With a window of R-SWA, vLLM tells every attention backend how long the prompts are. It means nothing else to
        # a model whose layers are ours.
        config.model_config.model_arch_config.rswa_window = config.model_config.max_model_len
        if isinstance(config.additional_config, dict):
            # vLLM keeps compiled models by a hash of its settings, this one among them; scoring is a part of the model.
            config.additional_config["kvcompile"] = [layout.scored_slots > 0 for layout in pages[rank].layers]
        if rank:
            return
        log.info(
            "kvcompile: %d bytes a sequence of up to %d tokens, in pages of %d (the artifact: %d, %.1f %% of the full "
            "cache)",
            used, artifact.target.context, served.page.nbytes, artifact.bytes.resident // artifact.target.batch,
            100 * artifact.bytes.resident / artifact.bytes.full,
        )  # fmt: skip

    def _check_trial(self, page: int, device: torch.device) -> None:
        """Refuse what would run out of memory where vLLM tries CUDA graphs out."""
        graphs, cache = self.vllm_config.compilation_config, self.vllm_config.cache_config
        tries = graphs.cudagraph_mode != CUDAGraphMode.NONE and cache.kv_cache_memory_bytes is None
        if device.type == "cuda" and tries:
            sequences = min(self.vllm_config.scheduler_config.max_num_seqs, graphs.max_cudagraph_capture_size or 1)
            refuse_trial(sequences, page, torch.cuda.mem_get_info(device)[0])

    def _pages(self, here: int) -> list[PageLayout]:
        """The page of every rank, each with `here` heads of a layer."""
        ranks, identity = self.vllm_config.parallel_config.tensor_parallel_size, self.artifact.model
        dtype = getattr(torch, self.artifact.target.dtype)
        return [
            PageLayout.of(
                [self._layout(layer, self._heads(layer, rank, here)) for layer in range(identity.num_layers)],
                identity.head_dim, dtype,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def _heads(self, layer: int, rank: int, here: int) -> Sequence[int]:
        """The KV heads of a rank; of fewer heads than ranks, vLLM gives each to several."""
        first = rank * len(self.orders[layer]) // self.vllm_config.parallel_config.tensor_parallel_size
        return self.orders[layer][first : first + here]

    def _layout(self, layer: int, heads: Sequence[int]) -> LayerLayout:
        return layer_layout(self.artifact, layer, heads)

    def _replace(
        self, model: nn.Module, name: str, layer: Attention, served: Served, first: CompiledAttention | None
    ) -> CompiledAttention:
        """Put our layer in the place of one of vLLM's; the model's first one."""
        config = self.vllm_config
        del config.compilation_config.static_forward_context[name]
        with set_current_vllm_config(config):
            new = CompiledAttention(
                layer.num_heads, layer.head_size, layer.impl.scale, layer.num_kv_heads,
                cache_config=config.cache_config, quant_config=layer.quant_config, prefix=name, attn_backend=Backend,
            ).to(layer._k_scale.device)  # fmt: skip
        index = extract_layer_index(name)
        heads = self._heads(index, get_tensor_model_parallel_rank(), layer.num_kv_heads)
        device = layer._k_scale.device
        layout = served.page.layers[index]
        transform = layer_transform(self.artifact.quantiser, index, list(heads), layout, device)
        parent = replace(model, name, new)
        scores, scorer = None, self.artifact.scorer
        if layout.scored_slots:
            assert scorer is not None
            weight = torch.tensor(scorer.weight[index][heads], dtype=torch.float32, device=device)
            bias = torch.tensor(scorer.bias[index][heads], dtype=torch.float32, device=device)
            scheduler = config.scheduler_config
            scores = Scores(weight, bias, max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs))
            scores.listen(parent.get_submodule("qkv_proj"))
        rotation = layer_rotation(self.artifact, index, device)
        new.setup(served, index, first or new, transform, rotation, scores)
        return first or new
