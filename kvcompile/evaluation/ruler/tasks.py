"""RULER's tasks by name, with the tokens that it gives an answer; a new one is a function and a line below, or a call
of `register`.

Its two tasks of questions about documents (qa_1, qa_2) are left out: they need SQuAD and HotpotQA.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcompile.artifacts import TargetError
from kvcompile.evaluation.ruler.keys import PAIRS
from kvcompile.evaluation.ruler.needles import Needles
from kvcompile.evaluation.ruler.sample import Task
from kvcompile.evaluation.ruler.tracking import track
from kvcompile.evaluation.ruler.words import LEAST_CODED, common_words, frequent_words

TASKS: dict[str, Task] = {
    "niah_single_1": Task(Needles("noise"), 128),
    "niah_single_2": Task(Needles("essay"), 128),
    "niah_single_3": Task(Needles("essay", value="uuids"), 128),
    "niah_multikey_1": Task(Needles("essay", keys=4), 128),
    "niah_multikey_2": Task(Needles("needles"), 128, most=PAIRS - 1),  # keys are used up
    "niah_multikey_3": Task(Needles("needles", key="uuids", value="uuids"), 128),
    "niah_multivalue": Task(Needles("essay", values=4), 128),
    "niah_multiquery": Task(Needles("essay", keys=4, queries=4), 128),
    "vt": Task(track, 30),
    "cwe": Task(common_words, 120, most=PAIRS),  # so many words there are for certain
    "fwe": Task(frequent_words, 50, least=LEAST_CODED),
}
ALL = "ruler"
"""Stands for all of them."""


def register(name: str, task: Task) -> None:
    """Add a task, from inside or outside of this package; the same one may be added again.

    Raises:
        ValueError: a name that another task has, or that stands for all.
    """
    if name == ALL or TASKS.setdefault(name, task) != task:
        raise ValueError(f"the name {name!r} is taken: expected another one for the task")


def named(names: Sequence[str]) -> dict[str, Task]:
    """Tasks by their names, each once; ALL stands for all.

    Raises:
        TargetError: an unknown task, or none.
    """
    wanted = [one for name in names for one in (TASKS if name == ALL else [name])]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        what = f"there is no task {unknown[0]!r}" if unknown else "no task was named"
        raise TargetError(f"{what}: expected {ALL}, or some of {', '.join(TASKS)}")
    return {name: TASKS[name] for name in wanted}
