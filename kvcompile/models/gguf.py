"""A GGUF file as a folder that transformers loads at once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.cache_dir import cache_dir
from kvcompile.models.gguf_reader import one_reader
from kvcompile.models.gguf_weights import write_weights


def converted(file: Path, dtype: torch.dtype) -> Path:
    """The folder of `file`'s copy in transformers' own format, made on first use.

    Reading GGUF takes about 0.1 s for every million weights, reading the copy next to nothing. The copy holds the
    dequantised weights in `dtype`, and is made file by file, without the whole in memory; it lies in the
    cache folder under a name made of the file's path, size and time, of `dtype` and of the version of transformers.
    Raises ModelError for a file that cannot be read and for a cache folder that cannot be written.
    """
    state = file.stat()
    key = repr((str(file.resolve()), state.st_size, state.st_mtime_ns, str(dtype), transformers.__version__))
    folder = cache_dir("gguf", f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
    if not folder.is_dir():
        with one_reader():
            _convert(file, dtype, folder)
    return folder


def _convert(file: Path, dtype: torch.dtype, folder: Path) -> None:
    """Write the copy under another name first, so that a killed process leaves nothing that looks finished."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file: it does not start with the letters GGUF")
    model, tokenizer = _read(file, dtype)

    @contextlib.contextmanager
    def writing() -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 1e9
            raise ModelError(
                f"the converted model ({size:.1f} GB) cannot be written to {folder.parent} ({error}): make room, or "
                "name another folder in KVCOMPILE_CACHE"
            ) from None

    with writing():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Not by mkdtemp, whose folders are their owner's alone: who may read this one is up to the umask.
        unfinished = folder.with_name(f".unfinished-{secrets.token_hex(8)}")
        unfinished.mkdir()
    try:
        with _reading(file):
            write_weights(file, model, dtype, unfinished, writing)
        with writing():
            model.config.save_pretrained(unfinished)
            model.generation_config.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            _open_up(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # Else another process was faster, and its copy is as good.
                    raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Let everyone read a folder's files who may read the folder: safetensors makes files that are their owner's alone.
    A file system without such rights stays as it is."""
    allowed = folder.stat().st_mode & 0o666
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            file.chmod(allowed)


def _read(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, laid out without numbers, and the tokenizer."""
    with _reading(file):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        config.dtype = dtype
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.config.architectures = [type(model).__name__]
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers 5.17 names the wrong tokens here; the numbers, taken from the file, are right.
    for name in ("bos_token", "eos_token"):
        number = getattr(model.config, f"{name}_id", None)
        if isinstance(number, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    return model, tokenizer


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        with _quiet_off_terminal():
            yield
    except ModelError:
        raise
    except ImportError:
        raise ModelError("GGUF files need two more packages: pip install gguf accelerate") from None
    except Exception as error:  # The parser meets a damaged file with whatever exception comes first.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{file} cannot be read as a GGUF model ({reason}): get it anew, or give a folder") from None


@contextlib.contextmanager
def _quiet_off_terminal() -> Iterator[None]:
    """Keep the converter's progress bars, which cannot be switched off, out of logs."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
