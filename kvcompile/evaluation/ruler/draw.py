"""Samples: texts as long as the context allows, as token ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from kvcompile.artifacts import TargetError
from kvcompile.evaluation.ruler.fill import largest
from kvcompile.evaluation.ruler.haystack import Documents
from kvcompile.evaluation.ruler.prompt import Prompt
from kvcompile.evaluation.ruler.sample import Sample, Setting, Task, Text


def draw_samples(
    tokenizer: Any, tasks: Mapping[str, Task], length: int, count: int, seed: int, documents: Documents
) -> list[Sample]:
    """`count` samples of every task, each with as much haystack as lets context, question and the longest answer have
    at most `length` tokens together. Equal seeds give equal samples; essays are made of `documents`.

    Raises:
        TargetError: a length that is too short for a task.
    """
    prompt, setting = Prompt.of(tokenizer), Setting(length, documents)
    return [
        sample for name, task in tasks.items() for sample in _samples(name, task, prompt, setting, range(count), seed)
    ]


def _samples(name: str, task: Task, prompt: Prompt, setting: Setting, numbers: range, seed: int) -> list[Sample]:
    writers = [_writer(task, setting, f"{seed}:ruler {name} {number}") for number in numbers]
    least = max(len(prompt.ids(write(task.least))) for write in writers) + task.new_tokens
    if least > setting.length:
        raise TargetError(f"a context of {setting.length} tokens is too short for {name}: expected {least} or more")
    return [_sample(name, number, task, prompt, setting, write) for number, write in zip(numbers, writers, strict=True)]


def _writer(task: Task, setting: Setting, seed: str) -> Callable[[int], Text]:
    return lambda units: task.write(random.Random(seed), units, setting)


def _sample(
    name: str, number: int, task: Task, prompt: Prompt, setting: Setting, write: Callable[[int], Text]
) -> Sample:
    room = setting.length - task.new_tokens
    text = write(largest(lambda units: len(prompt.ids(write(units))), room, task.least, task.most))
    context, question = prompt.parted(text)
    return Sample(name, number, context, question, text.question.strip(), text.expected, task.new_tokens)
