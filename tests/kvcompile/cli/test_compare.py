"""`run --compare`: both answers, their bytes, and where they part."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kvcompile.artifacts import read
from kvcompile.cli.answer import Answer
from kvcompile.cli.comparison import Comparison, Parting, part, parting_line, saved_line, show

TEXT = "All work and no play makes the cache a dull place. " * 3


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


def tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("budget", "full", "expected"),
    [
        ("the channel is 9.", "the channel is 9.", None),
        ("the channel is 9.", "the channel is 4.", Parting(15, "... channel is ", "9.", "4.")),
        ("9 and 4", "4 and 9", Parting(0, "", "9 an", "4 an")),
        ("four", "four or five", Parting(4, "four", "", " or ")),
        ("four or five", "four", Parting(4, "four", " or ", "")),
    ],
)
def test_where_answers_part(budget: str, full: str, expected: Parting | None) -> None:
    assert part(Letters(), tokens(budget), tokens(full)) == expected


def comparison(budget_bytes: int, full_bytes: int, parting: Parting | None = None) -> Comparison:
    one = Answer((1, 2, 3), "[bold]nine[/bold]", 2.0, 20.5, budget_bytes)
    other = Answer((1, 2, 3), "the full one's answer", 1.5, 11.25, full_bytes)
    return Comparison(4096, 2500, one, other, parting)


def shown(found: Comparison, width: int, terminal: bool) -> str:
    screen = StringIO()
    show(Console(file=screen, width=width, force_terminal=terminal, color_system=None), found)
    return screen.getvalue()


def beside(text: str) -> bool:
    return any("nine" in line and "the full one's answer" in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("width", "terminal", "columns"), [(100, True, True), (160, True, True), (99, True, False), (160, False, False)]
)
def test_two_columns_where_there_is_room(width: int, terminal: bool, columns: bool) -> None:
    text = shown(comparison(20_000_000, 50_000_000), width, terminal)
    assert beside(text) == columns
    assert "[bold]nine[/bold]" in text, "markup in an answer is text"
    for figure in ("20 MB (20000000 bytes)", "50 MB (50000000 bytes)", "20.5 a second", "11.2 a second"):
        assert figure in " ".join(text.split())
    assert text.splitlines()[-1] == saved_line(comparison(20_000_000, 50_000_000))


def test_the_last_line_says_what_was_saved() -> None:
    saved = "Saved: 30 MB of 50 MB of KV cache at 2503 tokens, 2.5 times smaller; "
    parting = Parting(2, "on channel", " 4", " 9")
    assert saved_line(comparison(20_000_000, 50_000_000)) == saved + "the same answer."
    assert saved_line(comparison(20_000_000, 50_000_000, parting)) == saved + "another answer."
    assert saved_line(comparison(50_000_000, 20_000_000)) == (
        "Saved: nothing at 2503 tokens, of which the full cache takes 20 MB; the artifact's 50 MB are for 4096 tokens; "
        "the same answer."
    )


def test_the_place_in_words() -> None:
    assert parting_line(None) == "The same answer, token by token."
    assert parting_line(Parting(2, "on channel", " 4", "")) == (
        "The answers part at token 3: after 'on channel' the artifact has ' 4', the full cache nothing more."
    )
    assert "token 1: at once the artifact has '4'" in parting_line(Parting(0, "", "4", "9"))


@pytest.fixture(scope="module")
def artifacts(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that keeps everything, in the model's own type, and one that keeps next to nothing."""
    from kvcompile.compiler import build, resolve
    from kvcompile.models import load

    loaded = load(str(model_folder))
    folder = tmp_path_factory.mktemp("artifacts")
    whole = folder / "whole.kvb"
    made = build(loaded.model, loaded.tokenizer, mem="100%", context=192, out=whole, name=loaded.name, kv_dtype="fp32")
    resolve(made, mem="10%", out=folder / "little.kvb")
    return {"whole": whole, "little": folder / "little.kvb"}


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1, "--top-k", 20, "--seed", 5)], ids=["greedy", "sampled"])
def test_nothing_differs_where_nothing_is_dropped(kvcompile, artifacts, prompt, sampling) -> None:
    command = ("run", artifacts["whole"], "--prompt", prompt, "--max-new-tokens", 20, "--raw", *sampling)
    found = json.loads(kvcompile(*command, "--compare", "--json")[1])
    assert found["same"]
    assert found["parting"] is None
    assert found["text"] == found["full_cache"]["text"] == json.loads(kvcompile(*command, "--json")[1])["text"]
    assert found["full_cache"]["new_tokens"] == 20
    status, out, _ = kvcompile(*command, "--compare")
    assert status == 0
    assert "The same answer, token by token." in out


def test_the_full_answer_is_the_models_own_and_its_bytes_are_counted(
    kvcompile, artifacts, prompt, model_folder
) -> None:
    from kvcompile.models import load

    plan = read(artifacts["little"])
    command = ("run", artifacts["little"], "--prompt", prompt, "--max-new-tokens", 20, "--raw", "--compare")
    found = json.loads(kvcompile(*command, "--json")[1])
    full = found["full_cache"]
    loaded = load(str(model_folder))
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    plain = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert full["text"] == loaded.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    # The last new token is not stored: nothing came after it.
    stored = found["prompt_tokens"] + full["new_tokens"] - 1
    assert full["cache_bytes"] * plan.target.context == plan.bytes.full * stored
    assert found["cache_bytes"] == plan.bytes.resident < full["cache_bytes"]


def test_answers_that_part_are_shown_with_the_place(kvcompile, artifacts, prompt) -> None:
    command = ("run", artifacts["little"], "--prompt", prompt, "--max-new-tokens", 40, "--raw", "--compare")
    found = json.loads(kvcompile(*command, "--json")[1])
    at = found["parting"]["at"]
    assert not found["same"]
    assert found["parting"]["budget"] != found["parting"]["full"]
    status, out, err = kvcompile(*command)
    assert (status, err) == (0, "")
    assert f"The answers part at token {at + 1}: " in out
    assert out.splitlines()[-1].startswith("Saved: ")
    assert out.splitlines()[-1].endswith("another answer.")
    assert f"{read(artifacts['little']).bytes.resident} bytes" in out
