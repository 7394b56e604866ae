"""Rows on what comes before decoding: `build`, and reading long prompts."""

from __future__ import annotations

import dataclasses

from sheet import Found, Sheet
from sizes import BATCH, CONTEXT, DTYPE, SHARE, Model, Sizes

from kvcompile.artifacts import identify
from kvcompile.bench.building import measure_build
from kvcompile.bench.prefill import chunks_are_offered, measure_chunked
from kvcompile.bench.subjects import ragged_plan
from kvcompile.effort import PROFILE_TOKENS

AIM, MOST = 120.0, 150.0
"""Seconds that a build should take, and after which it is given up."""
CHUNK = 2048


def building(sheet: Sheet, sizes: Sizes, model: Model) -> None:
    """`build` for a 7B shape, from the loaded model to the file."""

    def work() -> Found:
        limit = 1.0 if sizes.dry else min(MOST, sheet.left - 5)
        tokens = 256 if sizes.dry else PROFILE_TOKENS
        row = measure_build(model.get(), context=sizes.context(CONTEXT), profile_tokens=tokens, limit=limit)
        words = (
            f"{row.seconds:.0f} s, peak {row.peak_bytes / 1e9:.1f} GB with {row.model_bytes / 1e9:.1f} GB of weights"
        )
        words += f", given up: {row.stopped}" if row.stopped else ""
        return Found(words, not row.stopped and row.seconds <= AIM, dataclasses.asdict(row))

    memory = model.bytes + ((16 << 30) if not sizes.dry else 0)
    sheet.measure("build, 7B", work, asked=f"{AIM:.0f} s", seconds=0.4 * MOST if not sizes.dry else 2, memory=memory)


def reading(sheet: Sheet, sizes: Sizes, model: Model) -> None:
    """The prompts of the judged rows, in chunks."""
    check = f"prefill, {BATCH} x {CONTEXT} in chunks of {CHUNK}"
    if not chunks_are_offered():
        sheet.note(check, "left out: this runtime reads a prompt in one pass")
        return

    def work() -> Found:
        subject, batch, context = model.get(), sizes.batch(BATCH), sizes.context(CONTEXT)
        plan = ragged_plan(identify(subject, sizes.model), context, batch, SHARE, DTYPE, "16")
        row = measure_chunked(subject, plan, batch, context, 64 if sizes.dry else CHUNK)
        rate = batch * context / row.seconds
        words = f"{row.seconds:.1f} s, {rate:.0f} tokens/s, peak {row.peak_bytes / 1e9:.1f} GB with "
        words += f"{row.model_bytes / 1e9:.1f} GB of weights and {row.cache_bytes / 1e9:.1f} GB of cache"
        return Found(words, None, dataclasses.asdict(row))

    memory = model.bytes + sizes.full_bytes(BATCH, CONTEXT) if not sizes.dry else 0
    sheet.measure(check, work, seconds=40 if not sizes.dry else 1, memory=memory)
