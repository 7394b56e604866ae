"""The decode step in C: the shapes that it has code of its own for, and where it stands back.

What it computes is held against the references by `test_ragged_decode` and `test_append_compact`, through the same
calls as everything else.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stored import assert_reads_alike

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, Transform, append, compact, native, ragged_decode
from kvcompile.kernels.native import build, library, measuring
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
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


def full_store(bits: str, batch: int, head_dim: int, dtype: torch.dtype) -> Buffers:
    store = Buffers(LAYOUT, [getattr(c, bits) for c in LAYOUT.classes], head_dim, dtype, torch.device("cpu"), batch)
    generator = torch.Generator().manual_seed(len(bits) + head_dim)
    for cls in LAYOUT.classes:
        slot = torch.arange(cls.capacity).expand(batch, cls.count, -1)
        new = torch.randn(batch, cls.count, cls.capacity, head_dim, generator=generator).to(dtype)
        store.write(cls, new, slot, slot[:, :, :0], slot[:, :, :0])
        store.write_anchor(cls, new, slot)
    return store


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux says which threads there are")
def test_one_sequence_is_read_by_threads_that_stay(two_threads: None) -> None:
    """Threads that are started anew for every head cost a hundred times what they read meanwhile."""
    layout = LayerLayout.from_heads([HeadSpec("full", 20_000, 4, 19_996, 4, 4)])
    sides = [Buffers(layout, [4], 64, torch.float32, torch.device("cpu"), 1) for _ in range(2)]
    query = torch.randn(1, 7, 1, 64, generator=torch.Generator().manual_seed(0))
    assert native.usable(query, 64, layout)

    def decode() -> None:
        ragged_decode(query, *sides, layout, [20_000], scaling=1.0)

    seen, done = set[str](), threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.update(os.listdir("/proc/self/task"))

    watcher = threading.Thread(target=watch)
    decode()
    watcher.start()
    before = set(os.listdir("/proc/self/task"))
    try:
        for _ in range(50):
            decode()
    finally:
        done.set()
        watcher.join()
    assert seen <= before


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2])
def test_threads_share_heads_or_take_one_each(two_threads: None, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    query = 3 * torch.randn(batch, LAYOUT.num_kv_heads * 7, 1, 64, generator=generator)
    sides = full_store("k_bits", batch, 64, torch.float32), full_store("v_bits", batch, 64, torch.float32)
    seen = [2000, 290][:batch]
    out = ragged_decode(query, *sides, LAYOUT, seen, scaling=0.125)
    expected = reference.ragged_decode(query, *sides, LAYOUT, seen, scaling=0.125)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


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


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the compiler's options are those of x86")
@pytest.mark.parametrize("option", ["-mno-avx512vnni", "-mno-avx2"])
def test_processors_with_fewer_instructions(afresh: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, option))
    for head_dim in (64, 80, 128):
        test_head_sizes(5, head_dim, torch.float32)
        test_head_sizes(5, head_dim, torch.bfloat16)


def a_transform(head_dim: int, generator: torch.Generator) -> Transform:
    """Rotations and means for heads with codes; heads in the cache dtype stay as they are."""
    heads = LAYOUT.num_kv_heads
    matrices = torch.linalg.qr(torch.randn(2, heads, head_dim, head_dim, generator=generator))[0].contiguous()
    means = torch.randn(2, heads, head_dim, generator=generator)
    for h, row in enumerate(LAYOUT.rows):
        for side, codec in enumerate((row.k_codec, row.v_codec)):
            if codec == 0:
                matrices[side, h], means[side, h] = torch.eye(head_dim), 0
    (key, value), (key_mean, value_mean) = matrices, means
    return Transform(key, key.mT.contiguous(), key_mean, value, value.mT.contiguous(), value_mean)


def assert_stored_alike(one: Buffers, other: Buffers) -> None:
    for cls in LAYOUT.classes:
        assert_reads_alike(one, other, cls)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cut_is_that_of_torch(batch: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, columns = torch.Generator().manual_seed(batch), 400
    turned = a_transform(head_dim, generator)
    new = torch.randn(2, batch, columns, LAYOUT.num_kv_heads, head_dim, generator=generator).to(dtype).transpose(2, 3)
    tokens = [
        torch.rand(batch, c.count, columns, generator=generator).argsort(2)[:, :, : c.capacity] for c in LAYOUT.classes
    ]
    stores = []
    for kernels in ("", "torch"):
        monkeypatch.setenv("KVCOMPILE_KERNELS", kernels)
        keys, values = full_store("k_bits", batch, head_dim, dtype), full_store("v_bits", batch, head_dim, dtype)
        compact(keys, values, LAYOUT, *new, tokens, [columns] * batch, turned)
        stores.append((keys, values))
    for ours, torchs in zip(*stores, strict=True):
        assert_stored_alike(ours, torchs)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_what_its_parts_do(batch: int, head_dim: int, dtype: torch.dtype) -> None:
    """Heads that are full and that are not, some sequences of a larger store, a transform for heads with codes."""
    group, heads, generator = 3, LAYOUT.num_kv_heads, torch.Generator().manual_seed(batch)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    turned = a_transform(head_dim, generator)
    places = torch.tensor([4, 0, 2][:batch], dtype=torch.int32)
    seen = torch.tensor([2000, 290, 7][:batch], dtype=torch.int32)
    query = random(batch, heads * group, head_dim).to(dtype)
    new = random(2, heads, batch, head_dim).to(dtype).transpose(1, 2)
    score, held = random(batch, heads), random(5, LAYOUT.scored_slots).half()

    def fresh() -> tuple[Buffers, Buffers, torch.Tensor]:
        return full_store("k_bits", 5, head_dim, dtype), full_store("v_bits", 5, head_dim, dtype), held.clone()

    keys, values, scores = fresh()
    assert native.takes_steps(query, LAYOUT)
    out = native.step(query, *new, keys, values, scores, LAYOUT, turned, score, seen, 0.1, places)

    k, v, moved = fresh()
    new_keys, new_values = turned.keys(new[0].unsqueeze(2)).squeeze(2), turned.values(new[1].unsqueeze(2)).squeeze(2)
    append(k, v, moved, LAYOUT, new_keys, new_values, score, seen, places)
    asked = turned.queries(query.float().unsqueeze(2))
    attended = ragged_decode(asked, k, v, LAYOUT, seen + 1, scaling=0.1, places=places)
    expected = turned.outputs(attended).squeeze(2)

    assert torch.equal(scores, moved)
    assert_stored_alike(keys, k)
    assert_stored_alike(values, v)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_steps_of_policies_that_place_tokens_are_left_to_torch() -> None:
    observing = LayerLayout.from_heads([HeadSpec("full", 9, 4, 5), HeadSpec("h2o", 9, 4, 5)])
    assert native.takes_steps(torch.zeros(1, 2, 64), LAYOUT)
    assert not native.takes_steps(torch.zeros(1, 2, 64), observing)
    assert not native.takes_steps(torch.zeros(1, 2, 64, dtype=torch.float64), LAYOUT)


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
    monkeypatch.setattr(library, "SOURCE", replace(library.SOURCE, file=broken))
    with pytest.warns(UserWarning, match="goes through torch"):
        assert not native.usable(torch.zeros(1), 64, LAYOUT)
    assert not native.usable(torch.zeros(1), 64, LAYOUT)
    assert not list((afresh / "native").iterdir())


@needs_compiler
def test_it_is_compiled_once(afresh: Path) -> None:
    assert native.usable(torch.zeros(1), 64, LAYOUT)
    (made,) = (afresh / "native").iterdir()
    before = made.stat()
    library.library.cache_clear()
    assert native.usable(torch.zeros(1), 64, LAYOUT)
    assert made.stat().st_ino == before.st_ino


@needs_compiler
def test_what_a_profile_needs_is_compiled_ahead_once(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made: list[str] = []
    beside: list[bool] = []
    compiling = build._compile

    def counted(command: list[str], flags: list[str], source: Path, file: Path) -> None:
        made.append(source.stem)
        beside.append(threading.current_thread() is not threading.main_thread())
        compiling(command, flags, source, file)

    monkeypatch.setattr(build, "_compile", counted)
    with measuring.compiled_ahead():
        # Asked for meanwhile, from the last one on: who asks waits for what is being made.
        assert all(build.library(source) is not None for source in reversed(measuring.SOURCES))
    assert sorted(made) == sorted(source.file.stem for source in measuring.SOURCES)
    assert any(beside)


@needs_compiler
def test_a_source_that_does_not_compile_ahead_is_left_to_who_asks_for_it(afresh: Path) -> None:
    broken = afresh / "broken.c"
    broken.write_text("no C", encoding="utf-8")
    source = build.Source(broken, (), (), "this")
    with build.ahead([source]):
        pass
    with pytest.warns(UserWarning, match="this goes through torch"):
        assert build.library(source) is None


@needs_compiler
def test_what_is_not_begun_is_left_in_the_end(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, end = threading.Event(), threading.Event()
    made: list[Path] = []

    def compiling(command: list[str], flags: list[str], source: Path, file: Path) -> None:
        made.append(source)
        begun.set()
        assert end.wait(60)

    monkeypatch.setattr(build, "_compile", compiling)
    with build.ahead(measuring.SOURCES):
        assert begun.wait(60)
        threading.Timer(0.2, end.set).start()
    assert made == [measuring.SOURCES[0].file]


@needs_compiler
def test_it_has_no_memory_errors(tmp_path: Path) -> None:
    """The address sanitizer over the tests of all operations' shapes."""
    tests = [
        "test_ragged_decode.py::test_one_token", "test_append_compact.py::test_append",
        "test_prompt_attention.py::test_the_reference_is_met", *MEASURED,
    ]  # fmt: skip
    run_compiled_with("-fsanitize=address -O1", tests, tmp_path, LD_PRELOAD=sanitizer(), ASAN_OPTIONS="detect_leaks=0")


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the compiler's options are those of x86")
@pytest.mark.parametrize("option", ["-mno-avx512bf16", "-mno-avx2"])
def test_measuring_on_processors_with_fewer_instructions(option: str, tmp_path: Path) -> None:
    run_compiled_with(option, MEASURED, tmp_path)


MEASURED = [
    f"test_{name}.py::test_in_c"
    for name in ("attention_effects", "attention_gradient", "attention_peaks", "error_weights")
]
"""Of what profiles measure."""


def sanitizer() -> str:
    compiler = build.compiler()
    assert compiler is not None
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_file():
        pytest.skip("the compiler has no address sanitizer")
    return found.stdout.strip()


def run_compiled_with(option: str, tests: list[str], cache: Path, **environment: str) -> None:
    """Run tests of this folder in a process of its own, with every C source compiled anew; none may be skipped."""
    code = (
        "import pytest, sys;"
        "from kvcompile.kernels.native import lanes, library, prompt;"
        f"[setattr(m, 'FLAGS', (*m.FLAGS, *'{option}'.split())) for m in (lanes, library, prompt)];"
        "sys.exit(pytest.main(['-qx', '-p', 'no:cacheprovider', '-W', 'error', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *(str(Path(__file__).parent / test) for test in tests)]
    variables = os.environ | {"KVCOMPILE_CACHE": str(cache)} | environment
    ran = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout
