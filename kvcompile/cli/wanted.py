"""What `kvcompile build` is asked for by name: the model, and the files of its targets."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kvcompile.artifacts import ModelError, TargetError
from kvcompile.artifacts.checks import show
from kvcompile.problem import check_out
from kvcompile.problem.memory import parse_memory


def check_name(model: str) -> None:
    """Refuse what cannot even be asked for as a path.

    Raises:
        ModelError: another user's home folder that is not there, or a name that is too long.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            Path(model).expanduser().stat()
    except RuntimeError:
        raise ModelError(f"{model} is in the home folder of nobody here: expected another path, or a hub id") from None
    except OSError as error:
        raise ModelError(
            f"{show(model)} is no name of a model ({error.strerror}): expected a path or a hub id"
        ) from None


def outputs(mem: str, path: Path) -> dict[str, Path]:
    """The file of every target in `mem`: `path` itself where there is one target.

    Raises:
        TargetError: an amount that is none, or one that comes twice.
        ArtifactError: several targets, and a folder in place of a file.
    """
    texts = [part.strip() for part in mem.split(",")]
    amounts = [parse_memory(text) for text in texts]
    if len(texts) == 1:
        return {texts[0]: path}
    if not path.name:
        check_out(path)  # a folder, which has no name to go by
    files = {text: path.with_name(f"{path.stem}-{text.replace('%', 'pct')}{path.suffix}") for text in texts}
    if len({(one.amount, one.is_share) for one in amounts}) < len(texts):
        raise TargetError(f"--mem {mem} names a target twice: expected different ones")
    return files
