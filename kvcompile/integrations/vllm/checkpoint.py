"""Whether the checkpoint that an engine loads is the model that an artifact is for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import Artifact, ModelError, ModelIdentity
from kvcompile.artifacts.identity import (
    check_shape,
    check_structure,
    remedy,
    same_numbers,
    sample_places,
    structure_of,
)
from kvcompile.artifacts.shapes import shape_of
from kvcompile.integrations.vllm.samples import samples
from kvcompile.integrations.vllm.structure import empty_model

EMBEDDING = "embed_tokens.weight"
"""How the name of the token embedding ends."""

LEFT_ALONE = (EMBEDDING, ".norm.weight", "lm_head.weight")
"""How the names end of what quantisation leaves alone: AWQ, for one, changes the norms of layers and not the last."""


def check_checkpoint(artifact: Artifact, config: Any, folder: str | os.PathLike[str], quantised: bool) -> str:
    """Check that the safetensors files in `folder` are the weights that an artifact was compiled for, from their first
    to their last element at 16 places of every tensor, as `check_identity` does with a loaded model.

    Tensors are compared under transformers' names; experts that it joins when it loads them are not compared. Of a
    `quantised` checkpoint the embedding, the last norm and the head are compared.

    Args:
        config: the checkpoint's transformers configuration.

    Returns:
        What was compared, for people: `272 of 272 tensors`; tied ones count as one.

    Raises:
        ModelError: another model or other weights, files that cannot be read, or nothing to compare.
    """
    expected, name = artifact.model, str(folder)
    check_shape(expected, shape_of(config, name), name)
    tensors = dict(sorted(empty_model(config).state_dict(keep_vars=True).items()))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    check_structure(expected, structure_of(shapes.items()), name)
    wanted = _samples_by_name(expected, {key: tensor.numel() for key, tensor in tensors.items()}, name)
    known = {key: value for key, value in shapes.items() if not quantised or key.endswith(LEFT_ALONE)}
    compared: set[str] = set()
    for found in samples(Path(folder), known):
        if not same_numbers(wanted[found.name], found.numbers, expected.dtype, found.dtype):
            raise ModelError(
                f"the checkpoint's weights are not those the artifact is for, the first of them {found.name}: "
                f"{remedy(expected, name)}"
            )
        compared.add(found.name)
    _check_enough(compared, quantised, name)
    return f"{_distinct(tensors[key] for key in compared)} of {_distinct(tensors.values())} tensors"


def _samples_by_name(expected: ModelIdentity, counts: dict[str, int], name: str) -> dict[str, NDArray[np.float32]]:
    """The artifact's samples of every tensor; `counts` are their numbers of elements, in the order of names."""
    ends = np.cumsum([len(sample_places(count)) for count in counts.values()])
    if ends[-1] != len(expected.samples):
        raise ModelError(f"the artifact has other samples than its model's tensors: {remedy(expected, name)}")
    return dict(zip(counts, np.split(expected.samples, ends[:-1]), strict=True))


def _check_enough(compared: set[str], quantised: bool, name: str) -> None:
    needed = LEFT_ALONE if quantised else (EMBEDDING,)
    if not any(key.endswith(needed) for key in compared):
        what = "token embedding, last norm or lm_head" if quantised else "token embedding"
        raise ModelError(
            f"no {what} in floating point and under transformers' name is in the safetensors files of {name}, so that "
            'they cannot be compared with the model the artifact is for: the option "fingerprint": "ignore" waives that'
        )


def _distinct(tensors: Iterable[Any]) -> int:
    return len({id(tensor) for tensor in tensors})
