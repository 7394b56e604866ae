"""The decode step in C: the shapes that it has code of its own for, and where it stands back.

What it computes is held against the references by `test_ragged_decode` and `test_append_compact`, through the same
calls as everything else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, native, ragged_decode
from kvcompile.kernels.native import build
from kvcompile.kernels.ragged_decode import reference

LAYOUT = LayerLayout.from_heads(
    [
        HeadSpec("recent", 700, 4, 696), HeadSpec("scored", 33, 4, 8, 8, 4), HeadSpec("scored", 300, 4, 8, 4, 8),
        HeadSpec("scored", 301, 4, 8, 67, 3), HeadSpec("scored", 71, 0, 8, 66, 2), HeadSpec("scored", 90, 1, 8, 65, 66),
        HeadSpec("full", 259, 4, 8, 3, 67), HeadSpec("full", 9, 4, 5, 2, 65),
    ]
)  # fmt: skip
NO_COMPILER = not any(shutil.which(name) for name in ("cc", "gcc", "clang"))
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="there is no C compiler")


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing compiled yet."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path))
    monkeypatch.delenv("KVCOMPILE_KERNELS", raising=False)
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def full_store(bits: str, batch: int, head_dim: int, dtype: torch.dtype) -> Buffers:
    store = Buffers(LAYOUT, [getattr(c, bits) for c in LAYOUT.classes], head_dim, dtype, torch.device("cpu"), batch)
    generator = torch.Generator().manual_seed(len(bits) + head_dim)
    for cls in LAYOUT.classes:
        slot = torch.arange(cls.capacity).expand(batch, cls.count, -1)
        new = torch.randn(batch, cls.count, cls.capacity, head_dim, generator=generator).to(dtype)
        store.write(cls, new, slot, slot[:, :, :0], slot[:, :, :0])
        store.write_anchor(cls, new, slot)
    return store


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 5, 7])
def test_head_sizes(group: int, head_dim: int, dtype: torch.dtype) -> None:
    """Long enough for the threads to share a head; sharp enough that most weights are 0."""
    generator = torch.Generator().manual_seed(group)
    query = (3 * torch.randn(2, LAYOUT.num_kv_heads * group, 1, head_dim, generator=generator)).to(dtype)
    assert native.usable(query, head_dim, LAYOUT)
    args = (query, full_store("k_bits", 2, head_dim, dtype), full_store("v_bits", 2, head_dim, dtype), LAYOUT)
    out = ragged_decode(*args, [2000, 290], scaling=head_dim**-0.5)
    expected = reference.ragged_decode(*args, [2000, 290], scaling=head_dim**-0.5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_it_leaves_to_torch_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCOMPILE_KERNELS", raising=False)
    assert not native.usable(torch.zeros(1, dtype=torch.float64), 64, LAYOUT)
    assert not native.usable(torch.zeros(1), native.MOST_DIM + 1, LAYOUT)
    assert not native.usable(torch.zeros(1, device="meta"), 64, LAYOUT)
    monkeypatch.setenv("KVCOMPILE_KERNELS", "torch")
    assert not native.usable(torch.zeros(1), 64, LAYOUT)


def test_without_a_compiler_everything_goes_through_torch(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not native.usable(torch.zeros(1), 64, LAYOUT)
    assert not list(afresh.iterdir())


@needs_compiler
def test_a_source_that_does_not_compile_is_said_once(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = afresh / "broken.c"
    broken.write_text("no C", encoding="utf-8")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.warns(UserWarning, match="goes through torch"):
        assert not native.usable(torch.zeros(1), 64, LAYOUT)
    assert not native.usable(torch.zeros(1), 64, LAYOUT)
    assert not list((afresh / "native").iterdir())


@needs_compiler
def test_it_is_compiled_once(afresh: Path) -> None:
    assert native.usable(torch.zeros(1), 64, LAYOUT)
    (made,) = (afresh / "native").iterdir()
    before = made.stat()
    native._library.cache_clear()
    assert native.usable(torch.zeros(1), 64, LAYOUT)
    assert made.stat().st_ino == before.st_ino


@needs_compiler
def test_it_has_no_memory_errors(tmp_path: Path) -> None:
    """The address sanitizer over the tests of all operations' shapes."""
    compiler = build.compiler()
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_file():
        pytest.skip("the compiler has no address sanitizer")
    code = (
        "import kvcompile.kernels.native as n, kvcompile.kernels.native.prompt as p;"
        "n.FLAGS += ('-fsanitize=address',); p.FLAGS += ('-fsanitize=address',);"
        "import pytest, sys; sys.exit(pytest.main(['-qx', '-p', 'no:cacheprovider', '-W', 'error', *sys.argv[1:]]))"
    )
    here = Path(__file__).parent
    tests = [
        f"{here / 'test_ragged_decode.py'}::test_one_token",
        f"{here / 'test_append_compact.py'}::test_append",
        f"{here / 'test_prompt_attention.py'}::test_the_reference_is_met",
    ]
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "KVCOMPILE_CACHE": str(tmp_path),
    }  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", code, *tests], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
