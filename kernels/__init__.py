"""Attention and cache operations over a ragged store: one folder an operation.

In each, `reference.py` defines what the operation computes, one head at a time; `dense.py` does it in torch; `triton`
does it on a GPU, and `native` some of them in C; `api.py` validates and dispatches. The implementations never import
each other. How one key or value is stored in fewer bits than the cache dtype has is a codec's business: a folder in
`codecs`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompile.kernels.add_norm.api import add_norm
    from kvcompile.kernels.append.api import append
    from kvcompile.kernels.attention_effects.api import attention_effects
    from kvcompile.kernels.attention_effects.values import Asked, Changes, Effects
    from kvcompile.kernels.attention_gradient.api import followable, followed
    from kvcompile.kernels.attention_peaks.api import attention_peaks
    from kvcompile.kernels.buffers import Buffers
    from kvcompile.kernels.codecs.api import decode, encode
    from kvcompile.kernels.compact.api import compact
    from kvcompile.kernels.error_weights.api import error_weights
    from kvcompile.kernels.error_weights.values import Rows
    from kvcompile.kernels.layout import HeadClass, HeadSpec, LayerLayout
    from kvcompile.kernels.new_token.api import new_token
    from kvcompile.kernels.overwrite.api import overwrite
    from kvcompile.kernels.prompt_attention.api import prompt_attention
    from kvcompile.kernels.ragged_decode.api import ragged_decode
    from kvcompile.kernels.read_back.api import read_back
    from kvcompile.kernels.restore.api import restore
    from kvcompile.kernels.silu_mul.api import silu_mul
    from kvcompile.kernels.softmax import Softmax
    from kvcompile.kernels.transform import Transform

__all__ = [
    "Asked", "Buffers", "Changes", "Effects", "HeadClass", "HeadSpec", "LayerLayout", "Rows", "Softmax", "Transform",
    "add_norm", "append", "attention_effects", "attention_peaks", "compact", "decode", "encode", "error_weights",
    "followable", "followed", "new_token", "overwrite", "prompt_attention", "ragged_decode", "read_back", "restore",
    "silu_mul",
]  # fmt: skip

_MODULES = {
    "Asked": "attention_effects.values",
    "Buffers": "buffers",
    "Changes": "attention_effects.values",
    "Effects": "attention_effects.values",
    "HeadClass": "layout",
    "HeadSpec": "layout",
    "LayerLayout": "layout",
    "Rows": "error_weights.values",
    "Softmax": "softmax",
    "Transform": "transform",
    "add_norm": "add_norm.api",
    "append": "append.api",
    "attention_effects": "attention_effects.api",
    "attention_peaks": "attention_peaks.api",
    "compact": "compact.api",
    "decode": "codecs.api",
    "encode": "codecs.api",
    "error_weights": "error_weights.api",
    "followable": "attention_gradient.api",
    "followed": "attention_gradient.api",
    "new_token": "new_token.api",
    "overwrite": "overwrite.api",
    "prompt_attention": "prompt_attention.api",
    "ragged_decode": "ragged_decode.api",
    "read_back": "read_back.api",
    "restore": "restore.api",
    "silu_mul": "silu_mul.api",
}
"""Where each name is: loaded when it is asked for, as readers of the format need `codecs` alone and no torch."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


class _Kernels(ModuleType):
    """An operation and its folder have one name, and the import of a folder sets it here: what is meant is always the
    operation."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels
