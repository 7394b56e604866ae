"""Shared prefixes inside vLLM: kept once, and forked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm_engines import EXACT, engine

from kvcompile.integrations.vllm.connector import KEEP, KVCompileConnector, States, shared_tokens
from kvcompile.integrations.vllm.line import arguments

COUNT = 16


@pytest.mark.parametrize("chunk", [4096, 200])
def test_a_second_question_does_not_read_the_document_again(
    smollm2: Path, text_ids: list[int], ours: Callable[..., list[int]], chunk: int
) -> None:
    """What is answered is what our runtime answers to a document, cut, and then the question; whether the state had
    been kept before or not, one by one or all at once."""
    documents = [text_ids[:1500], text_ids[200:700]]
    questions = [text_ids[40:53], text_ids[900:931], text_ids[5:6]]
    prompts = [(len(d), d + q) for d in documents for q in questions]
    expected = [ours(smollm2, EXACT, prompt, COUNT, shared) for shared, prompt in prompts]
    sampling = [
        SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, extra_args={KEEP: shared})
        for shared, _ in prompts
    ]
    settings = arguments(str(EXACT), context=2048, prefixes=2)
    with engine(smollm2, None, **settings, max_num_batched_tokens=chunk) as llm:
        one_by_one, cached = [], []
        for (_, prompt), asked in zip(prompts, sampling, strict=True):
            (output,) = llm.generate([{"prompt_token_ids": prompt}], [asked], use_tqdm=False)
            one_by_one.append(list(output.outputs[0].token_ids))
            cached.append(output.num_cached_tokens)
        llm.reset_prefix_cache()
        outputs = llm.generate([{"prompt_token_ids": p} for _, p in prompts], sampling, use_tqdm=False)
    assert one_by_one == expected
    assert cached == [0, 1500, 1500, 0, 500, 500]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def test_the_state_that_was_not_used_for_longest_makes_room() -> None:
    states = States(2)
    assert [states.place([1, 2]), states.place([3]), states.place([1, 2])] == [0, 1, 0]
    assert states.longest([1, 2, 9]) == (0, 2)
    assert states.place([4, 5]) == 1
    assert states.longest([3, 9]) is None
    assert states.longest([4, 5]) is None  # a prompt leaves a token to be read
    states.place([1])
    assert states.longest([1, 7]) == (0, 1)
    assert states.longest([1, 2, 7]) == (0, 1)
    assert states.longest([4, 5, 6], 2) == (1, 2)
    states.place([4])
    assert states.longest([4, 7, 8]) == (0, 1)
    assert states.longest([4, 7, 8], 2) is None  # so that what is kept of two tokens does not depend on it
    assert states.longest([4, 7, 8], 3) == (0, 1)
    states.clear()
    assert states.longest([1, 7]) is None


def request(name: str, tokens: list[int] | None, shared: Any, **others: Any) -> SimpleNamespace:
    asked = SimpleNamespace(extra_args={KEEP: shared})
    return SimpleNamespace(
        request_id=name, prompt_token_ids=tokens, num_prompt_tokens=len(tokens or []), sampling_params=asked, **others
    )


def test_more_prefixes_than_places_end_in_a_step() -> None:
    """The place is that of the last one, and no other state is put there."""
    connector: Any = KVCompileConnector.__new__(KVCompileConnector)
    connector._states, connector._loads, connector._blocks = States(1), [], {"a": 4, "b": 9}
    connector._requests = {"a": request("a", [*range(200)], 150), "b": request("b", [*range(300, 400)], 50)}
    new = [SimpleNamespace(req_id=name, num_computed_tokens=0) for name in ("a", "b")]
    scheduled = {"a": 200, "b": 100}
    meta = connector.build_connector_meta(SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_new_reqs=new))
    assert {block: mark.keep for block, mark in meta.marks.items()} == {4: -1, 9: 0}
    assert connector._states.longest([*range(300, 400)]) == (0, 50)
    assert connector._states.longest([*range(200)]) is None


def test_what_a_request_says_never_stops_the_engine() -> None:
    tokens = [*range(9)]
    asked = [4, -1, 99, "5", None, "many", float("inf"), float("nan"), [], {}]
    assert [shared_tokens(request("a", tokens, one)) for one in asked] == [4, 9, 9, 5, 0, 0, 0, 0, 0, 0]
    assert shared_tokens(request("a", None, 4)) == 0
    assert shared_tokens(request("a", tokens, 4, prompt_embeds=object())) == 0
