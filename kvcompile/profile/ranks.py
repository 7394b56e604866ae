"""Several processes that profile one model together, started by torchrun: who does what, and what they tell each other.

Episodes are parted among them. What they add up is exchanged and added in the order of the items, so that the sums are
bit for bit those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from kvcompile.artifacts.errors import ModelError


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`."""

    rank: int = 0
    count: int = 1

    def owns(self, number: int) -> bool:
        """Whether what has this number is this process's to do."""
        return number % self.count == self.rank

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of their numbers. Raises ModelError where one is lost, like the
        others."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        _told(lambda: dist.all_gather_object(found, value))
        return found

    def of(self, owner: int, value: Any) -> Any:
        """What the owner of a number gives."""
        if self.count == 1:
            return value
        several = [value]
        _told(lambda: dist.broadcast_object_list(several, src=owner % self.count))
        return several[0]

    def first(self, act: Callable[[], None]) -> None:
        """Let the first process do something once all have come here; all go on when it is done."""
        if self.count == 1:
            act()
            return
        _told(dist.barrier)
        if self.rank == 0:
            act()
        _told(dist.barrier)


def ranks() -> Ranks:
    """The processes that torch.distributed knows of: one where it has not been set up."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def together() -> Iterator[Ranks]:
    """Let the processes that torchrun has started know of each other, within the block; one alone without torchrun.

    They talk over gloo, on machines with GPUs too: what they exchange are sums, in this machine's memory.

    Raises:
        ModelError: several processes that do not know where to meet, or of which one is lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    try:
        # Those that are done with a layer wait for those that are not.
        _told(lambda: dist.init_process_group("gloo", timeout=timedelta(days=1)))
    except ValueError as error:  # a variable of torchrun's is missing
        raise ModelError(f"the processes of this build cannot meet ({error}): start them with torchrun") from None
    try:
        yield ranks()
    finally:
        dist.destroy_process_group()


def _told(act: Callable[[], Any]) -> None:
    try:
        act()
    except RuntimeError:  # of torch.distributed, whose backends have no class of errors in common
        raise ModelError(
            "another process of this build was lost: start the build again, and it goes on from where it was last saved"
        ) from None
