"""What episodes need between a profile's steps: tensors by name, in memory as far as a budget goes and on disk beyond.

An entry is written once and never changed. So that an interrupted profile can go on from its last save, `save` puts
everything that is still needed on disk; an entry that is there comes back under its name in another process too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.room import Room

UNLIMITED = Room(1 << 62, 1 << 62)


class LostError(ModelError):
    """What an interrupted profile needs to go on is gone from the disk, or damaged."""


@dataclass
class _Entry:
    """Tensors, None where they are on disk alone; the room that they take, device, host or disk; their bytes; and
    whether they are on disk."""

    tensors: dict[str, Tensor] | None
    where: str
    nbytes: int
    on_disk: bool = False


class Held:
    """Entries of tensors by name. `room`: bytes that they may take outside of `folder`, which is made when it is
    needed; without one, what does not fit goes to a folder of its own that ends with the object. `device`: where
    entries are wanted."""

    def __init__(self, folder: Path | None = None, room: Room = UNLIMITED, device: torch.device | None = None) -> None:
        self.room, self.device = room, device or torch.device("cpu")
        self._own = tempfile.TemporaryDirectory(prefix="kvcompile-") if folder is None else None
        self.folder = folder or Path(self._own.name if self._own else "")
        self._entries: dict[str, _Entry] = {}
        self._leaving: list[str] = []
        self._left: list[str] = []
        self._unsynced: set[str] = set()
        self._used = {"device": 0, "host": 0, "spare": 0}
        self._spare: dict[str, Tensor] = {}

    def put(self, name: str, **tensors: Tensor) -> None:
        """Keep tensors under a name. Raises ModelError where they fit neither in memory nor on disk."""
        kept = {key: _own(t.detach()) for key, t in tensors.items()}
        size = sum(t.numel() * t.element_size() for t in kept.values())
        self._forget(name)
        there = any(t.device.type != "cpu" for t in kept.values())
        if there and self._used["device"] + size <= self.room.device:
            entry = _Entry(kept, "device", size)
        elif self._fits(size):
            entry = _Entry({key: t.cpu() for key, t in kept.items()}, "host", size)
        else:
            self._write(name, kept)
            entry = _Entry(None, "disk", size, on_disk=True)
        if entry.where != "disk":
            self._used[entry.where] += size
        self._entries[name] = entry

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors under a name, on the device; LostError where there are none, or none that can be read."""
        entry = self._entries.get(name)
        if entry is not None and entry.tensors is not None:
            return {key: t.to(self.device) for key, t in entry.tensors.items()}
        try:
            # Copied out of the mapped file: at places of memory as torch itself chooses, and not counted twice.
            return {key: t.clone().to(self.device) for key, t in load_file(self._path(name)).items()}
        except (OSError, SafetensorError):
            raise LostError(
                f"what profiling kept in {self.folder} between its steps is gone or damaged, the first of it {name}: "
                "start the build again, and it starts from the beginning"
            ) from None

    def one(self, name: str) -> Tensor:
        """The only tensor under a name."""
        (tensor,) = self.get(name).values()
        return tensor

    def spare(self, name: str, tensor: Tensor) -> None:
        """Keep a CPU's tensor that can be made anew, as long as nothing else needs the memory, and never on disk."""
        self.take(name)
        if self._fits(tensor.nbytes):
            self._spare[name] = tensor
            self._used["spare"] += tensor.nbytes

    def take(self, name: str) -> Tensor | None:
        """What was spared under a name, if it is still there; it is given up with that."""
        tensor = self._spare.pop(name, None)
        self._used["spare"] -= 0 if tensor is None else tensor.nbytes
        return tensor

    def drop(self, *names: str) -> None:
        """Give entries up once the step at hand is done (`commit`)."""
        self._leaving += names

    def commit(self) -> None:
        """The step at hand is done: what it dropped leaves memory now, and the disk after the next `save`."""
        for name in self._leaving:
            self._forget(name)
        self._left += self._leaving
        self._leaving = []

    def roll_back(self) -> None:
        """The step at hand is not done: nothing that it dropped leaves."""
        self._leaving = []

    def save(self, record: Callable[[], None]) -> None:
        """Put everything on disk and call `record`, which is to note how far the profile is; then remove what left
        before. Raises ModelError for a full disk."""
        for name, entry in self._entries.items():
            if not entry.on_disk:
                assert entry.tensors is not None
                self._write(name, entry.tensors)
                entry.on_disk = True
        self._sync()
        record()
        for name in self._left:
            self._path(name).unlink(missing_ok=True)
        self._left = []

    def clear(self) -> None:
        """Give everything up, on disk too."""
        self._entries, self._spare, self._leaving, self._left = {}, {}, [], []
        self._used = dict.fromkeys(self._used, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _fits(self, size: int) -> bool:
        """Whether there is memory for so many bytes more, once what is spared has made room for them."""
        left = self.room.host - self._used["host"] - size
        if left < 0:
            return False
        while self._used["spare"] > left:
            self.take(next(iter(self._spare)))
        return True

    def _forget(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None and entry.where != "disk":
            self._used[entry.where] -= entry.nbytes

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        with complaining(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({key: tensor.cpu() for key, tensor in tensors.items()}, self._path(name))
            except BaseException:
                self._path(name).unlink(missing_ok=True)
                raise
        self._unsynced.add(name)

    def _sync(self) -> None:
        """Wait until what was written is on the disk itself: before anything says that it is there."""
        for name in self._unsynced:
            if name in self._entries:
                handle = os.open(self._path(name), os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        self._unsynced.clear()


def _own(tensor: Tensor) -> Tensor:
    """A tensor that fills memory of its own from beginning to end, as one that has been on disk does: what is computed
    from it then does not depend on where it was, and nothing else is kept with it."""
    contiguous = tensor.contiguous()
    size = contiguous.numel() * contiguous.element_size()
    return contiguous if contiguous.untyped_storage().nbytes() == size else contiguous.clone()


@contextmanager
def complaining(folder: Path) -> Iterator[None]:
    """Say in one sentence, a ModelError, why `folder` cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"what profiling keeps between its steps cannot be written to {folder} ({reason}): make room, name another "
            "folder in KVCOMPILE_CACHE, or give more --profile-memory"
        ) from None
