"""What ptxas made of a kernel, read from its cubin with the `cuobjdump` that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Usage:
    """`registers` a thread, `stack` and `local` bytes a thread: a register that is spilled shows in one of these."""

    registers: int
    stack: int
    local: int


def usage(cubin: bytes) -> Usage:
    """Resources of the one kernel in a cubin."""
    found = {
        name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", _printed("-res-usage", cubin))
    }
    return Usage(found["REG"], found["STACK"], found["LOCAL"])


def loops(cubin: bytes) -> list[list[str]]:
    """The instructions of every innermost loop of the one kernel in a cubin, in the order of addresses. A loop is what
    lies between a branch backwards and its target."""
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(_printed("-sass", cubin))]
    spans = []
    for address, text in code:
        target = BRANCH.search(text)
        if target is not None and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    return [[text for address, text in code if start <= address <= stop] for start, stop in inner]


def is_product(instruction: str) -> bool:
    """Whether it is one of the tensor cores."""
    return "HMMA" in instruction


def is_short_load(instruction: str) -> bool:
    """Whether it reads less than 32 bits from global memory, which cannot be done asynchronously."""
    return re.search(r"\bLDG\S*\.[US](8|16)\b", instruction) is not None


def is_spill(instruction: str) -> bool:
    """Whether it writes or reads a register that has been put into memory."""
    return re.search(r"\b(STL|LDL)\b", instruction) is not None


def waits(cubin: bytes) -> int:
    """How many instructions of the one kernel in a cubin wait for the launch before it."""
    return sum(text.startswith("ACQBULK") for _, text in INSTRUCTION.findall(_printed("-sass", cubin)))


def fetches(cubin: bytes) -> tuple[int, int]:
    """How many instructions of the one kernel in a cubin bring memory into the second-level cache before it waits for
    the launch before it, and how many after that."""
    code = [text for _, text in INSTRUCTION.findall(_printed("-sass", cubin))]
    places = [i for i, text in enumerate(code) if "UBLKPF" in text]
    wait = next((i for i, text in enumerate(code) if text.startswith("ACQBULK")), 0)
    return sum(i < wait for i in places), sum(i > wait for i in places)


def main_loops(cubin: bytes) -> list[list[str]]:
    """The loops that have products."""
    return [body for body in loops(cubin) if any(map(is_product, body))]


@lru_cache(maxsize=4)  # it takes a second, and a kernel is asked several things
def _printed(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command: Sequence[str | Path] = [TOOL, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
