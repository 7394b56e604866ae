"""Where a prompt is cut."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from kvcompile.evaluation.ruler.prompt import Prompt
from kvcompile.evaluation.ruler.sample import Text

TEXT = Text("Remember it. The key is 12.", "\nWhat is the key?", "The key is", ("12",))


class Pairs:
    """A token is two characters, so that it may lie across a cut."""

    chat_template = None
    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        ids = [1 + sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]
        return SimpleNamespace(input_ids=[0, *ids] if add_special_tokens else ids)


def test_the_context_is_all_before_the_question(smollm2_tokenizer) -> None:
    context, question = Prompt.of(smollm2_tokenizer).parted(TEXT)
    assert smollm2_tokenizer.decode(context).endswith("<|im_start|>user\nRemember it. The key is 12.")
    assert smollm2_tokenizer.decode(question) == (
        "\nWhat is the key?<|im_end|>\n<|im_start|>assistant\nThe key is"
    )  # fmt: skip


def test_the_context_does_not_know_the_question(smollm2_tokenizer) -> None:
    prompt = Prompt.of(smollm2_tokenizer)
    other = replace(TEXT, question="\nHow are you?", prefix="I am")
    assert (prompt.parted(TEXT)[0] == prompt.parted(other)[0]).all()


def test_a_model_without_a_chat_template_reads_plain_text() -> None:
    prompt = Prompt.of(Pairs())
    whole = f"{TEXT.context}{TEXT.question} {TEXT.prefix}"
    assert prompt.ids(TEXT).tolist() == Pairs()(whole).input_ids
    assert prompt.ids(TEXT)[0] == 0


def test_a_token_across_the_cut_comes_after_it() -> None:
    prompt = Prompt.of(Pairs())
    assert len(TEXT.context) % 2 == 1
    context, question = prompt.parted(TEXT)
    assert [*context, *question] == prompt.ids(TEXT).tolist()
    assert context.tolist() == Pairs()(TEXT.context[:-1]).input_ids
    even = replace(TEXT, context=TEXT.context + "!")
    assert prompt.parted(even)[0].tolist() == Pairs()(even.context).input_ids
