"""What the compiler makes of the GPU kernels, ahead of time: no GPU is needed, and none is used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """In a process of its own, as the interpreter and the compiler exclude each other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kvcompile.kernels.ahead", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


SOME = ("16/16 8/4 4/4", "mix2/2")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def kernels(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """All of heads of 128 elements on Hopper, and of 64 and for sm_80 those of some pairs of codecs;
    `python -m kvcompile.kernels.ahead` has the rest."""
    if request.param == "sm_80":
        return compiled("sm_80", "128", *SOME)
    return compiled("sm_90", "128") + compiled("sm_90", "64", *SOME)


def test_no_kernel_spills_and_shared_memory_is_enough(kernels: list[dict[str, Any]]) -> None:
    names = {"decode", "append", "compact", "new_token", "restore"}
    assert {one["kernel"] for one in kernels} - {"add_norm", "silu_mul"} == names
    assert [one for one in kernels if one["local"] or one["shared"] > LIMIT[one["arch"]]] == []
    assert [one for one in kernels if one["spills"]] == []
    # Some layers with quantised heads keep a few numbers on the stack, outside of their loops.
    assert [one for one in kernels if one["stack"] > ("16/16," not in one["shape"]) * 16] == []


def test_quantised_heads_take_few_instructions(kernels: list[dict[str, Any]]) -> None:
    """A warp's share of 64 slots, if there are four. An H200's processor issues at most 4 a cycle. Codes of 3 bits are
    put together from two parts, and units of few codes leave a part of a product empty."""
    counts = {one["shape"]: one["instructions"] for one in kernels if one["kernel"] == "decode"}
    judged = {shape: count for shape, count in counts.items() if "bfloat16" in shape}
    assert len(judged) >= (13 if kernels[0]["arch"] == "sm_90" else len(SOME))
    few = re.compile(r"mix|/[23]\b")
    most = {shape: 500 if few.search(shape) else 320 for shape in judged}
    assert [shape for shape, count in judged.items() if not 0 < count <= most[shape]] == []


def test_nothing_is_loaded_synchronously_in_the_loop(kernels: list[dict[str, Any]]) -> None:
    """Where a vector has several scales; a single one has 16 bits, and asynchronous loads have 32 or more."""
    several = [one for one in kernels if one["kernel"] == "decode" and not one["shape"].startswith("64")]
    assert several
    assert [one for one in several if one["short_loads"]] == []


def test_whoever_overlaps_waits_once(kernels: list[dict[str, Any]]) -> None:
    """A launch that begins before the one before it ends must wait for what that one writes, in all of its programs."""
    overlapping = {"decode", "new_token", "restore", "add_norm", "silu_mul"}
    waits = {(one["kernel"], one["arch"]): one["waits"] for one in kernels}
    assert waits == {(k, arch): int(arch == "sm_90" and k in overlapping) for k, arch in waits}


def test_whoever_fetches_early_does_so_before_it_waits(kernels: list[dict[str, Any]]) -> None:
    """Keys and values of every pair of codecs: vectors, or codes and scales."""
    for one in kernels:
        before, after = one["fetches"]
        assert after == 0
        assert (before >= 2) == (one["kernel"] == "decode" and one["arch"] == "sm_90"), one
