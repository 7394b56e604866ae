"""The default texts of `eval`: no document of theirs is one that calibration reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration.authored import authored_families
from kvcompile.calibration.family import Family, Stream
from kvcompile.calibration.python_text import python_families
from kvcompile.evaluation.held_out import described, evaluation_families

LONG = 200
"""Characters from which on a paragraph is nobody's by chance."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: every text is long enough."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def documents(families: Sequence[Family]) -> list[str]:
    return [text for family in families for document in family.documents if (text := document().strip())]


def paragraphs(texts: Sequence[str]) -> set[str]:
    return {part.strip() for text in texts for part in text.split("\n\n") if len(part.strip()) >= LONG}


def test_no_document_is_shared_with_calibration(tokenizer) -> None:
    """Calibration draws from these families whatever its seed, and with `--calib` from the user's text besides."""
    calibration = documents(python_families() + authored_families())
    held_out = documents(evaluation_families(tokenizer, 4096, None))
    assert min(len(calibration), len(held_out)) > 20
    assert not set(calibration) & set(held_out)
    assert len(paragraphs(held_out)) > 100
    assert not paragraphs(calibration) & paragraphs(held_out)


def test_the_kinds_are_those_of_calibration(tokenizer) -> None:
    names = [family.name for family in evaluation_families(tokenizer, 4096, None)]
    assert names == [family.name for family in python_families() + authored_families()]


def test_our_own_texts_fill_a_context_without_coming_twice(tokenizer) -> None:
    """4,096 tokens and what goes on; in prose a token has about four bytes."""
    for family in evaluation_families(tokenizer, 4096, None)[-3:]:
        texts = documents([family])
        assert len(texts) >= 3
        assert len(Stream(tokenizer, family, "all").take(10**6)) > 4 * (4096 + 256)
        assert len(paragraphs(texts)) == sum(len(paragraphs([text])) for text in texts)


def test_an_installation_without_text_still_has_ours(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert [family.name for family in evaluation_families(tokenizer, 64, None)] == ["dialogue", "essay", "paper"]


def test_the_users_text_takes_their_place(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time there was a kettle. " * 20)
    families = evaluation_families(tokenizer, 256, tmp_path)
    assert [family.name for family in families] == ["user"]
    assert described(families, tmp_path) == f"your text: {tmp_path}"
    (tmp_path / "story.txt").write_text("Once.")
    with pytest.raises(CalibrationError, match="expected at least 320"):
        evaluation_families(tokenizer, 256, tmp_path)


def test_held_out_texts_are_named(tokenizer) -> None:
    families = evaluation_families(tokenizer, 64, None)
    assert described(families, None) == "held-out texts: code, reference, dialogue, essay, paper"
