"""Which implementation a layer gets: by the codecs of its heads, and what is loaded for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvcompile.kernels import HeadSpec, LayerLayout, native
from kvcompile.kernels.dispatch import knows, takes_kernels

KNOWN = LayerLayout.from_heads([HeadSpec("recent", 9, 4, 5, 8, 4), HeadSpec("recent", 5, 4, 1)])
MIXED = LayerLayout.from_heads([HeadSpec("recent", 9, 4, 5, 8, 4), HeadSpec("recent", 5, 4, 1, 16, 136)])
FEW_BITS = LayerLayout.from_heads([HeadSpec("recent", 9, 4, 5, k, v) for k, v in ((67, 3), (66, 2), (65, 2))])


def test_a_layer_with_a_codec_that_kernels_do_not_know_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for implementation in ("triton", "native", "onnx"):
        assert knows(implementation, KNOWN)
        assert not knows(implementation, MIXED)
    for implementation in ("dense", "triton", "native"):
        assert knows(implementation, FEW_BITS)
    assert knows("dense", MIXED)
    monkeypatch.delenv("KVCOMPILE_KERNELS", raising=False)
    assert not native.usable(torch.zeros(1), 64, MIXED)
    pytest.importorskip("triton")
    monkeypatch.setenv("KVCOMPILE_KERNELS", "triton")
    assert takes_kernels(torch.zeros(1), KNOWN)
    assert not takes_kernels(torch.zeros(1), MIXED)


def answer(code: str) -> str:
    """What a fresh process prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_list_of_codecs_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, kvcompile.kernels.codecs; print(*sorted({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    assert answer(code) == ""


def test_a_name_is_the_operation_even_where_its_folder_was_imported_first() -> None:
    code = (
        "import kvcompile.kernels.append.dense, kvcompile.kernels as k; before = k.append;"
        "from kvcompile.kernels import append, compact; import kvcompile.kernels.compact.dense;"
        "print(callable(before), append is before, callable(compact), callable(k.compact))"
    )
    assert answer(code) == "True True True True"
