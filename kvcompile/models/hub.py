"""A model's files from the Hugging Face hub, or from its cache on this disk."""

from __future__ import annotations

from pathlib import Path

from kvcompile.artifacts.errors import ModelError
from kvcompile.artifacts.hub import UnreachableError, snapshot

WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""Weights, configuration and tokenizer; no pickles, no code."""

UNWANTED = ["*/*", "consolidated*"]
"""Other formats' folders, and Mistral's second copy of the weights."""


class HubUnreachableError(ModelError):
    """The hub gives no answer and the model is not in its cache here."""


def fetch(repo_id: str) -> Path:
    """The folder of a hub model's files, downloaded where they are not cached; HF_HUB_OFFLINE and HF_HOME are heeded.

    Raises HubUnreachableError where neither hub nor cache has an answer, ModelError where the hub says no.
    """
    try:
        return snapshot(repo_id, "model", ModelError, WANTED, UNWANTED)
    except UnreachableError:
        raise HubUnreachableError(
            f"the model {repo_id} is not wholly in the local cache and the hub is out of reach: check the network and "
            "HF_HUB_OFFLINE, or give a folder or a .gguf file"
        ) from None
