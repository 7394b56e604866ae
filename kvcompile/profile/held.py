"""What episodes need between a profile's steps: tensors by name, in memory as far as a budget goes and on disk beyond.

An entry is written once and never changed. So that an interrupted profile can go on from its last save, `save` puts
everything that is still needed on disk; an entry that is there comes back under its name in another process too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcompile.artifacts.errors import ModelError

UNLIMITED = 1 << 62


@dataclass
class _Entry:
    """Tensors, None where they are on disk alone; whether they are on disk; and their bytes."""

    tensors: dict[str, Tensor] | None
    on_disk: bool
    nbytes: int


class Held:
    """Entries of tensors by name. `memory`: bytes that they may take outside of `folder`, which is made when it is
    needed; without one, what does not fit goes to a folder of its own that ends with the object."""

    def __init__(self, folder: Path | None = None, memory: int = UNLIMITED, device: torch.device | None = None) -> None:
        self.memory, self.device = memory, device
        self._own = tempfile.TemporaryDirectory(prefix="kvcompile-") if folder is None else None
        self.folder = folder or Path(self._own.name if self._own else "")
        self._entries: dict[str, _Entry] = {}
        self._leaving: list[str] = []
        self._left: list[str] = []
        self._unsynced: set[str] = set()
        self._used = 0

    def put(self, name: str, **tensors: Tensor) -> None:
        """Keep tensors under a name. Raises ModelError where they fit neither in memory nor on disk."""
        # Contiguous wherever they end up, so that what is computed from them does not depend on that.
        entry = _Entry({key: t.detach().contiguous() for key, t in tensors.items()}, False, 0)
        entry.nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        old = self._entries.get(name)
        if old is not None and old.tensors is not None:
            self._used -= old.nbytes
        if self._used + entry.nbytes > self.memory:
            self._write(name, entry)
            entry.tensors = None
        else:
            self._used += entry.nbytes
        self._entries[name] = entry

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors under a name, on the device that they came from; KeyError where there are none."""
        entry = self._entries.get(name)
        if entry is not None and entry.tensors is not None:
            return entry.tensors
        try:
            # Copied out of the mapped file: at places of memory as torch itself chooses, and not counted twice.
            return {key: t.clone().to(self.device or t.device) for key, t in load_file(self._path(name)).items()}
        except (OSError, SafetensorError):
            raise KeyError(name) from None

    def one(self, name: str) -> Tensor:
        """The only tensor under a name."""
        (tensor,) = self.get(name).values()
        return tensor

    def drop(self, *names: str) -> None:
        """Give entries up once the step at hand is done (`commit`)."""
        self._leaving += names

    def commit(self) -> None:
        """The step at hand is done: what it dropped leaves memory now, and the disk after the next `save`."""
        for name in self._leaving:
            entry = self._entries.pop(name, None)
            if entry is not None and entry.tensors is not None:
                self._used -= entry.nbytes
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
                self._write(name, entry)
        self._sync()
        record()
        for name in self._left:
            self._path(name).unlink(missing_ok=True)
        self._left = []

    def clear(self) -> None:
        """Give everything up, on disk too."""
        self._entries, self._leaving, self._left, self._used = {}, [], [], 0
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, entry: _Entry) -> None:
        assert entry.tensors is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.cpu() for key, tensor in entry.tensors.items()}, self._path(name))
        except (OSError, SafetensorError) as error:
            self._path(name).unlink(missing_ok=True)
            raise ModelError(full_disk(self.folder, error)) from None
        entry.on_disk = True
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


def full_disk(folder: Path, error: Exception) -> str:
    """The sentence for what cannot be written to `folder`."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"what profiling keeps between its steps cannot be written to {folder} ({reason}): make room, name another "
        "folder in KVCOMPILE_CACHE, or give more --profile-memory"
    )
