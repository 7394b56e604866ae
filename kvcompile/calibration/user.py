"""Calibration text from the user's own files (`--calib PATH`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration.family import Family

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".go", ".java", ".js", ".ts", ".rs"}
JSONL_SUFFIXES = {".jsonl", ".ndjson"}

PIECE = 65_536
"""Characters. Longer documents are split, so that a window out of a huge file does not cost tokenising all of it."""


def user_family(path: Path) -> Family:
    """The family "user": one file of any name, or a folder's text and jsonl files, recursively and sorted by path.

    Every file is UTF-8 text, or for jsonl one JSON object a line with a string "text" or a chat "messages". Raises
    CalibrationError for what is missing, unreadable, in another encoding, no such jsonl, or empty in all.
    """
    texts = [text for file in _files(path) for text in _texts(file) if text.strip()]
    if not texts:
        raise CalibrationError(f"{path} holds no calibration text: every file is empty")
    pieces = (text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE))
    return Family("user", tuple(partial(str, piece) for piece in pieces))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CalibrationError(f"there is no calibration text at {path}: expected a file or a folder")
    visible = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
    files = sorted(file for file in visible if file.suffix in TEXT_SUFFIXES | JSONL_SUFFIXES and file.is_file())
    if not files:
        raise CalibrationError(
            f"the folder {path} holds no calibration text: expected files such as .txt, .md, .py or .jsonl"
        )
    return files


def _texts(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file} is not UTF-8 text (byte {error.start}): convert it, or leave it out of the calibration text"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read ({error.strerror}): expected calibration text") from None
    if file.suffix not in JSONL_SUFFIXES:
        yield text
        return
    # Not splitlines: it also splits at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _encodable(_record_text(line, f"{file}, line {number}"), f"{file}, line {number}")


def _record_text(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise CalibrationError(f"{place} is not JSON: expected one JSON object a line") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return "\n\n".join(text for message in record["messages"] for text in _message_texts(message))
    raise CalibrationError(f'{place} has no text: expected a string under "text", or a list under "messages"')


def _encodable(text: str, place: str) -> str:
    """The text, unless it has what JSON can write and UTF-8 cannot: half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise CalibrationError(
            f"{place} has {half} alone: expected both surrogates of a character, or neither"
        ) from None
    return text


def _message_texts(message: Any) -> list[str]:
    """A message's content: a string, or a list of parts of which the textual ones count."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
