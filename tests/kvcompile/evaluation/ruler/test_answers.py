"""Samples answered by a tiny model, with the full cache and inside budgets, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcompile.artifacts import write
from kvcompile.compiler import build
from kvcompile.evaluation import contenders
from kvcompile.evaluation.ruler import Answered, answer, draw_samples, essay_documents, named, summarise_scores
from kvcompile.models import load

LENGTH = 800
"""Tokens, and bytes: the tiny model's tokenizer knows nothing longer."""


@pytest.fixture(scope="module")
def loaded(model_folder: Path):
    return load(str(model_folder))


@pytest.fixture(scope="module")
def artifact(loaded):
    return build(loaded.model, loaded.tokenizer, mem="30%", context=192, name=loaded.name)


@pytest.fixture(scope="module")
def answers(loaded, artifact) -> list[Answered]:
    samples = draw_samples(
        loaded.tokenizer, named(["niah_single_2", "niah_multikey_2", "fwe"]), LENGTH, 2, 0, essay_documents(None)
    )
    plans = contenders(artifact, ["uniform"], ["100%", "10%"], LENGTH)
    seen: list[tuple[int, int]] = []
    found = answer(loaded.model, loaded.tokenizer, samples, plans, lambda *progress: seen.append(progress))
    assert seen == [(i, 18) for i in range(1, 19)]
    return found


def of(answers: list[Answered], method: str, budget: str = "") -> list[Answered]:
    return [one for one in answers if (one.method, one.budget) == (method, budget)]


def test_a_whole_cache_answers_as_the_full_one(answers) -> None:
    full, whole, tenth = of(answers, "full cache"), of(answers, "uniform", "100%"), of(answers, "uniform", "10%")
    assert len(full) == len(whole) == len(tenth) == 6
    assert [one.answer for one in whole] == [one.answer for one in full]
    assert [one.answer for one in tenth] != [one.answer for one in full]
    assert [(one.task, one.number, one.expected) for one in tenth] == [
        (one.task, one.number, one.expected) for one in full
    ]
    assert all(one.share == 1 for one in full)
    assert all(one.share <= 0.1 for one in tenth)


@pytest.mark.parametrize("method", ["uniform", "scored", "snapkv", "kvzip"])
def test_a_batch_answers_as_one_by_one(loaded, artifact, method: str) -> None:
    samples = draw_samples(
        loaded.tokenizer, named(["niah_multikey_2", "niah_single_3", "fwe"]), LENGTH, 2, 0, essay_documents(None)
    )
    assert len({len(one.context) for one in samples}) > 1
    assert len({len(one.question) for one in samples}) > 1
    plans = contenders(artifact, [method], ["40%"], LENGTH)
    alone = answer(loaded.model, loaded.tokenizer, samples, plans)
    seen: list[tuple[int, int]] = []
    together = answer(loaded.model, loaded.tokenizer, samples, plans, lambda *now: seen.append(now), batch=4)
    assert seen == [(4, 12), (8, 12), (10, 12), (12, 12)]
    assert set(together) == set(alone)
    assert len({one.answer for one in alone}) > len(samples)


def test_the_model_is_as_before(loaded, artifact) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    samples = draw_samples(loaded.tokenizer, named(["fwe"]), LENGTH, 1, 0, essay_documents(None))
    answer(loaded.model, loaded.tokenizer, samples, contenders(artifact, ["optimal"], ["30%"], LENGTH))
    assert all((before[name] == tensor).all() for name, tensor in loaded.model.state_dict().items())


def test_scores_are_means_over_samples_and_then_over_tasks() -> None:
    def one(method: str, task: str, score: float) -> Answered:
        return Answered(method, "" if method == "full cache" else "50%", 0.5, task, 0, "", ("x",), "", score)

    found = summarise_scores(
        [
            one("worse", "vt", 0), one("worse", "cwe", 30), one("better", "vt", 100), one("better", "vt", 0),
            one("better", "cwe", 30), one("full cache", "vt", 0), one("full cache", "cwe", 0),
        ]
    )  # fmt: skip
    assert [line.method for line in found] == ["full cache", "better", "worse"]
    assert found[1].tasks == {"vt": 50, "cwe": 30}
    assert found[1].average == 40


def test_the_command_prints_and_writes(kvcompile, artifact, tmp_path) -> None:
    write(artifact, tmp_path / "a.kvb")
    (tmp_path / "text.txt").write_text("The lighthouse keeper counted ships. He wrote numbers in a book.\n" * 60)
    command = (
        "eval", tmp_path / "a.kvb", "--tasks", "niah_single_2,fwe", "--questions", "2", "--context", LENGTH, "--mem",
        "50%", "--allocators", "optimal,uniform", "--data", tmp_path / "text.txt", "--json", tmp_path / "a.json",
    )  # fmt: skip
    status, out, _ = kvcompile(*command)
    assert status == 0
    assert all(name in out for name in ("full cache", "optimal", "uniform", "single", "fwe", "average"))
    first = (tmp_path / "a.json").read_bytes()
    found = json.loads(first)
    assert (found["tasks"], found["questions"], found["context"]) == (["niah_single_2", "fwe"], 2, LENGTH)
    assert found["texts"] == f"essays: your text: {tmp_path / 'text.txt'}"
    assert len(found["samples"]) == 2 * 2 * 3
    assert set(found["samples"][0]) >= {"task", "number", "asked", "expected", "answer", "score"}
    assert [set(plan["tasks"]) for plan in found["plans"]] == [{"niah_single_2", "fwe"}] * 3
    kvcompile(*command)
    assert (tmp_path / "a.json").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "vt,haystack"], "there is no task 'haystack': expected"),
        (["--tasks", "texts,vt"], "texts are measured alone: expected"),
        (["--tasks", ""], "no task was named"),
        (["--tasks", "niah_single_1", "--context", "300"], "a context of 300 tokens is too short for niah_single_1: "),
        (["--tasks", "vt", "--plot", "a.png"], "--plot draws what is measured on texts"),
        (["--tasks", "vt", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_cost_one_sentence(kvcompile, artifact, tmp_path, monkeypatch, options, said) -> None:
    monkeypatch.chdir(tmp_path)
    write(artifact, tmp_path / "a.kvb")
    status, _, err = kvcompile("eval", "a.kvb", "--mem", "50%", "--allocators", "uniform", *options, "--json", "a.json")
    assert status == 2
    assert said in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert not Path("a.json").exists()
