"""Rows on decoding end to end: ours, transformers' static cache, and a step with the best full-cache attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from attention_rows import best_full
from profile_step import kernel_times
from sheet import Found, Sheet
from sizes import BATCH, CONTEXT, DTYPE, SHARE, Model, Sizes

from kvcompile.artifacts import identify
from kvcompile.bench.decode import OURS, DecodeRow, ragged_step, steps_of, time_steps
from kvcompile.bench.full_attention import COMPILED, PLAIN, ways
from kvcompile.bench.full_step import full_step
from kvcompile.bench.subjects import ragged_plan

LEAST_OF_COPY, LEAST_OF_STATIC, LEAST_OF_BEST = 0.75, 1.8, 1.5
CELLS = [(1, 8192), (1, 32768), (64, 8192), (4, 32768), (1, 131072), (4, 131072), (4, 8192), (16, 8192), (64, 32768),
         (16, 131072), (64, 131072)]  # fmt: skip
"""Batches and contexts beside the judged one, the first first."""


def bars(sheet: Sheet, sizes: Sizes, model: Model) -> None:
    """Qwen2.5-7B's shape, 16 sequences of 32K tokens at 25 %. Each method is measured alone, beside a copy of its own,
    as a smaller GPU does not hold all their caches."""
    sheet.measure("model with random weights", lambda: _made(model), seconds=20, memory=model.bytes)
    ours = _ours(sheet, sizes, model, "16", BATCH, CONTEXT)
    check, asked = "weights and cache, of copy bandwidth", f"{LEAST_OF_COPY:.0%}"
    if ours:
        sheet.judge(check, f"{ours['of_copy']:.1%}", asked, ours["of_copy"] >= LEAST_OF_COPY)
        waits = ours["host_syncs"]
        sheet.judge("host waits inside a step", f"{waits}", "0", not waits)
    else:
        sheet.missing(check, asked, "our decoding was not measured")
    best = best_full(sheet) or PLAIN
    static = _full(sheet, sizes, model, None, BATCH, CONTEXT)
    fastest = _full(sheet, sizes, model, best, BATCH, CONTEXT)
    if best != PLAIN and not fastest:
        best, fastest = PLAIN, _full(sheet, sizes, model, PLAIN, BATCH, CONTEXT)
    pairs = [("transformers' static cache", static, LEAST_OF_STATIC),
             (f"the best full-cache step ({best})", fastest, LEAST_OF_BEST)]  # fmt: skip
    for name, other, least in pairs:
        check, asked = f"tokens a second, times {name}", f"{least}"
        if ours and other:
            ratio = ours["tokens_per_second"] / other["tokens_per_second"]
            sheet.judge(check, f"{ratio:.2f}", asked, ratio >= least)
        else:
            sheet.missing(check, asked, "one of the two was not measured")
    _ours(sheet, sizes, model, "4", BATCH, CONTEXT)
    _ours(sheet, sizes, model, "mixed", BATCH, CONTEXT)
    _where_time_goes(sheet, sizes, model)


def matrix(sheet: Sheet, sizes: Sizes, model: Model) -> None:
    """Other batches and contexts: 16 and 4 bits, and both full caches."""
    best = best_full(sheet)
    best = PLAIN if best is None or best == COMPILED else best  # which would be compiled anew for every shape
    for number, cell in enumerate(CELLS):
        if number >= sizes.cells:
            sheet.note(f"decode, {cell[0]} x {cell[1]}", "left out of a dry run")
            continue
        for bits in ("16", "4"):
            _ours(sheet, sizes, model, bits, *cell)
        for way in (None, best):
            _full(sheet, sizes, model, way, *cell)


def _ours(sheet: Sheet, sizes: Sizes, model: Model, bits: str, batch: int, context: int) -> Any:
    def work() -> Found:
        subject = _subject(model)
        plan = _plan(subject, sizes, bits, batch, context)
        real = sizes.batch(batch)
        with ragged_step(subject, plan, real, sizes.context(context)) as step:
            return _found(*time_steps(subject, {OURS: step}, real, sizes.tokens))

    check = f"decode, {batch} x {context}, kvcompile, {bits} bits"
    memory = model.bytes + int(sizes.full_bytes(batch, context) * SHARE * 1.05) + (6 << 30)
    return sheet.measure(check, work, asked="recorded" if not sizes.dry else "", seconds=20, memory=memory)


def _full(sheet: Sheet, sizes: Sizes, model: Model, way: str | None, batch: int, context: int) -> Any:
    def work() -> Found:
        subject = _subject(model)
        make = ways(sizes.device)[way] if way is not None else None
        real, steps = sizes.batch(batch), steps_of(sizes.tokens)
        with full_step(subject, real, sizes.context(context), steps, make) as step:
            return _found(*time_steps(subject, {"full": step}, real, sizes.tokens))

    name = "transformers' static cache" if way is None else f"full cache with {way}"
    full = sizes.full_bytes(batch, context)
    repeated = full * sizes.shape.num_attention_heads // sizes.shape.num_kv_heads // sizes.shape.num_layers
    memory = model.bytes + full + (repeated if way is None else 0) + (6 << 30)
    return sheet.measure(f"decode, {batch} x {context}, {name}", work, seconds=20, memory=memory)


def _where_time_goes(sheet: Sheet, sizes: Sizes, model: Model) -> None:
    def work() -> Found:
        subject = _subject(model)
        plan = _plan(subject, sizes, "16", BATCH, CONTEXT)
        with ragged_step(subject, plan, sizes.batch(BATCH), sizes.context(CONTEXT)) as step:
            step.run()
            found = kernel_times(step.run, 3)
        words = ", ".join(f"{one['name'][:40]} {one['us']:.0f} us" for one in found[:6])
        return Found(words, None, {"kernels": found})

    memory = model.bytes + int(sizes.full_bytes(BATCH, CONTEXT) * SHARE) + (4 << 30)
    sheet.measure("where the time of a step goes", work, seconds=20, memory=memory)


def _made(model: Model) -> Found:
    subject = model.get()
    size = sum(p.numel() * p.element_size() for p in subject.parameters())
    return Found(f"{size / 1e9:.1f} GB")


def _subject(model: Model) -> Any:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model.get()


def _plan(subject: Any, sizes: Sizes, bits: str, batch: int, context: int) -> Any:
    identity = identify(subject, sizes.model)
    return ragged_plan(identity, sizes.context(context), sizes.batch(batch), SHARE, DTYPE, bits)


def _found(row: DecodeRow) -> Found:
    words = (
        f"{row.seconds * 1e3:.2f} ms a step, {row.tokens_per_second:.0f} tokens/s, {row.of_copy:.1%} of copy bandwidth"
        f", cache {row.cache_bytes / 1e9:.2f} GB, peak {row.peak_bytes / 1e9:.1f} GB"
    )
    return Found(words, row.recorded if row.method == OURS else None, dataclasses.asdict(row))
