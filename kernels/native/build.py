"""C sources, made into libraries with the machine's own compiler when they are first needed.

A library is kept in the cache folder under a name made of its sources, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

THREADS = (("-fopenmp",), ())
"""Options for several threads, and where the compiler has none for one."""

_LOCKS: dict[Path, threading.Lock] = {}
"""One for each library, held while it is made."""


@dataclass(frozen=True)
class Source:
    """A C file with the `headers` that it includes; `what` it does goes through torch where it cannot be compiled."""

    file: Path
    headers: tuple[Path, ...]
    flags: tuple[str, ...]
    what: str

    @classmethod
    def named(cls, name: str, headers: Sequence[str], flags: Sequence[str], what: str) -> Source:
        """A file of this folder, and headers, by their names alone."""
        here = Path(__file__).parent
        return cls(here / f"{name}.c", tuple(here / f"{one}.h" for one in headers), tuple(flags), what)


def library(source: Source) -> ctypes.CDLL | None:
    """The compiled source, or None where it cannot be made, which is said once."""
    found = compiler()
    if found is None:
        return None
    for threads in THREADS:
        try:
            return ctypes.CDLL(str(_made(source, found, threads)), mode=os.RTLD_NOW)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error
    warnings.warn(f"{source.what} goes through torch, as its C source cannot be compiled ({reason})", stacklevel=2)
    return None


@contextmanager
def ahead(sources: Sequence[Source]) -> Iterator[None]:
    """Within, the sources are compiled one after the other, beside what the block does: a compiler takes a second or
    two for each. Who asks for the `library` of one that is begun waits for it. In the end, those not begun are left."""
    found, nice, stopped = compiler(), shutil.which("nice"), threading.Event()
    # Threads of the block that share work in equal parts would wait for the one beside the compiler.
    before = () if nice is None else (nice, "-n", "10")

    def compile_all() -> None:
        for source in sources:
            if found is not None and not stopped.is_set():
                with suppress(OSError, subprocess.CalledProcessError):  # said by who asks for it
                    _made(source, found, THREADS[0], before)

    thread = threading.Thread(target=compile_all)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _made(source: Source, found: str, threads: tuple[str, ...], before: tuple[str, ...] = ()) -> Path:
    """The file of the library, which is made where it is not there yet, with `before` in front of the commands."""
    # The folder of `kvcompile.models.cache_dir`, which kernels do not import.
    root = Path(os.environ.get("KVCOMPILE_CACHE") or "~/.cache/kvcompile").expanduser().absolute()
    texts = [file.read_bytes() for file in (source.file, *source.headers)]
    key = repr((texts, *source.flags, [*threads], found, os.stat(found).st_mtime_ns, processor()))
    file = root / "native" / f"{source.file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    with _LOCKS.setdefault(file, threading.Lock()):
        if not file.is_file():
            _compile([*before, found], [*source.flags, *threads], source.file, file)
    return file


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def processor() -> str:
    """What the compiler's `native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _compile(command: Sequence[str], flags: Sequence[str], source: Path, file: Path) -> None:
    """Make the library. OpenMP is not linked: its symbols are found in the runtime that torch has loaded, so that there
    is one pool of threads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        compiled, linked = Path(folder) / "made.o", Path(folder) / "made.so"
        for step in (
            [*command, *flags, "-c", "-o", compiled, source],
            [*command, "-shared", "-o", linked, compiled, "-lm"],
        ):
            subprocess.run(step, check=True, capture_output=True)
        linked.replace(file)
