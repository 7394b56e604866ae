"""Interrupted profiles resume: running sums on disk, replaced atomically after every finished item."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.kernels import codecs, softmax
from kvcompile.runtime import fitted, references, rotation

Sums = dict[str, NDArray[Any]]

FILE = "sums.npz"

OPERATIONS = ("attention_effects", "attention_gradient", "attention_peaks", "error_weights", "prompt_attention")
"""The folders in `kernels` of what a profile is measured with."""


def profile_key(*, fingerprint: str, calibration: str, dtype: str, seed: int, sink: int, checks: int) -> str:
    """sha256, in hex, of everything a profile depends on: the model's fingerprint and dtype, the hash of the
    calibration text, seed, sinks, the number of whole plans that are run, and the sources of what measures (this
    package, the quantiser, the values that they pass, how tokens are chosen and values fitted, the codecs, and the
    operations in torch and C), so that no change of ours meets old numbers."""
    digest = hashlib.sha256(repr((fingerprint, calibration, dtype, seed, sink, checks)).encode())
    here, kernels = Path(__file__).parent, Path(codecs.__file__).parent.parent
    sources = [*here.glob("*.py"), *(here.parent / "quantiser").glob("*.py"), here.parent / "stages.py"]
    sources += [Path(str(module.__file__)) for module in (fitted, references, rotation, softmax)]
    folders = [kernels / name for name in ("codecs", "native", *OPERATIONS)]
    code = (file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".c", ".h"))
    for source in [*sorted(sources), *sorted(code)]:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def load(folder: Path, fresh: Sums, name: str = FILE) -> Sums:
    """The sums kept in `folder`, or `fresh` where none of the same names, shapes and dtypes can be read."""
    try:
        with np.load(folder / name, allow_pickle=False) as file:
            kept = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return fresh
    return kept if _layout(kept) == _layout(fresh) else fresh


def save(folder: Path, sums: Sums, name: str = FILE) -> None:
    """Replace the sums in `folder`, so that a crash leaves either the old or the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.{os.getpid()}"
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **sums)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / name)
    finally:
        partial.unlink(missing_ok=True)


def _layout(sums: Sums) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, array.dtype.str) for name, array in sums.items()}
