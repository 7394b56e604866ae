"""Rows on attention of one layer: the bars first, then every batch, context, width and size of group."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sheet import Found, Sheet
from sizes import BATCH, BATCHES, CONTEXT, CONTEXTS, DTYPE, SHARE, Sizes

from kvcompile.artifacts import ModelIdentity
from kvcompile.bench.flashinfer import WORKSPACE
from kvcompile.bench.full_attention import COMPILED, ways
from kvcompile.bench.kernels import OURS, RAGGED_FLASHINFER, SAME_TOKENS, KernelRow, measure_groups, measure_kernels
from kvcompile.bench.timing import MOST_STORES, stores_for

GROUPS = (7, 8, 5, 4)
WHOLE = f"attention, group 7, {BATCH} x {CONTEXT}"
FLEX = f"{WHOLE}, compiled"
EVERY = (*OURS, RAGGED_FLASHINFER)
LEAST_OF_COPY = {"ragged": 0.9, "ragged int4": 0.7, SAME_TOKENS: 0.7}
MOST_OF_UNIFORM, MOST_OF_GROUP_8 = 1.1, 1.05


def bars(sheet: Sheet, sizes: Sizes) -> None:
    """Qwen2.5-7B's shape, 16 sequences of 32K tokens at 25 %, really ragged."""
    memory, plain = _memory(sizes, BATCH, CONTEXT), _not_compiled(sizes)
    found = sheet.measure(WHOLE, lambda: _cell(sizes, 7, BATCH, CONTEXT, plain), seconds=60, memory=memory)
    methods = (found or {}).get("methods", {})
    for name, least in LEAST_OF_COPY.items():
        check, asked = f"{name}, of copy bandwidth", f"{least:.0%}"
        if one := _measured(methods, name):
            sheet.judge(check, f"{one['of_copy']:.1%}", asked, one["of_copy"] >= least)
        else:
            sheet.missing(check, asked, _why(methods, name))
    check, asked = "ragged, time a byte of uniform", f"{MOST_OF_UNIFORM}"
    ragged, uniform = _measured(methods, "ragged"), _measured(methods, "uniform")
    if ragged and uniform:
        ratio = (ragged["seconds"] / ragged["bytes"]) / (uniform["seconds"] / uniform["bytes"])
        sheet.judge(check, f"{ratio:.3f}", asked, ratio <= MOST_OF_UNIFORM)
    else:
        sheet.missing(check, asked, _why(methods, "ragged"))
    for bits in ("16", "4"):
        _groups(sheet, sizes, bits)
    if COMPILED in ways(sizes.device):
        sheet.measure(FLEX, lambda: _cell(sizes, 7, BATCH, CONTEXT, [COMPILED], ()), seconds=40, memory=memory)
    if ragged:
        sheet.note(f"ragged, times the best full ({best_full(sheet)})", f"{ragged['speedup']:.2f}")


def best_full(sheet: Sheet) -> str | None:
    """The fastest attention over the full cache in the bars, by its name in `ways`; None where none was measured."""
    rows = [sheet.rows[check] for check in (WHOLE, FLEX) if check in sheet.rows]
    methods = {name: one for row in rows for name, one in row.detail.get("methods", {}).items()}
    full = {
        name: one["seconds"] for name in methods if name.startswith("full") and (one := _measured(methods, name))
    }  # fmt: skip
    return min(full, key=full.__getitem__).removeprefix("full: ") if full else None


def matrix(sheet: Sheet, sizes: Sizes, groups: Iterable[int]) -> None:
    """Every batch and context with these sizes of group, all widths in one row; of full caches those that need no
    compiling, which every shape would need anew."""
    full = _not_compiled(sizes)
    cells = [(g, b, c) for g in groups for c in CONTEXTS for b in BATCHES if (g, b, c) != (7, BATCH, CONTEXT)]
    for number, (group, batch, context) in enumerate(cells):
        check = f"attention, group {group}, {batch} x {context}"
        if number >= sizes.cells:
            sheet.note(check, "left out of a dry run")
            continue
        memory = _memory(sizes, batch, context)
        sheet.measure(check, lambda cell=cells[number]: _cell(sizes, *cell, full), seconds=6, memory=memory)


def _not_compiled(sizes: Sizes) -> list[str]:
    return [name for name in ways(sizes.device) if name != COMPILED]


def _cell(
    sizes: Sizes, group: int, batch: int, context: int, full: Collection[str], ours: Collection[str] = EVERY
) -> Found:
    rows = measure_kernels(
        _shape(sizes, group), sizes.context(context), sizes.batch(batch), SHARE, DTYPE, sizes.device, sizes.rounds,
        full, ours,
    )  # fmt: skip
    return Found("; ".join(_words(row) for row in rows), None, {"methods": {r.method: _numbers(r) for r in rows}})


def _groups(sheet: Sheet, sizes: Sizes, bits: str) -> None:
    """Groups of 5 and 7 beside groups of 8 over the same stores: judged in 16 bits, said in 4."""

    def work() -> Found:
        shapes = [_shape(sizes, group) for group in (8, 7, 5)]
        batch, context = sizes.batch(BATCH), sizes.context(CONTEXT)
        found = measure_groups(shapes, context, batch, SHARE, DTYPE, bits, sizes.device, sizes.rounds)
        words = ", ".join(f"group {group}: {taken * 1e6:.1f} us" for group, taken in found.items())
        return Found(words, None, {str(group): taken for group, taken in found.items()})

    times = sheet.measure(f"groups, {bits} bits", work, seconds=15, memory=4 << 30)
    for group in ("5", "7"):
        check, asked = f"group {group}, {bits} bits, time of group 8", f"{MOST_OF_GROUP_8}" if bits == "16" else ""
        if times:
            ratio = times[group] / times["8"]
            if asked:
                sheet.judge(check, f"{ratio:.3f}", asked, ratio <= MOST_OF_GROUP_8)
            else:
                sheet.note(check, f"{ratio:.3f}")
        elif asked:
            sheet.missing(check, asked, "the groups were not measured")


def _shape(sizes: Sizes, group: int) -> ModelIdentity:
    one = sizes.shape
    return dataclasses.replace(one, num_attention_heads=group * one.num_kv_heads)


def _memory(sizes: Sizes, batch: int, context: int) -> int:
    """Bytes of a cell, about: the full cache, six of ours, and the copy."""
    if sizes.dry:
        return 0
    full = sizes.full_bytes(batch, context, layers=1)
    ours = int(full * SHARE)
    stores = full * stores_for(full, sizes.device) + 6 * ours * min(MOST_STORES, stores_for(ours, sizes.device))
    return stores + (5 << 30) + 2 * WORKSPACE


def _numbers(row: KernelRow) -> dict[str, Any]:
    numbers = {name: value for name, value in dataclasses.asdict(row).items() if name != "method"}
    return {name: None if value != value else value for name, value in numbers.items()}  # JSON knows no NaN


def _words(row: KernelRow) -> str:
    if row.error:
        return f"{row.method}: {row.error}"
    return f"{row.method} {row.seconds * 1e6:.1f} us {row.of_copy:.0%}"


def _measured(methods: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    one = methods.get(name)
    return one if one and not one["error"] else None


def _why(methods: Mapping[str, Any], name: str) -> str:
    return methods[name]["error"] if name in methods and methods[name]["error"] else "the cell was not measured"
