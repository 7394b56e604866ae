"""`--load-format kvcompile`: any other loader, and then the attention layers replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

# Nothing here may import more of this package when the plugin is merely installed: the rest is imported on use.


class Loader(BaseModelLoader):
    """Weights are loaded as `load_format` says (default: `auto`) and stay as they are."""

    def __init__(self, load_config: LoadConfig) -> None:
        from kvcompile.integrations.vllm.options import LoaderOptions

        super().__init__(load_config)
        self.options = LoaderOptions.parse(load_config.model_loader_extra_config)
        inner = replace(
            load_config, load_format=self.options.load_format, model_loader_extra_config=dict(self.options.others)
        )
        self.inner: Any = get_model_loader(inner)

    def download_model(self, model_config: ModelConfig) -> None:
        self.inner.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self.inner.load_weights(model, model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Any:
        """For vLLM's `reload_weights`: as the loader of `load_format` has them, heads placed as the artifact says."""
        from vllm.distributed import get_tensor_model_parallel_world_size

        from kvcompile.artifacts import fetch
        from kvcompile.integrations.vllm.placement import head_orders, placed

        weights = self.inner.get_all_weights(model_config, model)
        orders = head_orders(fetch(self.options.artifact), get_tensor_model_parallel_world_size())
        return weights if orders is None else placed(weights, orders, model_config.hf_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Raises KvcompileError: what cannot be served, or does not belong together, before weights are read."""
        from kvcompile.integrations.vllm.version import check_version

        check_version()
        from kvcompile.integrations.vllm.adopt import Serving

        serving = Serving.prepare(self.options, vllm_config, model_config, self.inner)
        model: nn.Module = self.inner.load_model(vllm_config, model_config, prefix)
        serving.adopt(model)
        return model
