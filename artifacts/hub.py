"""Artifacts on the Hugging Face hub: `owner/name`, `owner/name@revision`, `owner/name:file.kvb`.

The hub's client library does the work, so its cache, its settings (HF_HOME, HF_HUB_OFFLINE) and its login hold here. It
is imported on use alone: what reads and writes files needs numpy and safetensors, no more.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcompile.artifacts.checks import printable
from kvcompile.artifacts.errors import ArtifactError, KvcompileError
from kvcompile.artifacts.parse import read
from kvcompile.artifacts.schema import Artifact

PATIENCE = 3.0
"""Seconds that the hub has for a first answer."""

PLACE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?", re.ASCII)


class UnreachableError(Exception):
    """The hub gives no answer, and what was asked for is not in its cache here."""


@dataclass(frozen=True)
class Place:
    """A repository on the hub, a revision of it (None: its main one) and a file in it (None: its only artifact)."""

    repo: str
    revision: str | None
    file: str | None


def parse_place(source: str) -> Place | None:
    """The place on the hub that a name stands for; None where it is a path."""
    found = PLACE.fullmatch(source)
    if found is None or source[0] in "./~" or (source.endswith(".kvb") and found["file"] is None):
        return None
    return Place(found["repo"], found["revision"], found["file"])


def fetch(source: str | os.PathLike[str]) -> Artifact:
    """The artifact in a file, or in a repository on the hub where there is no such file.

    Raises:
        ArtifactError: a file that cannot be read or fails a check, or a repository that cannot be had.
    """
    place = None if os.path.exists(source) else parse_place(os.fspath(source))
    return read(source if place is None else _file(place))


def _file(place: Place) -> Path:
    try:
        folder = snapshot(place.repo, "artifact", ArtifactError, [place.file or "*.kvb"], revision=place.revision)
    except UnreachableError:
        raise ArtifactError(
            f"there is no file {place.repo}, {place.repo} is not in the local cache, and the hub is out of reach: "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from None
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.kvb"))
    if place.file is not None and place.file in names:
        return folder / place.file
    if place.file is None and len(names) == 1:
        return folder / names[0]
    said = ", ".join(names) or "none"
    raise ArtifactError(f"{place.repo} has these artifacts: {printable(said)}; name one as {place.repo}:FILE.kvb")


def snapshot(
    repo_id: str,
    what: str,
    refusal: type[KvcompileError],
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
    revision: str | None = None,
) -> Path:
    """The folder of a repository's files, downloaded where they are not cached.

    Raises UnreachableError where neither hub nor cache has an answer, and a `refusal` where the hub says no; `what` is
    what the files are.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The hub's client library has been httpx and httpx2; this name is the base of its errors in either.
    from huggingface_hub.errors import HTTPError as TransferError  # type: ignore[attr-defined]

    try:
        with _progress_bars_on_terminals_only():
            folder = snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
                local_files_only=not _answers(repo_id),
            )
    except HFValidationError:
        raise refusal(
            f"{repo_id!r} is not a valid hub id: expected owner/name, as in Qwen/Qwen2.5-7B-Instruct"
        ) from None
    except GatedRepoError:
        raise refusal(
            f"the {what} {repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, "
            "then run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise refusal(
            f"the {what} {repo_id} has no revision {revision!r}: expected a branch, a tag or a commit"
        ) from None
    except RepositoryNotFoundError:
        raise refusal(
            f"the hub has no public {what} {repo_id}: check the spelling, or run `hf auth login` if it is private"
        ) from None
    except LocalEntryNotFoundError:
        raise UnreachableError from None
    except (HfHubHTTPError, TransferError, OSError) as error:
        raise refusal(f"downloading {repo_id} failed ({first_line(error)}): run the command again") from None
    return Path(folder)


@contextlib.contextmanager
def _progress_bars_on_terminals_only() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _answers(repo_id: str) -> bool:
    """Whether the hub says anything at all, be it no. `snapshot_download` waits for minutes where nobody answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as TransferError  # type: ignore[attr-defined]

    try:
        HfApi().model_info(repo_id, timeout=PATIENCE)
    except HfHubHTTPError:
        return True
    except (TransferError, OfflineModeIsEnabled):
        return False
    return True


def push(file: str | os.PathLike[str], repo: str, *, name: str | None = None, private: bool = False) -> str:
    """Put an artifact into a repository on the hub, made if it is not there, under `name` or the file's own; a
    repository without a model card gets one. Returns the commit's address.

    Raises:
        ArtifactError: a file that is no valid artifact, or a hub that does not take it.
    """
    artifact = read(file)
    name = name or Path(file).name
    place = parse_place(repo)
    named = name.endswith(".kvb") and not {"", ".", "..", ".git"} & set(name.split("/"))
    if place is None or place != Place(repo, None, None) or not named:
        raise ArtifactError(
            f"{printable(repo)} with {printable(name)}: expected owner/name, and a file that ends in .kvb inside of it"
        )
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import HTTPError as TransferError  # type: ignore[attr-defined]

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, os.fspath(file))]
        if not api.file_exists(repo, "README.md"):
            files.append(CommitOperationAdd("README.md", _card(artifact, repo, name).encode()))
        commit = api.create_commit(repo, files, commit_message=f"Add {name}")
    except HFValidationError as error:
        raise ArtifactError(f"{printable(repo)} is not a valid hub id ({first_line(error)})") from None
    except (HfHubHTTPError, TransferError, OSError) as error:
        raise ArtifactError(
            f"{repo} takes no upload ({first_line(error)}): expected a hub that can be reached, and a token that may "
            "write there (`hf auth login`)"
        ) from None
    return str(commit.commit_url)


def _card(artifact: Artifact, repo: str, name: str) -> str:
    """A model card that says what the file is and how to use it."""
    target, account = artifact.target, artifact.bytes
    base = f"base_model: {artifact.model.name}\n" if PLACE.fullmatch(artifact.model.name) else ""
    share, use = f"{account.resident / account.full:.1%}", f"{repo}:{name}"
    return f"""---
library_name: kvcompile
{base}tags:
- kv-cache
---

# {repo.split("/")[1]}

A compiled KV cache for {artifact.model.name}: {share} of the full cache's bytes ({account.resident} bytes) for
{target.batch} x {target.context} tokens in {target.dtype}.

```python
from kvcompile.runtime import attach

attach(model, "{use}")
```

    kvcompile run {use} --prompt file.txt
"""


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
