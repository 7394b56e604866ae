"""Compiled caches inside vLLM.

    vllm serve MODEL --load-format kvcompile --model-loader-extra-config '{"artifact": "x.kvb"}'

vLLM calls `register` in every one of its processes (entry point `vllm.general_plugins`). It adds two names to vLLM's
tables; nothing else of this package is imported, and nothing changes, unless the load format is asked for.
"""

from __future__ import annotations

LOAD_FORMAT = "kvcompile"
BACKEND = "KVCOMPILE"
"""Our attention backend's name in vLLM's table."""


def register() -> None:
    """Make the load format known to vLLM. Safe to call again."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if LOAD_FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return
    from kvcompile.integrations.vllm.loader import Loader

    AttentionBackendEnum.register(BACKEND, "kvcompile.integrations.vllm.backend.Backend")
    register_model_loader(LOAD_FORMAT)(Loader)
