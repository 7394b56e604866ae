"""What a user asks for, whatever it is solved from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

KV_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Names of `--kv-dtype` that are cache dtypes; `auto` is the model's. The others are names of codecs
(`kvcompile.kernels.codecs.names`), under which every key and value is quantised."""


@dataclass(frozen=True)
class Options:
    """What a plan is to be like, whatever it is solved from.

    `context` and `batch` default to the model's longest context, or the artifact's, and 1. `sequences` takes the place
    of `batch`: the memory is then that of a serving engine, in which so many sequences are to run at once, and the
    target is what is left of it for one sequence (`kvcompile.problem.pages`). `allocator` is a name from
    `kvcompile.allocators.ALLOCATORS`; `policy` is `recent`, `window` (recent without sinks), `h2o`, `snapkv` or
    `scored`, by default the allocator's own. `kv_dtype` is `auto` (the model's type; the allocator `optimal` may also
    choose codecs that were profiled), `bf16`, `fp16`, `fp32` or the name of a codec. `classes` is the most distinct
    choices in a layer, `ranks` the number of tensor-parallel ranks to place heads on.
    """

    context: int | None = None
    batch: int | None = None
    allocator: str = "optimal"
    policy: str | None = None
    kv_dtype: str = "auto"
    classes: int | None = None
    ranks: int | None = None
    sequences: int | None = None

    def with_defaults(self, context: int, batch: int) -> Options:
        """These options, with a context and a batch where none are given; that of a target for `sequences` is 1."""
        batch = batch if self.sequences is None else 1
        return dataclasses.replace(
            self,
            context=context if self.context is None else self.context,
            batch=batch if self.batch is None else self.batch,
        )
