"""Writing an artifact: the same artifact gives the same bytes, and a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from kvcompile.artifacts.checks import printable, require_size
from kvcompile.artifacts.errors import ArtifactError
from kvcompile.artifacts.parts import PARTS
from kvcompile.artifacts.schema import Artifact, ByteAccount, ModelIdentity, Target, needed_version
from kvcompile.artifacts.validate import BUDGET_TENSORS, validate
from kvcompile.kernels.codecs import codec_of, is_quantised

NO_CHECKSUM = "0" * 64
"""What stands in the checksum's place while it is computed."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "model": tuple(f.name for f in fields(ModelIdentity) if f.name not in ("samples", "states")),
    "target": tuple(f.name for f in fields(Target)),
    "bytes": tuple(f.name for f in fields(ByteAccount)),
}
"""The metadata's objects with fixed keys."""


def write(artifact: Artifact, path: str | os.PathLike[str]) -> None:
    """Check an artifact and write it to `path` atomically: whatever happens, `path` holds the old file, or none, or
    the whole new one.

    Raises ArtifactError, and writes nothing, if a value is wrong or the file cannot be written.
    """
    validate(artifact, str(path))
    _check_codecs(artifact, str(path))
    data = to_bytes(artifact)
    require_size(printable(str(path)), len(data))
    try:
        replace_file(Path(os.path.realpath(path)), data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{printable(str(path))}: the file cannot be written: {printable(str(reason))}") from error


def _check_codecs(artifact: Artifact, source: str) -> None:
    """Refuse heads of a codec that no version of the format knows."""
    used = np.unique([artifact.budgets.k_bits, artifact.budgets.v_bits]).tolist()
    for codec in (codec_of(bits) for bits in used if is_quantised(bits)):
        if not codec.format_version:
            reason = f"heads are stored as {codec.name}, which no version of the format knows"
            raise ArtifactError(f"{printable(source)}: {reason}: such a plan can be measured, but not written")


def to_bytes(artifact: Artifact) -> bytes:
    """The file of a valid artifact, byte for byte."""
    checksum = hashlib.sha256(_encode(artifact, NO_CHECKSUM)).hexdigest()
    return _encode(artifact, checksum)


def _encode(artifact: Artifact, checksum: str) -> bytes:
    sections = {name: {key: getattr(getattr(artifact, name), key) for key in keys} for name, keys in SECTIONS.items()}
    if any(artifact.model.states):
        sections["model"]["states"] = artifact.model.states
    extra: dict[str, NDArray[Any]] = {}  # what only some artifacts have
    for part, names in PARTS.items():
        if (values := getattr(artifact, part)) is not None:
            extra |= {f"{part}.{name}": getattr(values, name) for name in names}
    if artifact.rank is not None:
        extra["rank"] = artifact.rank
    metadata: dict[str, Any] = {
        **sections,
        "format_version": needed_version(artifact),
        "checksum": checksum,
        "predicted_loss": None if math.isnan(artifact.predicted_loss) else artifact.predicted_loss,
        "solver": dict(artifact.solver),
        "calibration": dict(artifact.calibration),
        "versions": dict(artifact.versions),
    }
    tensors = {
        **{name: getattr(artifact.budgets, name) for name in BUDGET_TENSORS},
        "fingerprint.samples": artifact.model.samples,
        **extra,
        **{f"profile.{name}": values for name, values in artifact.profile.items()},
    }
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # safetensors copies memory as it lies: a transposed array has to be laid out anew.
    return save({name: np.asarray(values, order="C") for name, values in tensors.items()}, {"kvcompile": text})


def replace_file(path: Path, data: bytes) -> None:
    """Put a whole file in place, or none. Raises OSError."""
    if path.exists() and not path.is_file():
        raise OSError(None, "it is not a regular file")
    temporary = path.parent / f".kvb-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows has no such call for folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
