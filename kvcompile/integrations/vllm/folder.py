"""Where the files of a checkpoint are."""

from __future__ import annotations

import os

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from kvcompile.artifacts import ModelError


def checkpoint_folder(model: str, revision: str | None) -> str:
    """The folder of a checkpoint, downloaded from the hub where it is none. Raises ModelError: there is none."""
    if os.path.isdir(model):
        return model
    try:
        return snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"])
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise ModelError(
            f"{model} is no folder and cannot be had from the hub ({type(error).__name__}): expected a checkpoint"
        ) from error
