"""The user's own calibration text: files, folders, jsonl, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration.user import PIECE, user_family


def texts(path: Path) -> list[str]:
    return [document() for document in user_family(path).documents]


def test_one_file_of_any_name(tmp_path: Path) -> None:
    file = tmp_path / "notes.xyz"
    file.write_text("\ufeffgrüße", encoding="utf-8")
    assert texts(file) == ["grüße"]


def test_a_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "a.md", "b/c.py", "b/skipped.bin", ".git/hidden.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "empty.txt").write_text(" \n")
    assert texts(tmp_path) == ["a.md", "b/c.py", "z.txt"]


def test_jsonl_holds_texts_or_chats(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    chat = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi."}, {"type": "image"}]},
        {"role": "tool", "content": None},
    ]
    records = [{"text": "plain\u2028line"}, {"messages": chat}]
    file.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n", encoding="utf-8")
    assert texts(file) == ["plain\u2028line", "Hello?\n\nHi."]


def test_long_documents_come_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    text = "".join(f"{i}," for i in range(PIECE // 2))
    file.write_text(text)
    pieces = texts(file)
    assert len(pieces) > 1
    assert "".join(pieces) == text


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no calibration text at .*nowhere: expected"):
        user_family(tmp_path / "nowhere")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(CalibrationError, match=r"holds no calibration text: expected files such as \.txt"):
        user_family(tmp_path)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(CalibrationError, match="every file is empty"):
        user_family(tmp_path / name)


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"gr\xfc\xdfe")
    with pytest.raises(CalibrationError, match=r"latin\.txt is not UTF-8 text \(byte 2\)"):
        user_family(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[]", "line 2 has no text"),
        ('{"text": 7}', "line 2 has no text"),
        ('{"messages": {}}', "line 2 has no text"),
        (r'{"text": "an emoji cut in two \ud83d"}', r"line 2 has \\ud83d alone"),
        (r'{"messages": [{"content": "\ude00"}]}', r"line 2 has \\ude00 alone"),
    ],
    ids=["cut", "deep", "list", "number", "no-list", "surrogate", "surrogate of a chat"],
)
def test_jsonl_that_is_none_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CalibrationError, match=message):
        user_family(tmp_path / "data.jsonl")
