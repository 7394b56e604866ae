"""Targets of serving engines: memory for all sequences that run at once, each with one page for its whole cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal

from kvcompile.artifacts import DTYPE_BITS, ModelIdentity, TargetError
from kvcompile.problem.memory import Memory, parse_memory
from kvcompile.problem.options import Options

ALIGN, PAGE_ALIGN = 16, 128
"""Bytes of which the place of a buffer in a page, and the size of a page, are multiples: those of
`kvcompile.runtime.pages`, which cannot be asked without loading torch."""

RESERVED_PAGES = 1
"""Pages that an engine keeps for itself: vLLM's block 0 stands for no block."""


def check_sequences(options: Options, memories: Iterable[str]) -> None:
    """Refuse what does not go with a number of sequences; nothing where none is given.

    Raises:
        TargetError: a batch beside it, a number below 1, or memory that is a share.
    """
    if options.sequences is None:
        return
    if options.batch is not None:
        raise TargetError("--sequences and --batch both say how many sequences there are: give one of them")
    if options.sequences < 1:
        raise TargetError(f"{options.sequences} sequences at once were asked for: expected at least 1")
    for memory in memories:
        if parse_memory(memory).is_share:
            raise TargetError(
                f"a share such as {memory} says nothing of the memory that an engine divides among --sequences: "
                "expected bytes such as 8GB"
            )


def page_target(memory: Memory, sequences: int, model: ModelIdentity, dtype: str, ranks: int = 1) -> Memory:
    """The most resident bytes of one sequence with which `sequences` of them run at once in `memory` bytes: as many
    pages of one size, and those that the engine keeps, have to fit. Zero where not even empty pages do.

    `dtype` is the cache's; `ranks` tensor-parallel ranks have the memory together, and each has a page of its own for a
    sequence's heads. They are counted as alike: where the fullest one has more than its part (`total_imbalance` of the
    placement), pages are larger by that factor.
    """
    page = memory.bytes(full=0) // (sequences + RESERVED_PAGES)
    resident = max(0, page - ranks * page_overhead(model.num_layers, model.head_dim, dtype))
    return Memory(f"{memory.text} for {sequences} sequences at once", Decimal(resident), is_share=False)


def page_overhead(num_layers: int, head_dim: int, dtype: str) -> int:
    """Bytes that a page has at most beyond the resident bytes of its sequence.

    Every buffer may be followed by up to `ALIGN - 1` bytes. A layer has four of keys and four of values (exact rows,
    codes, scales and anchors), and one of scores for both. The page is rounded up once, to a multiple of `PAGE_ALIGN`
    and of an exact row.
    """
    gaps = num_layers * (2 * 4 + 1) * (ALIGN - 1)
    return gaps + math.lcm(PAGE_ALIGN, head_dim * DTYPE_BITS[dtype] // 8) - 1
