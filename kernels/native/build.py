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
import warnings
from collections.abc import Sequence
from pathlib import Path


def library(source: Path, flags: Sequence[str], what: str, *included: Path) -> ctypes.CDLL | None:
    """The compiled source, or None where it cannot be made; `what` then goes through torch, which is said once."""
    found = compiler()
    if found is None:
        return None
    # The folder of `kvcompile.models.cache_dir`, which kernels do not import.
    root = Path(os.environ.get("KVCOMPILE_CACHE") or "~/.cache/kvcompile").expanduser().absolute()
    for threads in (["-fopenmp"], []):
        texts = [file.read_bytes() for file in (source, *included)]
        key = repr((texts, *flags, threads, found, os.stat(found).st_mtime_ns, processor()))
        file = root / "native" / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        try:
            if not file.is_file():
                _compile([found, *flags, *threads], source, file)
            return ctypes.CDLL(str(file), mode=os.RTLD_NOW)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error
    warnings.warn(f"{what} goes through torch, as its C source cannot be compiled ({reason})", stacklevel=2)
    return None


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def processor() -> str:
    """What the compiler's `native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _compile(command: Sequence[str], source: Path, file: Path) -> None:
    """Make the library. OpenMP is not linked: its symbols are found in the runtime that torch has loaded, so that there
    is one pool of threads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        compiled, linked = Path(folder) / "made.o", Path(folder) / "made.so"
        for step in (
            [*command, "-c", "-o", compiled, source],
            [command[0], "-shared", "-o", linked, compiled, "-lm"],
        ):
            subprocess.run(step, check=True, capture_output=True)
        linked.replace(file)
