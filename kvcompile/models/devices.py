"""A model over several devices: split by heads over the processes that torchrun has started, or by a device map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvcompile.artifacts.errors import ModelError


@contextmanager
def over_devices(processes: int, device_map: str | None) -> Iterator[dict[str, Any]]:
    """Options of `from_pretrained`: tensor parallelism of so many processes, which know of each other within the block;
    of one process alone this `device_map` (None: one device).

    Raises:
        ModelError: both at once.
    """
    if processes == 1:
        yield {} if device_map is None else {"device_map": device_map}
        return
    if device_map is not None:
        raise ModelError(
            f"{processes} processes split the model among them, and --device-map would spread it once more: leave it "
            "out, or start one process"
        )
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    try:
        yield {"distributed_config": DistributedConfig(tp_size=processes)}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
