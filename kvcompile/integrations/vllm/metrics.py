"""Metrics for operators: gauges beside vLLM's own on /metrics, and a line in the log at start.

vLLM loads this (entry point `vllm.stat_logger_plugins`) in the processes of its API server alone. Nothing more of this
package is imported there unless the load format is ours.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from kvcompile.integrations.vllm import LOAD_FORMAT

if TYPE_CHECKING:
    from kvcompile.integrations.vllm.figures import Figures

log = init_logger("vllm.kvcompile")

GAUGES = {
    "kvcompile_bytes_per_sequence": "Bytes of a sequence's compiled cache, on all tensor-parallel ranks together.",
    "kvcompile_page_bytes": "Bytes of a rank's page, which holds its part of one sequence.",
    "kvcompile_full_cache_share": "The compiled cache's share of the full cache's bytes at the artifact's context.",
    "kvcompile_sequences": "Sequences that an engine's cache holds at once.",
}


class Metrics(AggregateStatLoggerBase):
    """Sets gauges once, when the engines are up; how many sequences run is `vllm:num_requests_running`."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._config, self._engines = vllm_config, engine_indexes

    def record(self, *args: Any, **others: Any) -> None:
        """Nothing changes while the server runs."""

    def log_engine_initialized(self) -> None:
        config = self._config
        if config.load_config.load_format != LOAD_FORMAT:
            return
        figures = _figures(config)
        if figures is None:
            return
        values = {
            "kvcompile_bytes_per_sequence": figures.bytes_per_sequence,
            "kvcompile_page_bytes": figures.page_bytes,
            "kvcompile_full_cache_share": figures.full_cache_share,
        }
        # The blocks of all engines together; each keeps its block 0, which stands for no block.
        if blocks := config.cache_config.num_gpu_blocks:
            values["kvcompile_sequences"] = blocks // len(self._engines) - 1
        for name, value in values.items():
            for engine in self._engines:
                _gauge(name).labels(config.model_config.served_model_name, str(engine)).set(value)
        log.info(
            "kvcompile: the cache holds %s sequences of up to %d tokens (%d bytes each in pages of %d, %.1f %% of the "
            "full cache)",
            values.get("kvcompile_sequences", "?"), config.model_config.max_model_len, figures.bytes_per_sequence,
            figures.page_bytes, 100 * figures.full_cache_share,
        )  # fmt: skip


def _figures(config: VllmConfig) -> Figures | None:
    """None where the artifact cannot be had in this process, which may be on another machine than the engine."""
    from kvcompile.artifacts import KvcompileError, fetch
    from kvcompile.integrations.vllm.figures import Figures
    from kvcompile.integrations.vllm.options import LoaderOptions

    try:
        artifact = fetch(LoaderOptions.parse(config.load_config.model_loader_extra_config).artifact)
    except KvcompileError as error:
        log.warning("kvcompile: there are no metrics of the artifact, as the API server cannot read it: %s", error)
        return None
    return Figures.of(artifact, config.parallel_config.tensor_parallel_size)


@cache
def _gauge(name: str) -> Gauge:
    """One of `GAUGES`, made once a process. In multiprocess mode all API servers say the same, so the last one counts,
    as with vLLM's own."""
    return Gauge(name, GAUGES[name], ["model_name", "engine"], multiprocess_mode="mostrecent")
