"""A model's files from the Hugging Face hub, or from its cache on this disk."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

# The hub's client library has been httpx and httpx2; this name is the base of its errors in either.
from huggingface_hub.errors import HTTPError as TransferError  # type: ignore[attr-defined]

from kvcompile.artifacts.errors import ModelError

WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""Weights, configuration and tokenizer; no pickles, no code."""

UNWANTED = ["*/*", "consolidated*"]
"""Other formats' folders, and Mistral's second copy of the weights."""

PATIENCE = 3.0
"""Seconds that the hub has for a first answer."""


class HubUnreachableError(ModelError):
    """The hub gives no answer and the model is not in its cache here."""


def fetch(repo_id: str) -> Path:
    """The folder of a hub model's files, downloaded where they are not cached; HF_HUB_OFFLINE and HF_HOME are heeded.

    Raises HubUnreachableError where neither hub nor cache has an answer, ModelError where the hub says no.
    """
    try:
        cached_only = not _answers(repo_id)
        folder = snapshot_download(
            repo_id, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=cached_only
        )
    except HFValidationError:
        raise ModelError(
            f"{repo_id!r} is not a valid hub id: expected owner/name, as in Qwen/Qwen2.5-7B-Instruct"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"the model {repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, "
            "then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no public model {repo_id}: check the spelling, or run `hf auth login` if it is private"
        ) from None
    except LocalEntryNotFoundError:
        raise HubUnreachableError(
            f"the model {repo_id} is not wholly in the local cache and the hub is out of reach: check the network and "
            "HF_HUB_OFFLINE, or give a folder or a .gguf file"
        ) from None
    except (HfHubHTTPError, TransferError, OSError) as error:
        raise ModelError(f"downloading {repo_id} failed ({_first_line(error)}): run the command again") from None
    return Path(folder)


def _answers(repo_id: str) -> bool:
    """Whether the hub says anything at all, be it no. `snapshot_download` waits for minutes where nobody answers."""
    try:
        HfApi().model_info(repo_id, timeout=PATIENCE)
    except HfHubHTTPError:
        return True
    except (TransferError, OfflineModeIsEnabled):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
