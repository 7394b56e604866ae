"""What the tasks write: what is asked for stands in the context as the paper describes it, and nowhere else."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from kvcompile.artifacts import TargetError
from kvcompile.calibration.probes import COLOURS, THINGS
from kvcompile.evaluation.ruler import ALL, TASKS, Task, Text, essay_documents, named, register
from kvcompile.evaluation.ruler.haystack import NOISE
from kvcompile.evaluation.ruler.keys import ADJECTIVES, NOUNS
from kvcompile.evaluation.ruler.needles import Needles
from kvcompile.evaluation.ruler.sample import Setting

SETTING = Setting(4096, essay_documents(None))
UNITS = {"niah_single_1": 40, "niah_multikey_2": 60, "niah_multikey_3": 60, "vt": 40, "cwe": 90, "fwe": 900}
NIAH = [name for name in TASKS if name.startswith("niah")]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NUMBER, KEY = r"[1-9][0-9]{6}", r"[a-z]+-[a-z]+"


def written(name: str, seed: object = 0, units: int | None = None, setting: Setting = SETTING) -> Text:
    return TASKS[name].write(random.Random(f"{seed}"), units or UNITS.get(name, 700), setting)


@pytest.mark.parametrize("name", TASKS)
def test_equal_seeds_write_equal_texts(name: str) -> None:
    assert written(name, 3) == written(name, 3)
    assert written(name, 3).expected != written(name, 4).expected


@pytest.mark.parametrize("name", TASKS)
def test_what_is_hidden_does_not_depend_on_the_haystack(name: str) -> None:
    few, many = (written(name, 1, units) for units in (100, 400))
    assert (few.question, few.prefix, few.expected) == (many.question, many.prefix, many.expected)
    assert len(few.context) < len(many.context)


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("seed", range(3))
def test_needles_give_the_values_asked_for(name: str, seed: int) -> None:
    text, task = written(name, seed), TASKS[name].write
    assert isinstance(task, Needles)
    key, value = (UUID if kind == "uuids" else NUMBER if kind == "numbers" else KEY for kind in (task.key, task.value))
    needles = re.findall(rf"One of the special magic {task.value} for ({key}) is: ({value})\.", text.context)
    others = UNITS[name] if task.haystack == "needles" else 0
    assert len(needles) == task.keys * task.values + others
    assert len({key for key, _ in needles}) == task.keys + others
    assert len({value for _, value in needles}) == len(needles)
    asked = list(dict.fromkeys(re.findall(key, text.question)))
    assert len(asked) == task.queries
    assert sorted(text.expected) == sorted(value for key, value in needles if key in asked)
    assert len(text.expected) == task.queries * task.values
    assert all(one not in text.question + text.prefix for one in text.expected)
    assert all(text.context.count(one) == 1 for one in text.expected)


@pytest.mark.parametrize("name", NIAH)
def test_one_and_several_values_are_asked_for_in_their_own_words(name: str) -> None:
    text = written(name)
    kind = "uuid" if name in ("niah_single_3", "niah_multikey_3") else "number"
    if name in ("niah_multivalue", "niah_multiquery"):
        assert text.context.startswith(f"Some special magic {kind}s are hidden within the following text.")
        assert text.question.startswith(f"\nWhat are all the special magic {kind}s for ")
        assert text.prefix.endswith(" mentioned in the provided text are")
    else:
        assert text.context.startswith(f"A special magic {kind} is hidden within the following text.")
        assert text.question.startswith(f"\nWhat is the special magic {kind} for ")
        assert text.prefix.endswith(" mentioned in the provided text is")


def test_several_keys_are_listed() -> None:
    text = written("niah_multiquery")
    assert re.search(rf"for {KEY}, {KEY}, {KEY}, and {KEY} mentioned", text.question)


def test_essays_are_the_users_own_repeated() -> None:
    own = Setting(4096, (lambda: "One fish. Two fish.", lambda: "Red fish! Blue fish?"))
    text = written("niah_single_2", units=60, setting=own)
    hay = re.sub(r"One of the special magic numbers for \S+ is: \d+\. ?", "", text.context.split("\n", 1)[1])
    assert len(hay.split()) == 60
    assert Counter(hay.split())["fish."] + Counter(hay.split())["fish!"] + Counter(hay.split())["fish?"] == 30


def test_needles_lie_anywhere() -> None:
    depths = []
    for seed in range(60):
        text = written("niah_single_2", seed)
        depths.append(text.context.index(text.expected[0]) / len(text.context))
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert 0.3 < sum(depths) / len(depths) < 0.7


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_is_to_be_tracked_after_a_worked_example(seed: int) -> None:
    text = written("vt", seed)
    example, proper = text.context.split("\n\nMemorize", 1)
    assert proper.count(NOISE) == 40
    (value,) = re.findall(r"value (\d{5}) in the text above", text.question)
    first, *hops = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)$", proper, re.M)
    assert first == (text.expected[0], value)
    assert hops == list(zip(text.expected[1:], text.expected, strict=False))
    assert len(set(text.expected)) == 5
    solved = example.rsplit("they are: ", 1)[1].split()
    assert re.findall(r"^VAR ([A-Z]{3}) = ", example, re.M) == solved
    assert len(solved) == 5
    assert text.prefix.endswith(f"5 variables are assigned the value {value}, they are:")


@pytest.mark.parametrize(("length", "often", "seldom"), [(4096, 30, 3), (4095, 6, 1)])
def test_common_words_are_common(length: int, often: int, seldom: int) -> None:
    text = written("cwe", 0, 50, Setting(length, SETTING.documents))
    example, proper = text.context.split("\nBelow", 1)
    items = re.findall(r"(\d+)\. (\S+)", proper)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    counts = Counter(word for _, word in items)
    assert {word for word, count in counts.items() if count == often} == set(text.expected)
    assert Counter(counts.values()) == {often: 10, seldom: 50}
    solved = re.findall(r"\d+\. (\S+)", example.rsplit("are: ", 1)[1])
    listed = Counter(re.findall(r"\d+\. (\S+)", example.split("\nQuestion")[0]))
    assert {word for word, _ in listed.most_common(10)} == set(solved)
    assert not set(solved) & set(text.expected)


def test_a_long_list_has_words_enough() -> None:
    text = written("cwe", units=TASKS["cwe"].most)
    assert len(set(re.findall(r"\d+\. (\S+)", text.context.split("\nBelow", 1)[1]))) == TASKS["cwe"].most + 10


@pytest.mark.parametrize("units", [80, 81, 97, 500, 5000])
def test_frequent_words_are_frequent(units: int) -> None:
    text = written("fwe", units=units)
    counts = Counter(text.context.split("coded words. ", 1)[1].split())
    (dots, most), *ranked = counts.most_common()
    assert dots == "..."
    assert most == int(units * 6 / 3.141592653589793**2)
    assert [word for word, _ in ranked[:3]] == list(text.expected)
    assert ranked[2][1] > ranked[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)


def test_keys_are_of_different_words_and_none_that_calibration_asks_for() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) >= 100
    assert len(set(NOUNS)) == len(NOUNS) >= 100
    assert not set(ADJECTIVES) & set(NOUNS)
    assert not set(COLOURS) & set(ADJECTIVES)
    assert not set(THINGS) & set(NOUNS)


def test_tasks_by_name() -> None:
    assert list(named([ALL])) == list(TASKS)
    assert list(named(["vt", "cwe", "vt"])) == ["vt", "cwe"]
    for names in (["texts", "vt"], ["niah"], []):
        with pytest.raises(TargetError, match="expected ruler, or some of niah_single_1"):
            named(names)


def test_a_task_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompile.evaluation.ruler.tasks.TASKS", dict(TASKS))
    task = Task(Needles("noise", keys=2), 64)
    register("niah_two", task)
    register("niah_two", task)
    assert named(["niah_two"]) == {"niah_two": task}
    for name in ("vt", ALL):
        with pytest.raises(ValueError, match="is taken"):
            register(name, task)
