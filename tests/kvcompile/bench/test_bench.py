"""`kvcompile bench`: what is measured is what is said, on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import KvcompileError, identify
from kvcompile.bench import subjects
from kvcompile.bench.decode import measure_decode
from kvcompile.bench.kernels import measure_kernels
from kvcompile.bench.prefill import measure_prefill
from kvcompile.bench.subjects import fill_randomly, ragged_plan, random_model
from kvcompile.bench.timing import medians
from kvcompile.cli.bench import command
from kvcompile.runtime import attach

CPU = torch.device("cpu")
TINY = {
    "model_type": "qwen2", "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(subjects.CONFIGS, "tiny", TINY)
    return random_model("tiny", torch.float32, CPU)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("bits", ["16", "8", "4", "mixed"])
def test_plans_keep_to_their_share(tiny, bits: str, uniform: bool) -> None:
    plan = ragged_plan(identify(tiny, "tiny"), 1024, 3, 0.25, "float32", bits, uniform=uniform)
    assert 0.2 * plan.bytes.full < plan.bytes.resident <= 0.25 * plan.bytes.full
    tokens = plan.budgets.capacity
    assert (len(set(tokens.flatten().tolist())) == 1) == uniform
    with attach(tiny, plan) as kv:
        cache = kv.new_cache(3)
        assert cache.nbytes == plan.bytes.resident
        fill_randomly(cache, 1024)
        assert cache.get_seq_length() == 1024
        assert tiny(torch.ones(3, 1, dtype=torch.int64), past_key_values=cache).logits.isfinite().all()


def test_every_part_is_measured(tiny) -> None:
    identity = identify(tiny, "tiny")
    plan = ragged_plan(identity, 512, 2, 0.25, "float32", "mixed")
    rows = {row.method: row for row in measure_kernels(identity, 512, 2, 0.25, "float32", CPU, 1)}
    assert rows["ragged"].bytes < rows["full: torch SDPA, enable_gqa"].bytes
    assert max(row.speedup for row in rows.values() if row.method.startswith("full")) == 1
    assert all(row.seconds > 0 and row.of_copy > 0 for row in rows.values())
    full, ours = measure_decode(tiny, plan, 2, 512, 8)
    assert full.cache_bytes == plan.bytes.full
    assert ours.cache_bytes == plan.bytes.resident
    assert ours.tokens_per_second == pytest.approx(2 / ours.seconds)
    assert set(measure_prefill(tiny, plan, 1, 64, 1)) == {"full cache", "artifact without its scorer", "artifact"}


@pytest.mark.parametrize(
    ("family", "elements"),
    # Of a token, heads x elements of every layer with keys and values of its own.
    [("gemma4", 3 * 16 + 6 * 8 + 3 * 16), ("gemma4-shared", 3 * 8 + 3 * 16), ("qwen3-next", 3 * 16)],
)
def test_layers_that_are_not_alike(family: str, elements: int) -> None:
    model = tiny_model(CONFIGS[family])
    full, ours = measure_decode(model, make_artifact(model, 40, context=256), 2, 256, 4)
    assert full.cache_bytes == 2 * 2 * 256 * elements * 4
    assert full.seconds > 0
    assert ours.seconds > 0


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    heard: list[str] = []
    found = medians({"a": lambda: heard.append("a"), "b": lambda: heard.append("b")}, CPU, 3)
    assert heard == ["a", "b"] * 4
    assert set(found) == {"a", "b"}


def test_the_command_prints_tables_and_writes_json(tiny, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--random-weights", "tiny", "--context", "256", "--tokens", "8", "--rounds", "1", "--dtype", "float32"]
    result = CliRunner().invoke(command, [*arguments, "--json", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    for words in ("attention of a layer", "transformers, full cache", "artifact without its scorer"):
        assert words in result.output
    found = json.loads(out.read_text())
    assert set(found) == {"setting", "kernels", "decode", "prefill"}
    assert found["setting"]["context"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either an ARTIFACT.kvb or --random-weights"),
        (["x.kvb", "--random-weights", "qwen2.5-7b"], "either an ARTIFACT.kvb or --random-weights"),
        (["--random-weights", "qwen2.5-7b", "--parts", "speed"], "there is no part 'speed'"),
        (["--random-weights", "qwen2.5-7b", "--mem", "8GB"], "expected a share of the full cache"),
        (["--random-weights", "qwen9"], "there is no shape 'qwen9'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(command, arguments)
    error = result.exception if isinstance(result.exception, KvcompileError) else result.output
    assert message in " ".join(str(error).replace("\n", " ").split())
