"""Reading an artifact. A file is not trusted in anything: it is refused in one sentence, or it is valid throughout."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from kvcompile.artifacts.checks import DTYPES, printable, refuse, require_integer, require_size, show
from kvcompile.artifacts.errors import ArtifactError
from kvcompile.artifacts.parts import PARTS
from kvcompile.artifacts.schema import (
    STATES_VERSION,
    Artifact,
    Budgets,
    ByteAccount,
    ModelIdentity,
    Quantiser,
    Scorer,
    Target,
    newest_version,
)
from kvcompile.artifacts.serialize import NO_CHECKSUM, SECTIONS
from kvcompile.artifacts.validate import BUDGET_TENSORS, validate
from kvcompile.kernels.codecs import codec_of, is_quantised

TENSORS = {**BUDGET_TENSORS, "fingerprint.samples": "F32"}


def read(path: str | os.PathLike[str]) -> Artifact:
    """The artifact in the file at `path`.

    Raises ArtifactError, one sentence that names the file, the field, what was found and what was expected.
    """
    source = printable(str(path))
    try:
        found = Path(path).stat()
        # Opening a pipe would wait for a writer, so this comes first.
        if not stat.S_ISREG(found.st_mode):
            refuse(source, "the file", "is not a regular file, expected one that `kvcompile build` wrote")
        require_size(source, found.st_size)
        with open(path, "rb") as file:
            data = file.read(found.st_size + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{source}: the file cannot be read: {printable(str(reason))}") from error
    return from_bytes(data, str(path))


def from_bytes(data: bytes, name: str) -> Artifact:
    """The artifact that a file's bytes hold; `name` is the file's name for the message. Raises as `read` does."""
    source = printable(name)
    require_size(source, len(data))
    tensors = _tensors(data, source)
    header_bytes = int.from_bytes(data[:8], "little")
    metadata = _metadata(data[8 : 8 + header_bytes], source)
    version = _version(metadata, source)
    checksum = _get(metadata, "", "checksum", source)
    model, target, account = (_section(metadata, section, source) for section in SECTIONS)
    loss = _loss(metadata, source)
    reports = {key: _get(metadata, "", key, source) for key in ("solver", "calibration", "versions")}
    arrays = {key: _array(tensors, key, dtype, source) for key, dtype in TENSORS.items()}
    profile = {
        key.removeprefix("profile."): _array(tensors, key, None, source)
        for key in sorted(tensors)
        if key.startswith("profile.")
    }
    newer = tensors if version > 1 else {}  # in a version 1 file these names mean nothing
    scorer, quantiser = (_part(newer, part, source) for part in PARTS)
    samples = arrays.pop("fingerprint.samples")
    # The values' types are `validate`'s business: until then they are whatever the file says.
    lists = {"windows": model.pop("windows"), "states": _states(metadata["model"], version, source)}
    artifact = Artifact(
        model=ModelIdentity(
            **model,
            samples=samples,
            **{key: tuple(value) if isinstance(value, list) else value for key, value in lists.items()},
        ),
        target=Target(**target),
        bytes=ByteAccount(**account),
        budgets=Budgets(**arrays),
        predicted_loss=loss,
        **reports,
        profile=profile,
        scorer=None if scorer is None else Scorer(**scorer),
        quantiser=None if quantiser is None else Quantiser(**quantiser),
        rank=_array(newer, "rank", "I32", source) if "rank" in newer else None,
    )
    validate(artifact, name)
    _check_codecs(artifact, version, source)
    # Last, so that a wrong field is reported by its own name.
    _check_checksum(data, header_bytes, checksum, source)
    return artifact


def _tensors(data: bytes, source: str) -> dict[str, dict[str, Any]]:
    try:
        return dict(deserialize(data))  # type: ignore[no-untyped-call]
    except (SafetensorError, OverflowError) as error:
        reason = printable(str(error))
        expected = "expected a whole file that `kvcompile build` wrote"
        raise ArtifactError(f"{source}: the file is cut short or not safetensors ({reason}), {expected}") from error


def _metadata(header: bytes, source: str) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode()).get("__metadata__") or {}
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: the header holds no JSON object, expected a safetensors header") from error
    if "kvcompile" not in entries:
        refuse(source, "the metadata key kvcompile", "is missing, expected a file that `kvcompile build` wrote")
    try:
        metadata = json.loads(entries["kvcompile"], parse_float=_finite, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise ArtifactError(f"{source}: the metadata key kvcompile is no JSON, expected an object: {reason}") from error
    if not isinstance(metadata, dict):
        refuse(source, "the metadata key kvcompile", f"is {show(metadata)}, expected a JSON object")
    return metadata


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _get(section: dict[str, Any], prefix: str, key: str, source: str) -> Any:
    if key not in section:
        refuse(source, prefix + key, "is missing in the metadata, expected it as FORMAT.md describes")
    return section[key]


def _section(metadata: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    section = _get(metadata, "", name, source)
    if not isinstance(section, dict):
        refuse(source, name, f"is {show(section)}, expected a JSON object")
    return {key: _get(section, f"{name}.", key, source) for key in SECTIONS[name]}


def _states(section: dict[str, Any], version: int, source: str) -> Any:
    """What a file of a version that knows of linear attention says of it; in others the key means nothing."""
    return (0, 0) if version < STATES_VERSION else _get(section, "model.", "states", source)


def _version(metadata: dict[str, Any], source: str) -> int:
    version, newest = _get(metadata, "", "format_version", source), newest_version()
    if type(version) is int and version > newest:
        upgrade = f"this kvcompile reads up to version {newest}, upgrade it"
        refuse(source, "format_version", f"is {show(version)}, but {upgrade}")
    require_integer(source, "format_version", version, 1, newest)
    return int(version)


def _check_codecs(artifact: Artifact, version: int, source: str) -> None:
    """Refuse heads of a codec that files of this version do not know."""
    for field in ("k_bits", "v_bits"):
        table = getattr(artifact.budgets, field)
        for bits in np.unique(table).tolist():
            if is_quantised(bits) and not 0 < (least := codec_of(bits).format_version) <= version:
                at = [int(i) for i in np.argwhere(table == bits)[0]]
                expected = f"a file of version {least} with it" if least else "a codec that files may have"
                refuse(source, f"{field}{at}", f"is {bits}, expected {expected}")


def _loss(metadata: dict[str, Any], source: str) -> Any:
    """The predicted loss as a float: JSON has no NaN and may give 2.0 as 2; all else is left for `validate`."""
    loss = _get(metadata, "", "predicted_loss", source)
    if loss is None:
        return math.nan
    return float(loss) if type(loss) is int and abs(loss) < 2**53 else loss


def _array(tensors: dict[str, dict[str, Any]], name: str, dtype: str | None, source: str) -> NDArray[Any]:
    """One tensor as an array of the file's own element type, which has to be `dtype` if that is given."""
    if name not in tensors:
        refuse(source, f"tensor {name}", f"is missing, expected element type {dtype}")
    found = tensors[name]
    allowed = (dtype,) if dtype else tuple(DTYPES)
    if found["dtype"] not in allowed:
        problem = f"has the element type {show(found['dtype'])}, expected {' or '.join(allowed)}"
        refuse(source, f"tensor {printable(name)}", problem)
    try:
        return np.frombuffer(found["data"], DTYPES[found["dtype"]]).reshape(found["shape"])
    except (ValueError, OverflowError) as error:
        problem = f"has the shape {show(found['shape'])}, expected at most 64 dimensions of sizes that numpy can hold"
        raise ArtifactError(f"{source}: tensor {printable(name)} {problem}") from error


def _part(tensors: dict[str, dict[str, Any]], part: str, source: str) -> dict[str, NDArray[Any]] | None:
    """The tensors `part.NAME`, all of them or, where the file has none, None."""
    if not any(f"{part}.{name}" in tensors for name in PARTS[part]):
        return None
    return {name: _array(tensors, f"{part}.{name}", dtype, source) for name, dtype in PARTS[part].items()}


def _check_checksum(data: bytes, header_bytes: int, checksum: object, source: str) -> None:
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        refuse(source, "checksum", f"is {show(checksum)}, expected 64 lower-case hex digits")
    header, digits = data[: 8 + header_bytes], checksum.encode()
    if header.count(digits) != 1:
        refuse(source, "checksum", f"stands {header.count(digits)} times in the header, expected once")
    digest = hashlib.sha256(header.replace(digits, NO_CHECKSUM.encode()))
    digest.update(memoryview(data)[len(header) :])
    if digest.hexdigest() != checksum:
        refuse(source, "checksum", f"is {checksum}, expected {digest.hexdigest()}: the file has been altered")
